"""The key of a shelf changes with all that decides the values of its records, and with nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import PREPROCESSING, digits, streams_of, tiny_config

from lit_transfer.activations import key as key_module
from lit_transfer.activations.contents import Contents
from lit_transfer.activations.key import content, description, hash_stages
from lit_transfer.activations.prefix import plain_recipe
from lit_transfer.activations.views import Views, plain_views, train_views
from lit_transfer.config import Augment
from lit_transfer.data.streams import Samples
from lit_transfer.model.backbone import Backbone, build_backbone
from lit_transfer.recipe import Model

CUT = 4
PLAIN = plain_recipe(torch.device("cpu"))
FLIPS = Augment(flip_h=0.5, flip_v=0.5, quarter_turns=True)


@pytest.fixture
def backbone() -> Backbone:
    """A tiny network."""
    return build_backbone(Model(backbone="timm/test_efficientnet", weights="none"), image_size=PREPROCESSING.size)


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    """24 of them."""
    return streams_of(tiny_config(digits(tmp_path / "digits"), tmp_path))["train"]


def of_another_weight(cut: int, backbone: Backbone, samples: Samples) -> dict[str, Any]:
    with torch.no_grad():
        backbone.stage_parameters(cut)[0][1].view(-1)[0] += 1e-6
    return described(backbone, samples)


def of_another_statistic(backbone: Backbone, samples: Samples) -> dict[str, Any]:
    next(buffer for name, buffer in backbone.named_buffers() if "running_mean" in name)[0] += 1e-6
    return described(backbone, samples)


def described(
    backbone: Backbone, samples: Samples, cut: int = CUT, preprocessing: Any = PREPROCESSING, **other: Any
) -> dict[str, Any]:
    view = other.get("view", plain_views(preprocessing).views[0])
    about = content(backbone, cut, hash_stages(backbone), samples, preprocessing, view)
    return description(about, other.get("recipe", PLAIN))


def drawn(seed: int) -> Any:
    views = train_views(2, FLIPS, PREPROCESSING, seed, range(2))
    assert isinstance(views, Views)
    return views.views[1]


def another_digest(backbone: Backbone, samples: Samples) -> dict[str, Any]:
    changed = copy.copy(samples.manifest)
    object.__setattr__(changed, "digest", "0" * 64)
    return described(backbone, replace(samples, manifest=changed))


def another_version(name: str, backbone: Backbone, samples: Samples) -> dict[str, Any]:
    real = key_module._version
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_module, "_version", lambda package: "0.0" if package == name else real(package))
        return described(backbone, samples)


def with_changed(attribute: str, value: Any, backbone: Backbone, samples: Samples) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attribute, value)
        return described(backbone, samples)


CHANGES: dict[str, Callable[[Backbone, Samples], dict[str, Any]]] = {
    "weight of the first stage": partial(of_another_weight, 0),
    "weight of the last frozen stage": partial(of_another_weight, CUT - 1),
    "running statistics": of_another_statistic,
    "cut": partial(described, cut=CUT + 1),
    "dataset": another_digest,
    "rows": lambda b, s: described(b, replace(s, rows=s.rows[1:])),
    **{
        f"preprocessing {name}": partial(described, preprocessing=replace(PREPROCESSING, **{name: value}))
        for name, value in {
            "size": 31,
            "canvas": 38,
            "fit": "pad",
            "interpolation": "bilinear",
            "mean": (0.5, 0.456, 0.406),
            "std": (0.5, 0.224, 0.225),
        }.items()
    },
    "drawn view": lambda b, s: described(b, s, view=drawn(0)),
    "view drawn with another seed": lambda b, s: described(b, s, view=drawn(1)),
    **{
        f"recipe {name}": partial(described, recipe=replace(PLAIN, **{name: value}))
        for name, value in {
            "device": "other",
            "batch": 8,
            "folded": True,
            "bf16_from": "stem",
            "compiled": True,
        }.items()
    },
    **{
        f"version of {name}": partial(another_version, name)
        for name in ("lit_transfer", "torchvision", "timm", "pillow", "simplejpeg")
    },
    "version of torch": partial(with_changed, "torch.__version__", "0.0"),
    "revision": partial(with_changed, "lit_transfer.activations.key.REVISION", key_module.REVISION + 1),
}


def test_the_key_changes_with_all_that_decides_a_record(backbone: Backbone, samples: Samples) -> None:
    about = {"nothing": described(backbone, samples)}
    about |= {name: change(copy.deepcopy(backbone), samples) for name, change in CHANGES.items()}
    keys = {name: Contents(value, len(samples.rows), (8,), torch.float32).key for name, value in about.items()}
    keys["dtype"] = Contents(about["nothing"], len(samples.rows), (8,), torch.float16).key
    keys["records"] = Contents(about["nothing"], len(samples.rows) - 1, (8,), torch.float32).key
    assert len(set(keys.values())) == len(keys), keys
    assert of_another_weight(CUT, copy.deepcopy(backbone), samples) == about["nothing"], "it stands behind the cut"
    assert described(copy.deepcopy(backbone), samples) == about["nothing"]


def test_the_key_knows_how_a_network_is_pooled() -> None:
    """The class token and the mean of the others have the same shape and the same weights."""
    hashes = []
    for pool in ("auto", "avg"):
        model = Model(backbone="timm/test_vit", weights="none", last_stage="blocks.1", pool=pool)  # type: ignore[arg-type]
        torch.manual_seed(0)
        hashes.append(hash_stages(build_backbone(model)))
    assert hashes[0][:-1] == hashes[1][:-1] and hashes[0][-1] != hashes[1][-1]
