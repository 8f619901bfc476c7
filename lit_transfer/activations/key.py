"""What stored activations are of: all that decides their values, as plain values to be hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import torch

from lit_transfer.activations.prefix import Recipe
from lit_transfer.activations.views import View
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.streams import Samples
from lit_transfer.model.backbone import Backbone
from lit_transfer.model.stages import Step

REVISION = 1
"""Of this package's own way to a record. Raise it with each change of what `data.decode`, `model.augment`, `views`,
`prefix` or a stage computes: nobody raises the package's version before a release.
"""
_PACKAGES = ("lit_transfer", "torchvision", "timm", "pillow", "simplejpeg")
_version = cache(version)  # which reads files, and is asked for every shelf


def content(
    backbone: Backbone,
    cut: int,
    stage_hashes: Sequence[str],
    samples: Samples,
    preprocessing: Preprocessing,
    view: View,
) -> dict[str, Any]:
    """What is stored, however it is computed.

    Args:
        backbone: its name and stages are read.
        cut: stages before it.
        stage_hashes: as `hash_stages` gives them.
        samples: their rows are the records, in order.
        preprocessing: of the pictures.
        view: of each picture.
    """
    return {
        "backbone": backbone.name,
        "cut": [*backbone.stage_names, "head"][cut],
        "stages_sha256": hashlib.sha256("".join(stage_hashes[:cut]).encode()).hexdigest(),
        "dataset": samples.manifest.digest,
        "rows_sha256": hashlib.sha256(samples.rows.astype("<i8").tobytes()).hexdigest(),
        "preprocessing": preprocessing.to_plain(),
        **view.key,
    }


def description(content: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What is stored and how it is computed: what the name of its folder is the hash of."""
    return {"content": content, "recipe": recipe.to_plain(), "versions": versions()}


def versions() -> dict[str, str]:
    """Those of the packages that decode pictures and compute stages: with this one, too, the way may change."""
    own = {"torch": torch.__version__, "revision": str(REVISION)}
    return own | {name: _version(name) for name in _PACKAGES}


def hash_stages(backbone: Backbone) -> list[str]:
    """Of each stage, sha256 of its steps, and of the names, types, shapes and bytes of its tensors as they are now."""
    hashes = {stage.name: hashlib.sha256(f"{[*map(_named, stage.steps)]}".encode()) for stage in backbone.stages}
    for name, tensor in backbone.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        found = hashes[backbone.stage_of(name)]
        found.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return [found.hexdigest() for found in hashes.values()]


def _named(step: Step) -> str:
    """What tells a step from others: how a network is pooled, for one, has no tensors."""
    if isinstance(step, partial):
        return f"{_named(step.func)}{step.args}{step.keywords}"
    return step if isinstance(step, str) else f"{step.__module__}.{step.__qualname__}"
