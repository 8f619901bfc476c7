from __future__ import annotations

import json
from typing import Any

import pytest
from layouts import config, row, small

from lit_transfer.config import Config
from lit_transfer.phases.table import differences, fingerprint, fingerprint_hash, resolve
from lit_transfer.schedule import Phase

THAW = row(train={"from": "blocks.1"}, backbone_lr=0.01, schedule="warmup_cosine")


def printed(settings: Config, samples: int = 17) -> dict[str, Any]:
    return fingerprint(settings, resolve(settings, small(), samples), {"train": "t" * 8, "val": "v" * 8}, "w" * 8)


@pytest.mark.parametrize(
    "sections",
    [
        {"seed": 1},
        {"image": {"size": 64}},
        {"augment": {"flip_h": 0.5}},
        {"model": {"backbone": "timm/net", "weights": "none"}},
        {"objective": {"label_smoothing": 0.1}},
        {"monitor": "val/accuracy"},
        {"trainer": {"precision": "bf16-mixed"}},
        {"activations": {"store": "off"}},
        {"data": {"train": {"manifest": "x", "split": "all"}, "val": {"manifest": "x", "split": "val"}}},
        {
            "data": {
                "train": {"manifest": "x", "split": "train", "fraction": 0.5},
                "val": {"manifest": "x", "split": "val"},
            }
        },
        {
            "data": {
                "train": {"manifest": "x", "split": "train"},
                "val": {"manifest": "x", "split": "val"},
                "label": "l",
            }
        },
        {
            "data": {
                "train": {"manifest": "x", "split": "train"},
                "val": {"manifest": "x", "split": "val"},
                "order": {"block_shards": 2},
            }
        },
    ],
)
def test_what_decides_the_result_is_in_the_fingerprint(sections: dict[str, Any]) -> None:
    base, other = printed(config([THAW])), printed(config([THAW], **sections))
    assert fingerprint_hash(base) != fingerprint_hash(other)
    assert len(differences(base, other)) == 1
    (section,) = sections
    assert differences(base, other)[0].startswith({"trainer": "precision"}.get(section, section))


@pytest.mark.parametrize(
    "change",
    [
        {"max_epochs": 3},
        {"lr": 0.2},
        {"norm": "batch"},
        {"momentum": 0.8},
        {"layer_decay": 0.5},
        {"mixup": 0.2},
        {"ema_decay": 0.9},
        {"max_minutes": 3.0},
    ],
)
def test_every_phase_is_in_the_fingerprint(change: dict[str, Any]) -> None:
    base, other = printed(config([THAW])), printed(config([THAW | change]))
    (key,) = change
    assert f"phases[0].{key}: {THAW.get(key, getattr(Phase(**THAW), key))} -> {change[key]}" in differences(base, other)


def test_the_data_is_in_the_fingerprint() -> None:
    plans = resolve(config([THAW]), small(), 17)
    prints = [fingerprint(config([THAW]), plans, {"train": digest}, None) for digest in ("a", "b")]
    assert differences(*prints) == ["data.train.digest: a -> b"]
    assert printed(config([THAW]), samples=17) != printed(config([THAW]), samples=170)


@pytest.mark.parametrize(
    "sections",
    [
        {"name": "other"},
        {"runs_dir": "elsewhere"},
        {"trainer": {"devices": 2, "log_every_steps": 1, "progress": False}},
        {"tracking": {"wandb": "off"}},
        {
            "data": {
                "train": {"manifest": "y", "split": "train"},
                "val": {"manifest": "y", "split": "val"},
                "workers": 0,
            }
        },
    ],
)
def test_where_a_run_is_computed_is_not_in_the_fingerprint(sections: dict[str, Any]) -> None:
    base, other = printed(config([THAW])), printed(config([THAW], **sections))
    assert fingerprint_hash(base) == fingerprint_hash(other)


def test_a_fingerprint_survives_json() -> None:
    value = printed(config([THAW]))
    assert differences(value, json.loads(json.dumps(value))) == []
    assert fingerprint_hash(value) == fingerprint_hash(json.loads(json.dumps(value)))


def test_differences_name_the_place() -> None:
    old = {"a": 1, "b": {"c": [1, {"d": 2}]}, "gone": 1, "list": [1]}
    new = {"a": 1, "b": {"c": [1, {"d": 3}]}, "new": 2, "list": [1, 2]}
    assert differences(old, new) == [
        "b.c[1].d: 2 -> 3",
        "gone: 1 -> None",
        "list: [1] -> [1, 2]",
        "new: None -> 2",
    ]
    assert differences(old, old) == []


def test_the_weights_are_in_the_fingerprint() -> None:
    plans = resolve(config([THAW]), small(), 17)
    prints = [fingerprint(config([THAW]), plans, {"train": "t"}, sha256) for sha256 in ("a", "b")]
    assert differences(*prints) == ["weights_sha256: a -> b"]


def test_the_arguments_of_a_schedule_are_in_the_fingerprint() -> None:
    base, other = printed(config([THAW])), printed(config([THAW | {"schedule_args": {"end_factor": 0.1}}]))
    assert differences(base, other) == ["phases[0].schedule_args.end_factor: None -> 0.1"]
