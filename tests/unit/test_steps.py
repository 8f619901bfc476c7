"""Phases of a tiny run, each a real fit on one rank: what ends them, what is validated, what they end with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from digits import digits, fine_tuning, metric_rows, prepared
from safetensors.torch import load_file
from torch import Tensor

from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.phases.checkpoint import PhaseFiles, PhaseResult
from lit_transfer.phases.optim import lr_at
from lit_transfer.phases.run import run_phases

STEPS = 3
"""Of an epoch: 24 pictures, 8 at a time."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return digits(tmp_path_factory.mktemp("digits") / "data")


class Trainee:
    """Runs of one or more phases in a folder of their own."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest, self.folder = manifest, folder
        self.config: Config

    def train(
        self, *phases: dict[str, Any], callbacks: Sequence[pl.Callback] = (), **sections: Any
    ) -> list[PhaseResult]:
        """Rows need only what differs from a head of two epochs."""
        usual = {"name": "head", "lr": 0.1, "global_batch": 8}
        rows = [usual | ({} if "max_steps" in row else {"max_epochs": 2}) | row for row in phases]
        self.config = fine_tuning(self.manifest, self.folder, rows, **sections)
        self.job, self.plans = prepared(self.config)
        return run_phases(self.job, self.plans, callbacks)

    def column(self, name: str) -> dict[int, float]:
        """A column of metrics.csv by the step of the run, where it has a value."""
        return {int(row["step"]): float(row[name]) for row in metric_rows(self.config) if row.get(name)}

    def validated(self) -> list[int]:
        return list(self.column("val/loss"))


@pytest.fixture
def trainee(manifest: Manifest, tmp_path: Path) -> Trainee:
    return Trainee(manifest, tmp_path)


def test_epochs_end_in_a_validation(trainee: Trainee) -> None:
    (result,) = trainee.train({})
    assert trainee.validated() == [3, 6] and list(trainee.column("train/loss")) == [1, 2, 3, 4, 5, 6]
    assert (result.steps, result.epochs, result.reason) == (6, 2, "max_epochs 2 reached")
    assert [row["epoch"] for row in metric_rows(trainee.config)] == ["0"] * 3 + ["1"] * 3


def test_max_steps_may_fall_into_an_epoch_and_is_validated_too(trainee: Trainee) -> None:
    (result,) = trainee.train({"max_steps": 4})
    assert trainee.validated() == [3, 4]
    assert (result.steps, result.epochs, result.reason) == (4, 2, "max_steps 4 reached")


def test_validation_every_so_many_steps(trainee: Trainee) -> None:
    trainee.train({"validate_every_steps": 2, "max_steps": 5})
    assert trainee.validated() == [2, 4, 5]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_minutes_end_a_phase_at_a_step_which_is_validated(trainee: Trainee, accumulate: int) -> None:
    (result,) = trainee.train({"max_minutes": 1e-6, "accumulate": accumulate})
    assert trainee.validated() == [1]
    assert (result.steps, result.epochs, result.reason) == (1, 1, "max_minutes 1e-06 reached")


@pytest.mark.parametrize("bound", ["below", "above"])
def test_a_threshold_ends_a_phase_also_within_an_epoch(trainee: Trainee, bound: str) -> None:
    value = {"below": 1e6, "above": 0.0}[bound]
    (result,) = trainee.train({"until": {"metric": "val/loss", bound: value}, "validate_every_steps": 2})
    assert trainee.validated() == [2] and (result.steps, result.epochs) == (2, 1)
    assert result.reason.startswith("val/loss ") and f" is {bound} {value:g}" in result.reason


def test_a_plateau_ends_a_phase(trainee: Trainee) -> None:
    until = {"metric": "val/loss", "patience": 2, "min_delta": 1e6}
    (result,) = trainee.train({"until": until, "validate_every_steps": 1})
    assert (result.steps, result.reason) == (3, "val/loss has not improved for 2 validations")


def test_a_run_without_validation_trains(trainee: Trainee) -> None:
    streams = {"train": {"manifest": str(trainee.manifest.path), "split": "train"}, "workers": 0}
    (result,) = trainee.train({"max_steps": 4}, data=streams)
    assert (result.steps, result.reason) == (4, "max_steps 4 reached") and trainee.validated() == []


def test_the_curve_shows_the_rates_of_the_schedule(trainee: Trainee) -> None:
    trainee.train({"schedule": "warmup_cosine", "warmup_steps": 2, "train": {"last": 1}, "backbone_lr": 0.01})
    (plan,) = trainee.plans
    for name in ("head", "backbone"):
        expected = [lr_at(plan, step)[name] for step in range(6)]
        assert list(trainee.column(f"lr/{name}").values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("patience", "drops"), [(1, [0, 0, 1, 2, 3, 4]), (2, [0, 0, 0, 1, 1, 2])])
def test_a_plateau_lowers_the_rate_after_vain_validations(trainee: Trainee, patience: int, drops: list[int]) -> None:
    """The first validation is the best one, and all others are in vain; what they decide holds from the next step."""
    args = {"patience": patience, "min_delta": 1e6, "gamma": 0.5}
    trainee.train({"schedule": "plateau", "schedule_args": args, "validate_every_steps": 1})
    assert list(trainee.column("lr/head").values()) == pytest.approx([0.1 * 0.5**n for n in drops])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_of_a_whole_step_is_clipped(trainee: Trainee, accumulate: int) -> None:
    plain = {"optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "clip_norm": 1e-3, "max_steps": 1}
    trainee.train(plain | {"accumulate": accumulate})
    before = prepared(trainee.config)[0].network.state_dict()
    moves = [tensor - before[name] for name, tensor in trainee.job.network.head.state_dict(prefix="head.").items()]
    assert float(torch.cat([move.flatten() for move in moves]).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_checkpoints_fall_on_epochs_and_on_steps(trainee: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    write = PhaseFiles.write_last

    def noted(self: PhaseFiles, state: dict[str, Any], best_step: int | None) -> None:
        saved.append(state["step"])
        write(self, state, best_step)

    monkeypatch.setattr(PhaseFiles, "write_last", noted)
    never, often = {"every_minutes": None}, {"every_minutes": 1e-9}
    for number, (checkpoint, expected) in enumerate(
        ((never, [3, 5]), (never | {"every_steps": 2}, [2, 3, 4, 5]), (often, [1, 2, 3, 4, 5]))
    ):
        saved.clear()
        trainee.train({"max_steps": 5}, checkpoint=checkpoint, name=f"run{number}")
        assert saved == expected, checkpoint


class Seen(pl.Callback):
    """The trained weights after every step, and those that were validated, by step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.validated: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.weights[trainer.global_step] = self._copy(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated[trainer.global_step] = self._copy(pl_module)

    def _copy(self, module: pl.LightningModule) -> dict[str, Tensor]:
        named = module.get_submodule("network").named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}


def assert_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def test_the_average_is_validated_and_is_what_the_phase_ends_with(trainee: Trainee) -> None:
    seen = Seen()
    trainee.train({"ema_decay": 0.7}, callbacks=[seen])
    names = list(seen.weights[1])
    average = {
        name: tensor for name, tensor in prepared(trainee.config)[0].network.state_dict().items() if name in names
    }
    for step, weights in seen.weights.items():
        average = {name: 0.7 * average[name] + 0.3 * weights[name] for name in names}
        if step in seen.validated:
            assert all(torch.allclose(seen.validated[step][name], average[name], atol=1e-6) for name in names)
    assert list(seen.validated) == [3, 6]
    assert_equal(seen.validated[6], trainee.job.network.state_dict())
    assert not torch.equal(seen.weights[6][names[0]], seen.validated[6][names[0]])


@pytest.mark.parametrize("ema", [{}, {"ema_decay": 0.5}])
def test_restore_best_ends_with_the_weights_of_the_best_validation(trainee: Trainee, ema: dict[str, float]) -> None:
    seen = Seen()
    wild = {"optimizer": "sgd", "lr": 3.0, "validate_every_steps": 1, "restore_best": True}
    trainee.train(wild | ema, callbacks=[seen])
    losses = trainee.column("val/loss")
    best = min(losses, key=lambda step: losses[step])
    assert best < 6, "or there is nothing to see"
    assert_equal(seen.validated[best], trainee.job.network.state_dict())
    phase = trainee.config.run_dir / "checkpoints" / "head"
    assert_equal(load_file(phase / "best.safetensors"), load_file(phase / "final.safetensors"))
    assert not list(phase.glob("best-*"))


def test_the_next_phase_begins_where_the_last_one_ended(trainee: Trainee) -> None:
    seen = Seen()
    frozen = {"name": "still", "train": "head", "lr": 1e-30, "max_steps": 1}
    trainee.train({"ema_decay": 0.7}, frozen, callbacks=[seen])
    final = load_file(trainee.config.run_dir / "checkpoints" / "head" / "final.safetensors")
    assert_equal(final, trainee.job.network.state_dict())


def test_phases_may_repeat_overlap_and_freeze_again(trainee: Trainee) -> None:
    thaw = {"backbone_lr": 0.01, "max_steps": 2}
    rows = [
        {"name": "head"},
        {"name": "thaw", "train": {"last": 2}} | thaw,
        {"name": "head_again", "max_steps": 2},
        {"name": "surgical", "train": {"params": ["stem/*"]}, "lr": None} | thaw,
        {"name": "norms", "train": {"params": ["norms", "head/*"]}, "norm": "batch"} | thaw,
        {"name": "all", "train": "all"} | thaw,
        {"name": "thaw_again", "train": {"last": 2}} | thaw,
    ]
    results = trainee.train(*rows)
    assert [result.steps for result in results] == [6, 2, 2, 2, 2, 2, 2]
    before = prepared(trainee.config)[0].network.state_dict()
    for plan in trainee.plans:
        after = load_file(trainee.config.run_dir / "checkpoints" / plan.phase.name / "final.safetensors")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        statistics = {name for name in before if "running" in name or "num_batches" in name}
        expected = {*plan.trained, *(statistics if plan.phase.norm == "batch" else ())}
        assert moved == expected, plan.phase.name
        before = after
    rows_read = metric_rows(trainee.config)
    assert list(dict.fromkeys(row["phase"] for row in rows_read)) == [row["name"] for row in rows]
    assert [int(row["step"]) for row in rows_read] == list(range(1, 19)), "steps are those of the run"
    epochs = [int(row["epoch"]) for row in rows_read]
    assert epochs == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7], "and each phase begins a new epoch"


def test_a_finished_run_is_not_trained_again(trainee: Trainee, capsys: pytest.CaptureFixture[str]) -> None:
    first = trainee.train({"max_steps": 2})
    weights = trainee.job.network.state_dict()
    capsys.readouterr()
    assert trainee.train({"max_steps": 2}) == first
    assert not capsys.readouterr().out
    assert_equal(weights, trainee.job.network.state_dict())


def test_each_phase_says_when_it_begins_and_why_it_ended(trainee: Trainee, capsys: pytest.CaptureFixture[str]) -> None:
    trainee.train({"max_steps": 2}, {"name": "b", "train": {"last": 1}, "backbone_lr": 0.01, "max_steps": 1})
    assert capsys.readouterr().out.splitlines() == [
        "phase head begins: 2 steps; learning rates head 0.1",
        "phase head ended after 2 steps: max_steps 2 reached",
        "phase b begins: 1 step; learning rates backbone 0.01, head 0.1",
        "phase b ended after 1 step: max_steps 1 reached",
    ]


def test_parts_of_a_step_give_the_step(trainee: Trainee) -> None:
    ends = []
    for parts in (1, 2, 3):
        row = {"train": "all", "backbone_lr": 0.01, "optimizer": "sgd", "accumulate": parts, "clip_norm": 0.5}
        (result,) = trainee.train(row, name=f"parts{parts}")
        ends.append(
            (trainee.job.network.state_dict(), trainee.column("train/loss"), trainee.column("val/loss"), result)
        )
    for state, losses, val, result in ends[1:]:
        assert result.steps == 6
        assert losses == pytest.approx(ends[0][1], rel=1e-4) and val == pytest.approx(ends[0][2], rel=1e-4)
        assert all(torch.allclose(tensor, ends[0][0][name], atol=1e-5) for name, tensor in state.items())


def test_compiled_phases_train_as_others_do(trainee: Trainee) -> None:
    """Frozen and thawed; that no frame of another phase is taken is in `test_network.py`."""
    ends = []
    for compiled in (False, True):
        plain = {"optimizer": "sgd", "lr": 0.01, "max_steps": 4, "compile": compiled}
        thaw = plain | {"name": "thaw", "train": {"last": 1}, "backbone_lr": 0.01}
        results = trainee.train(plain, thaw, name=f"compiled_{compiled}")
        assert [result.steps for result in results] == [4, 4]
        ends.append((trainee.job.network.state_dict(), trainee.column("train/loss"), trainee.column("val/loss")))
    torch._dynamo.reset()
    (state, *curves), (compiled_state, *compiled_curves) = ends
    assert all(torch.allclose(tensor, compiled_state[name], atol=1e-5) for name, tensor in state.items())
    for curve, other in zip(curves, compiled_curves, strict=True):
        assert other == pytest.approx(curve, rel=1e-4)
    before = prepared(trainee.config)[0].network.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, compiled_state[name])}
    assert moved == set(trainee.plans[1].trained)
