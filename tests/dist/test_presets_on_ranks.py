"""Every preset on two ranks with different data: ranks stay equal, and frozen is frozen, to the bit.

The settings beside those of a preset go round: averages, mixup, accumulation, clipping, early ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from digits import digits
from ranks import Left, differing, train, write_config

from lit_transfer.phases.presets import PRESETS

MIDDLE = {"Mixed": "layer", "efficientnet": "blocks.3", "vit": "blocks.3"}
EVERY_2 = {"validate_every_steps": 2}
STALE = {"metric": "val/loss", "patience": 1, "min_delta": 1e9}


def settings(preset: str, middle: str) -> dict[str, Any]:
    """A preset made short, with something beside it that must hold on ranks too."""
    return {
        "linear_probe": {"epochs": 2, "ema_decay": 0.5, "accumulate": 2},
        "freeze_thaw": {"head_epochs": 1, "thaw_epochs": 1, "thaw_from": middle, "mixup": 0.4, "clip_norm": 0.5},
        "lp_ft": {"head_epochs": 1, "tune_epochs": 2, "ema_decay": 0.9, "cutmix": 1.0, "restore_best": True},
        "gradual": {"down_to": middle, "last_epochs": 1, "ema_decay": 0.9, "accumulate": 3},
        "first_k_frozen": {"k": 2, "epochs": 3, **EVERY_2, "until": {"metric": "val/loss", "below": 1e9}},
        "fastai": {"epochs": 1, "ema_decay": 0.5, "mixup": 0.2, "cutmix": 1.0},
        "bit": {"lr": 1.0, **EVERY_2, "until": STALE, "accumulate": 2},  # its first 100 steps are a warm-up
        "layer_decay": {"epochs": 1, "clip_norm": 0.1, "ema_decay": 0.9, "grad_checkpointing": True},
        "norm_only": {"epochs": 1, "ema_decay": 0.9, "mixup": 0.2},
        "surgical": {"head_epochs": 1, "stage_epochs": 2, "stage": middle, "ema_decay": 0.5, "clip_norm": 0.5},
        "scratch": {"epochs": 2, "ema_decay": 0.5, "clip_norm": 1.0},
    }[preset]


FAMILIES = [pytest.param(name, marks=pytest.mark.full("families")) for name in ("efficientnet", "vit")]


@pytest.mark.parametrize("network", ["Mixed", *FAMILIES])
def test_every_preset_keeps_ranks_equal_and_what_is_frozen_still(network: str, tmp_path: Path) -> None:
    manifest = digits(tmp_path / "digits", weighted=True).path
    model = {"backbone": f"noisy_networks:{network}", "head": {"hidden": [8], "dropout": 0.2}}
    files = []
    for preset in PRESETS:
        phases = {"preset": preset, "global_batch": 7} | settings(preset, MIDDLE[network])
        files.append(write_config(tmp_path, preset, manifest, 2, phases, model=model))
    for preset, left in train(files).items():
        for phase, plan in enumerate(left.plans):
            where = f"{preset}, phase {plan['name']}"
            check_networks_equal(left, phase, where)
            check_averages_equal(left, phase, where)
            check_ends_equal(left, phase, where)
            check_only_trained_tensors_moved(left, phase, where)
            check_frozen_parts_had_no_noise(left, phase, where, all_noisy=network == "Mixed")


def check_networks_equal(left: Left, phase: int, where: str) -> None:
    assert differing(left.network(phase + 1, rank=0), left.network(phase + 1, rank=1)) == [], where


def check_averages_equal(left: Left, phase: int, where: str) -> None:
    averages = [left.ema(phase, rank) for rank in (0, 1)]
    plan = left.plans[phase]
    if plan["ema_decay"] is None:
        assert averages == [None, None], where
        return
    assert averages[0] is not None and averages[1] is not None, where
    assert differing(averages[0], averages[1]) == [], where
    assert set(averages[0]) == set(plan["trained"]), where


def check_ends_equal(left: Left, phase: int, where: str) -> None:
    ends = [left.end(phase, rank) for rank in (0, 1)]
    assert ends[0] == ends[1], where
    early = {"first_k_frozen": 2, "bit": 4}  # by their `until`
    assert ends[0]["step"] == early.get(where.partition(",")[0], left.plans[phase]["max_steps"]), where


def check_only_trained_tensors_moved(left: Left, phase: int, where: str) -> None:
    before, after = left.network(phase), left.network(phase + 1)
    trained, norm = set(left.plans[phase]["trained"]), left.plans[phase]["norm"]
    statistics = {name for name in after if "running" in name or "num_batches" in name}
    assert (norm == "batch") == where.startswith("scratch"), where
    assert set(differing(before, after)) == (trained | statistics if norm == "batch" else trained), where


def check_frozen_parts_had_no_noise(left: Left, phase: int, where: str, *, all_noisy: bool) -> None:
    """At any step, on any rank; `all_noisy`: every part of the network has noise when it trains."""
    trained = set(left.plans[phase]["parts"])
    seen = [set(parts) for rank in (0, 1) for parts in left.end(phase, rank)["noisy"]]
    assert seen, where
    assert all(parts == trained if all_noisy else parts <= trained for parts in seen), f"{where}: {seen}"
