"""Runs that read stored activations, and what they leave."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from digits import fine_tuning, metric_rows, prepared
from torch import Tensor

from lit_transfer.activations.costs import Costs
from lit_transfer.activations.library import Library
from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.phases import choice
from lit_transfer.phases.run import run_phases
from lit_transfer.reading import to_plain

TIMING = ("images_per_s", "data_wait_share")
HEAD = {"name": "head", "max_epochs": 2, "lr": 0.01, "global_batch": 32}
TOP = {"name": "top", "train": {"last": 2}, "max_epochs": 2, "lr": 0.01, "backbone_lr": 1e-3, "global_batch": 32}
OFF = {"store": "off"}
MOVING = {"flip_h": 0.5, "rotate_degrees": 20, "brightness": 0.2}
FLIPS = {"flip_h": 0.5, "flip_v": 0.5, "quarter_turns": True}
FROZEN = 7  # stages of the tiny network
EXACT = {"store": "require", "prefix": "plain", "dtype": "float32"}
"""Reads what training computes, to the bit where all batches have 32 samples."""


@dataclass(frozen=True)
class Left:
    """What a run leaves: weights, curves but for what the clock says, and why each phase ended."""

    weights: dict[str, Tensor]
    curves: list[dict[str, str]]
    ends: list[tuple[str, int, int, str]]

    def apart(self, other: Left) -> float:
        """The largest difference of a weight."""
        pairs = ((tensor, other.weights[name]) for name, tensor in self.weights.items())
        return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def configured(
    manifest: Manifest,
    folder: Path,
    name: str,
    phases: list[dict[str, Any]],
    activations: dict[str, Any],
    **sections: Any,
) -> Config:
    """A run with a store in `folder/store`."""
    store = {"folder": str(folder / "store")} | activations
    return replace(fine_tuning(manifest, folder / "runs", phases, activations=store, **sections), name=name)


def ran(config: Config) -> Left:
    """Train, as `train` would in a process of its own."""
    job, plans = prepared(config)
    results = run_phases(job, plans)
    curves = [{key: value for key, value in row.items() if key not in TIMING} for row in metric_rows(config)]
    weights = {name: tensor.clone() for name, tensor in job.network.state_dict().items()}
    return Left(weights, curves, [(r.name, r.epochs, r.steps, r.reason) for r in results])


def assert_same(given: Left, wanted: Left) -> None:
    """To the bit."""
    assert given.ends == wanted.ends
    assert given.curves == wanted.curves
    assert [name for name, tensor in wanted.weights.items() if not torch.equal(given.weights[name], tensor)] == []


def choices(config: Config) -> dict[str, Any]:
    """What each phase of a run decided, by its name."""
    files = sorted((config.run_dir / "checkpoints").glob("*/activations.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in files}


def cuts(config: Config) -> dict[str, int | None]:
    """How many stages stand before what each phase of a run has read."""
    return {name: found["cut"] for name, found in choices(config).items()}


def counts(folder: Path) -> dict[str, int]:
    """Parts built, wasted and corrupted, over all shelves of the store."""
    total = dict.fromkeys(("built", "wasted", "corrupted"), 0)
    for log in (folder / "store").glob("*/log-*.jsonl"):
        for line in log.read_text().splitlines():
            total[json.loads(line)["event"]] += 1
    return total


def storing_pays(monkeypatch: pytest.MonkeyPatch, compute_s: float = 1.0) -> None:
    """Let `auto` measure a computer on which each stage takes so long for a sample, and the store nothing."""

    def measured(library: Library, load_s: float, compute: dict[int, float], *_: Any) -> Costs:
        free = {cut: 1e-6 * cut for cut in compute}
        slow = {cut: compute_s * cut for cut in compute}
        return Costs(0.0, slow, free, {cut: library.record_bytes(cut) for cut in compute}, 1e12, 1e12)

    monkeypatch.setattr(choice, "_WORTH_MEASURING_S", 0.0)
    monkeypatch.setattr(choice, "_costs", measured)


def parts(folder: Path) -> list[Path]:
    """The files of all shelves of the store."""
    return sorted((folder / "store").glob("*/part-*.safetensors"))


def written(config: Config, folder: Path) -> str:
    """A config as a file."""
    file = folder / f"{config.name}.yaml"
    file.write_text(yaml.safe_dump(to_plain(config)))
    return str(file)
