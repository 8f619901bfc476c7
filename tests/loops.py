"""What the tests of heads on features in memory share: a backbone that gives pixels, and the loop in a fit's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from digits import fine_tuning, metric_rows, prepared
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_transfer.config import Config
from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.plan import Batch, Rows
from lit_transfer.model.augment import eval_input
from lit_transfer.model.module import Stopped, TransferModule
from lit_transfer.phases.checkpoint import PhaseFiles, PhaseResult
from lit_transfer.phases.features import Features
from lit_transfer.phases.heads import train_heads
from lit_transfer.phases.job import Job
from lit_transfer.phases.run import run_phases
from lit_transfer.phases.steps import Steps, StopSignal

SIZE = 16
TIMES = {"images_per_s", "data_wait_share"}


class Pixels(nn.Module):
    """A network whose features are the pixels, so that no batch shape can change them."""

    classifier = "fc"

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(3 * SIZE**2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(x))  # type: ignore[no-any-return]


def first_view(epoch: int, rows: Rows) -> NDArray[np.int64]:
    return np.zeros(len(rows), np.int64)


def features_of(job: Job, stream: str) -> Features | None:
    """A stream's features in memory, as a store would give them."""
    if stream not in job.streams:
        return None
    samples = job.streams[stream]
    item = SampleDataset(samples, job.preprocessing, None)[Batch(0, samples.rows)]
    with torch.no_grad():
        values = job.network.backbone(eval_input(item["image"], job.preprocessing))
    damaged = frozenset(torch.nonzero(~item["valid"]).flatten().tolist())
    values[list(damaged)] = 0
    return Features(samples, (values,), damaged, first_view)


@contextmanager
def looped(job: Job) -> Iterator[None]:
    """The plain loop in the place of each fit of a job."""
    train, val = features_of(job, "train"), features_of(job, "val")

    def fit(trainer: pl.Trainer, module: TransferModule, datamodule: object) -> None:
        (steps,) = [callback for callback in trainer.callbacks if isinstance(callback, Steps)]
        train_heads(module, steps, train, val)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "fit", fit)
        yield


@dataclass
class Left:
    """What a run left: results, curves, and the tensors and other values of its last checkpoint."""

    results: list[PhaseResult]
    rows: list[dict[str, str]]
    final: dict[str, Tensor]
    last: dict[str, Any]


def config_of(manifest: Manifest, folder: Path, row: dict[str, Any], *more: dict[str, Any], **sections: Any) -> Config:
    """A run of one phase, `head`, or of more; a row needs only what is special."""
    streams = {name: {"manifest": str(manifest.path), "split": name} for name in ("train", "val")}
    head = sections.pop("head", {})
    fixed = {
        "image": {"size": SIZE, "crop": 1.0},
        "model": {"backbone": "loops:Pixels", "weights": "none", "head": head},
        "activations": {"store": "off"}
        if not row.get("heads")
        else {"store": "require", "folder": str(folder / "store"), "prefix": "plain", "dtype": "float32"},
        "data": streams | {"workers": 0} | sections.pop("data", {}),
    }
    usual = {"name": "head", "lr": 0.01, "global_batch": 7}
    rows = [usual | ({} if "max_steps" in each else {"max_epochs": 3}) | each for each in (row, *more)]
    return fine_tuning(manifest, folder, rows, **fixed, **sections)


def train(config: Config, *, loop: bool) -> Left:
    job, plans = prepared(config)
    if loop:
        with looped(job):
            results = run_phases(job, plans)
    else:
        results = run_phases(job, plans)
    files = PhaseFiles(config.run_dir / "checkpoints" / plans[-1].phase.name)
    last = files.read_last()
    assert last is not None
    return Left(results, metric_rows(config), load_file(files.folder / "final.safetensors"), last)


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal to the bit, but for times."""
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for place, value in enumerate(theirs):
            assert_same(ours[place], value, f"{where}[{place}]")
    else:
        assert ours == theirs, where


def assert_same_runs(ours: Left, theirs: Left) -> None:
    assert_same(ours.final, theirs.final)
    timed = ("recorder", "identity", "quarantine")
    assert_same(*({key: value for key, value in left.last.items() if key not in timed} for left in (ours, theirs)))
    assert [(r.epochs, r.steps, r.reason) for r in ours.results] == [
        (r.epochs, r.steps, r.reason) for r in theirs.results
    ]
    assert len(ours.rows) == len(theirs.rows)
    for mine, other in zip(ours.rows, theirs.rows, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - TIMES:
            if mine[name] != other[name]:  # the sum of a loss may round otherwise
                assert float(mine[name]) == pytest.approx(float(other[name]), rel=1e-5), name


class StopAt:
    """A signal that comes before a step of a fit is over."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self, signal: StopSignal) -> bool:
        self.left -= 1
        return self.left == 0


def stopped(config: Config, step: int, *, loop: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at = StopAt(step)
        patch.setattr(StopSignal, "__call__", lambda signal: at(signal))
        with pytest.raises(Stopped):
            train(config, loop=loop)
