"""The plain loop over features in memory against the Trainer on the same features: the same bits, curves and ends.

The backbone gives the pixels as they are, and the loop stands in for `Trainer.fit`, so all around it is that of a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from digits import digits, fine_tuning, metric_rows, prepared
from numpy.typing import NDArray
from packing import damage
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.module import SampleDataset
from lit_transfer.data.plan import Batch, Rows
from lit_transfer.errors import UserError
from lit_transfer.model.augment import eval_input
from lit_transfer.model.module import LossNotFinite, Stopped, TransferModule
from lit_transfer.phases import features as features_module
from lit_transfer.phases.checkpoint import PhaseFiles, PhaseResult
from lit_transfer.phases.features import Features
from lit_transfer.phases.heads import require_features, train_heads, why_not_looped
from lit_transfer.phases.job import Job
from lit_transfer.phases.run import run_phases
from lit_transfer.phases.steps import Steps

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


def config_of(manifest: Manifest, folder: Path, row: dict[str, Any], **sections: Any) -> Config:
    streams = {name: {"manifest": str(manifest.path), "split": name} for name in ("train", "val")}
    head = sections.pop("head", {})
    fixed = {
        "image": {"size": SIZE, "crop": 1.0},
        "model": {"backbone": f"{__name__}:Pixels", "weights": "none", "head": head},
        "activations": {"store": "off"},
        "data": streams | {"workers": 0} | sections.pop("data", {}),
    }
    usual = {"name": "head", "lr": 0.01, "global_batch": 7}
    rows = [usual | ({} if "max_steps" in row else {"max_epochs": 3}) | row]
    return fine_tuning(manifest, folder, rows, **fixed, **sections)


def train(config: Config, *, loop: bool) -> Left:
    job, plans = prepared(config)
    if loop:
        with looped(job):
            results = run_phases(job, plans)
    else:
        results = run_phases(job, plans)
    files = PhaseFiles(config.run_dir / "checkpoints" / "head")
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


@dataclass(frozen=True)
class Case:
    """A phase, and what is special about its run; 24 samples in batches of 7 leave a small last one."""

    row: dict[str, Any]
    task: str = "multiclass"
    sections: dict[str, Any] = field(default_factory=dict)
    damaged: bool = False


SGD = {"optimizer": "sgd", "momentum": 0.9}
CASES = {
    "adamw": Case({"weight_decay": 0.1, "schedule": "warmup_cosine", "warmup_steps": 2}),
    "one_cycle": Case({"schedule": "one_cycle", **SGD, "lr": 0.1}),
    "clip": Case({"clip_norm": 0.01, **SGD, "lr": 1.0}),
    "three_parts": Case({"accumulate": 3, "clip_norm": 0.5}),
    "ema_best": Case({"ema_decay": 0.7, "restore_best": True, "validate_every_steps": 1, **SGD, "lr": 3.0}),
    "until": Case({"until": {"metric": "val/loss", "patience": 1, "min_delta": 1e6}, "ema_decay": 0.5}),
    "plateau": Case(
        {
            "schedule": "plateau",
            "schedule_args": {"patience": 1, "min_delta": 1e6, "gamma": 0.5},
            "validate_every_steps": 2,
        }
    ),
    "max_steps": Case({"max_steps": 6, "label_smoothing": 0.1}),
    "dropout": Case({}, sections={"head": {"hidden": [5], "dropout": 0.4}}),
    "dropout_in_parts": Case({"accumulate": 2}, sections={"head": {"dropout": 0.4}}),
    "mixup": Case({"mixup": 0.8}, sections={"head": {"dropout": 0.2}}),
    "mixup_in_parts": Case({"mixup": 0.8, "accumulate": 3}),
    "balance": Case({}, sections={"data": {"order": {"balance": "classes", "last_batch": "drop"}}}),
    "by_weights": Case({"max_steps": 5}, sections={"data": {"order": {"balance": "weights"}}}),
    "objective": Case({}, sections={"objective": {"class_weights": [0.3, 2.0], "focal_gamma": 2.0}}),
    "partitions": Case({"global_batch": 8}, sections={"data": {"order": {"partitions": 2, "block_shards": 1}}}),
    "multilabel": Case({"accumulate": 2}, task="multilabel", sections={"objective": {"class_weights": "balanced"}}),
    "ordinal": Case({}, task="ordinal"),
    "regression": Case({**SGD, "lr": 1e-4}, task="regression", sections={"monitor": "val/rmse"}),
    "no_validation": Case({"max_steps": 5}, sections={"data": {"val": None}}),
    "damaged": Case({"accumulate": 2}, damaged=True, sections={"data": {"max_bad_fraction": 0.9}}),
    "damaged_balance": Case(
        {}, damaged=True, sections={"data": {"max_bad_fraction": 0.9, "order": {"balance": "classes"}}}
    ),
    "damaged_multilabel": Case(
        {"accumulate": 2}, task="multilabel", damaged=True, sections={"data": {"max_bad_fraction": 0.9}}
    ),
}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Manifest]:
    """Weighted digits by (task, whether some of its samples are damaged)."""
    found = {}
    for key in {(case.task, case.damaged) for case in CASES.values()}:
        found[key] = digits(tmp_path_factory.mktemp("digits") / "data", task=key[0], weighted=True)
        if key[1]:
            for row in (*found[key].rows("train")[[1, 5, 17]], found[key].rows("val")[3]):
                damage(found[key], int(row))
    return found


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) for name in CASES])
def test_the_loop_gives_the_trainers_weights_curves_and_checkpoint(
    name: str, manifests: dict[tuple[str, bool], Manifest], tmp_path: Path
) -> None:
    case = CASES[name]
    config = config_of(manifests[case.task, case.damaged], tmp_path, case.row, **case.sections)
    theirs = train(config, loop=False)
    ours = train(config_of_like(config, "looped"), loop=True)
    assert_same_runs(ours, theirs)
    assert ours.last["quarantine"] == theirs.last["quarantine"] or not case.damaged


def config_of_like(config: Config, name: str) -> Config:
    from dataclasses import replace

    return replace(config, name=name)
