"""The plain loop over features in memory against the Trainer on the same features: the same bits, curves and ends.

The backbone gives the pixels as they are, and the loop stands in for `Trainer.fit`, so all around it is that of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import digits, prepared
from loops import SIZE, assert_same, assert_same_runs, config_of, features_of, looped, stopped, train
from numpy.typing import NDArray
from packing import damage
from safetensors.torch import load_file
from torch import Tensor

from lit_transfer.config import Order
from lit_transfer.data.loading import SUBSTITUTES
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.plan import PADDING, Rows
from lit_transfer.data.samplers import TrainSampler
from lit_transfer.errors import UserError
from lit_transfer.model.module import LossNotFinite
from lit_transfer.phases import features as features_module
from lit_transfer.phases.checkpoint import PhaseFiles
from lit_transfer.phases.features import Features, stretches
from lit_transfer.phases.heads import require_features, why_not_looped
from lit_transfer.phases.job import Job
from lit_transfer.phases.run import run_phases
from lit_transfer.phases.steps import Steps
from lit_transfer.schedule import Heads


@dataclass(frozen=True)
class Case:
    """A phase, and what is special about its run; 24 samples in batches of 7 leave a small last one."""

    row: dict[str, Any]
    task: str = "multiclass"
    sections: dict[str, Any] = field(default_factory=dict)
    damaged: bool = False


SGD = {"optimizer": "sgd", "momentum": 0.9}
ALLOWED = {"max_bad_fraction": 0.9}
CASES = {
    "adamw": Case({"weight_decay": 0.1, "schedule": "warmup_cosine", "warmup_steps": 2}),
    "one_cycle": Case({"schedule": "one_cycle", **SGD, "lr": 0.1}),
    "clip": Case({"clip_norm": 0.01, **SGD, "lr": 1.0}),
    "three_parts": Case({"accumulate": 3, "clip_norm": 0.5, "global_batch": 10}),  # fp32: 1 / 3 / 10 * 3 is not 1 / 10
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
    "damaged": Case({"accumulate": 2}, damaged=True, sections={"data": ALLOWED}),
    "damaged_balance": Case({}, damaged=True, sections={"data": ALLOWED | {"order": {"balance": "classes"}}}),
    "damaged_multilabel": Case({"accumulate": 2}, task="multilabel", damaged=True, sections={"data": ALLOWED}),
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
    ours = train(replace(config, name="looped"), loop=True)
    assert_same_runs(ours, theirs)
    assert ours.last["quarantine"] == theirs.last["quarantine"] or not case.damaged


def test_a_second_phase_takes_the_epochs_and_steps_of_the_run(
    manifests: dict[tuple[str, bool], Manifest], tmp_path: Path
) -> None:
    second = {"name": "second", "max_steps": 5}
    config = config_of(manifests["multiclass", True], tmp_path, {}, second, head={"dropout": 0.5}, data=ALLOWED)
    assert_same_runs(train(replace(config, name="looped"), loop=True), train(config, loop=False))


@pytest.mark.parametrize("loops", [(True, True), (True, False), (False, True)], ids=str)
def test_a_stopped_phase_goes_on_to_the_same_bits_by_loop_or_trainer(
    loops: tuple[bool, bool], manifests: dict[tuple[str, bool], Manifest], tmp_path: Path
) -> None:
    row = {"ema_decay": 0.7, "restore_best": True, "schedule": "warmup_cosine", "mixup": 0.5}
    dropout = {"dropout": 0.3}
    config = config_of(manifests["multiclass", True], tmp_path, row, head=dropout, data=ALLOWED)
    straight = train(replace(config, name="straight"), loop=True)
    stopped(config, 5, loop=loops[0])  # in the second epoch of 4 steps
    assert_same_runs(train(config, loop=loops[1]), straight)


@pytest.mark.parametrize("stretch_bytes", [1, 2 * 7 * 3 * SIZE**2 * 4, 2**28])
def test_an_epoch_may_be_gathered_in_parts(
    stretch_bytes: int, manifests: dict[tuple[str, bool], Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one step, of two, and the whole; what is gathered is counted as waiting for data."""
    config = config_of(manifests["multiclass", True], tmp_path, {}, data=ALLOWED)
    whole = train(replace(config, name="whole"), loop=True)
    gathered: list[int] = []
    gather = Features.gather

    def noted(self: Features, rows: Rows, which: NDArray[np.int64]) -> Tensor:
        gathered.append(len(rows))
        return gather(self, rows, which)

    monkeypatch.setattr(Features, "gather", noted)
    monkeypatch.setattr(features_module, "STRETCH_BYTES", stretch_bytes)
    left = train(config, loop=True)
    assert_same_runs(left, whole)
    assert gathered == {1: [7, 7, 7, 3], 2**28: [24]}.get(stretch_bytes, [14, 10]) * 3
    assert 0 < left.results[0].data_wait_share < 1


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ({"every_minutes": None}, [6]),
        ({"every_minutes": None, "every_steps": 5}, [5, 6]),
        ({"every_minutes": 1e-9}, [1, 2, 3, 4, 5, 6]),
    ],
    ids=str,
)
def test_checkpoints_fall_on_steps_minutes_and_the_end_but_not_on_epochs(
    checkpoint: dict[str, Any],
    expected: list[int],
    manifests: dict[tuple[str, bool], Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved: list[int] = []
    best: list[int] = []
    write, write_best = PhaseFiles.write_last, PhaseFiles.write_best

    def noted(self: PhaseFiles, state: dict[str, Any], best_step: int | None) -> None:
        saved.append(state["step"])
        write(self, state, best_step)
        assert best_step is None or len(self.read_best(best_step)) == len(state["network"])

    def noted_best(self: PhaseFiles, weights: dict[str, Tensor], step: int) -> None:
        best.append(step)
        write_best(self, weights, step)

    monkeypatch.setattr(PhaseFiles, "write_last", noted)
    monkeypatch.setattr(PhaseFiles, "write_best", noted_best)
    row = {"max_steps": 6, "validate_every_steps": 1, "restore_best": True}
    left = train(config_of(manifests["multiclass", False], tmp_path, row, checkpoint=checkpoint), loop=True)
    assert saved == expected
    losses = [float(each["val/loss"]) for each in left.rows]
    improved = [step for step in range(1, 7) if losses[step - 1] == min(losses[:step])]
    assert len(improved) > 2 and best == sorted({max(i for i in improved if i <= step) for step in saved})


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [3, 6, 11])
def test_a_killed_phase_goes_on_from_the_last_of_its_checkpoints_to_the_same_bits(
    killed_at: int, manifests: dict[tuple[str, bool], Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 steps, with checkpoints at the 5th and 10th: from the start, and from each of them; those of a Trainer."""
    row = {"ema_decay": 0.7, "restore_best": True, "validate_every_steps": 1, "schedule": "warmup_cosine", **SGD}
    config = config_of(manifests["multiclass", False], tmp_path, row | {"lr": 3.0}, checkpoint={"every_steps": 5})
    straight = train(replace(config, name="straight"), loop=False)
    took = Steps.take

    def take(steps: Steps, *arguments: Any, **more: Any) -> None:
        took(steps, *arguments, **more)
        if steps.step == killed_at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "take", take)
        with pytest.raises(Killed):
            train(config, loop=True)
    last = PhaseFiles(config.run_dir / "checkpoints" / "head").read_last()
    assert (last["step"] if last else 0) == killed_at // 5 * 5
    left = train(config, loop=True)
    assert_same_runs(left, straight)
    runs = (config.run_dir, tmp_path / "straight")
    assert_same(*(load_file(run / "checkpoints" / "head" / "best.safetensors") for run in runs))


def test_a_phase_that_takes_a_while_shows_a_bar_and_a_brief_one_none(
    manifests: dict[tuple[str, bool], Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the steps that are left, with their rate and the loss of the curves; a table of many heads stands apart."""
    row = {"lr": None, "heads": {"lr": [0.1, 0.01]}}
    config = config_of(manifests["multiclass", False], tmp_path, row, checkpoint={"every_steps": 5})
    config = replace(config, trainer=replace(config.trainer, progress=True))
    train(replace(config, name="brief"), loop=True)
    assert "phase head" not in capsys.readouterr().err
    monkeypatch.setattr("lit_transfer.phases.head_loop.BAR_AFTER_S", 0.0)
    stopped(config, 7, loop=True)
    capsys.readouterr()
    left = train(config, loop=True)
    shown = capsys.readouterr()
    bar = shown.err.rstrip().split("\r")[-1]
    loss = float([each["train/loss"] for each in left.rows if each["train/loss"]][-1])
    assert "phase head: 100%" in bar and " 5/5 " in bar and "step/s" in bar and f"loss={loss:.3f}" in bar
    assert "\nphase head: 2 heads by val/loss; all stand in heads.json\n" in shown.out


def test_minutes_end_a_phase_at_a_step_which_is_validated(
    manifests: dict[tuple[str, bool], Manifest], tmp_path: Path
) -> None:
    left = train(config_of(manifests["multiclass", False], tmp_path, {"max_minutes": 1e-6}), loop=True)
    assert (left.results[0].steps, left.results[0].reason) == (1, "max_minutes 1e-06 reached")
    assert [row["step"] for row in left.rows if row["val/loss"]] == ["1"]


@pytest.mark.parametrize("every_steps", [None, 2])
def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved_that_came_of_it(
    every_steps: int | None, manifests: dict[tuple[str, bool], Manifest], tmp_path: Path
) -> None:
    """It is looked at where the curves have a row, as at the end of an epoch of 4 steps, and before a checkpoint."""
    wild = {"optimizer": "sgd", "lr": 1e30, "max_epochs": 2}
    checkpoint = {"every_minutes": None, "every_steps": every_steps}
    config = config_of(manifests["regression", False], tmp_path, wild, checkpoint=checkpoint)
    job, plans = prepared(replace(config, trainer=replace(config.trainer, log_every_steps=5)))
    said = r"^train/loss is (inf|nan) at step [12]; lower the phase's learning rates\.$"
    with looped(job), pytest.raises(LossNotFinite, match=said):
        run_phases(job, plans)
    assert PhaseFiles(config.run_dir / "checkpoints" / "head").read_last() is None
    assert not (config.run_dir / "metrics.csv").exists()


def test_too_many_damaged_samples_end_the_run(manifests: dict[tuple[str, bool], Manifest], tmp_path: Path) -> None:
    for fraction, said in ((0.1, "3 of the 24 samples of data.train"), (0.2, "")):
        config = config_of(
            manifests["multiclass", True], tmp_path, {}, name=f"bad{fraction}", data={"max_bad_fraction": fraction}
        )
        if said:
            with pytest.raises(UserError, match=said):
                train(config, loop=True)
        else:
            train(config, loop=True)


def two_views(job: Job) -> Features:
    plain = features_of(job, "train")
    assert plain is not None
    other = (plain.views[0] * 2).half()
    return replace(plain, views=(plain.views[0], other), view_of=lambda epoch, rows: (rows + epoch) % 2)


def test_each_row_takes_its_view_and_a_stand_in_that_of_the_row_it_stands_for(
    manifests: dict[tuple[str, bool], Manifest], tmp_path: Path
) -> None:
    manifest = manifests["multiclass", True]
    job, _ = prepared(config_of(manifest, tmp_path, {}))
    features = two_views(job)
    rows = features.samples.rows
    (stretch, later) = stretches(features, Order(), seed=0, global_batch=7, steps=range(2, 8), parts=2, first_epoch=3)
    assert (stretch.epoch, later.epoch, len(stretch.damaged), len(later.damaged)) == (3, 4, 2, 4)
    sampler = TrainSampler(features.samples, seed=0, global_batch=7, steps=range(4, 8), parts=2, first_epoch=3)
    planned = np.concatenate([batch.rows for batch in sampler])
    bad = rows[list(features.damaged)]
    stood_in = 0
    got_features = torch.cat([part.features for part in later.parts])
    got_targets = torch.cat([part.targets for part in later.parts])
    for row, got, target in zip(planned, got_features, got_targets, strict=True):
        if row == PADDING:
            continue
        used = row
        for attempt in range(1, SUBSTITUTES):
            if used not in bad:
                break
            used = features.samples.stand_in(int(row), "none", 0, 4, attempt)
        stood_in += used != row
        view = features.views[(row + 4) % 2]
        assert torch.equal(got, view[int(np.searchsorted(rows, used))].float())
        assert target == features.samples.targets[used]
    assert stood_in == sum(later.damaged) == len(bad) == 3


def test_where_all_that_could_stand_in_is_damaged_the_run_ends(
    manifests: dict[tuple[str, bool], Manifest], tmp_path: Path
) -> None:
    job, _ = prepared(config_of(manifests["multiclass", False], tmp_path, {}))
    features = two_views(job)
    features = replace(features, damaged=frozenset(range(24)))
    with pytest.raises(UserError, match="and 9 others that could stand in for it are damaged; run `lit-transfer pre"):
        next(stretches(features, Order(), seed=0, global_batch=7, steps=range(8), parts=1, first_epoch=0))


def test_what_no_loop_can_train_and_what_only_a_loop_can(
    manifests: dict[tuple[str, bool], Manifest], tmp_path: Path
) -> None:
    job, (plan,) = prepared(config_of(manifests["multiclass", False], tmp_path, {}))
    phase, network = plan.phase, job.network
    assert why_not_looped(phase, network) is None
    assert why_not_looped(replace(phase, cutmix=0.5), network) == "cutmix cuts pictures"
    assert why_not_looped(replace(phase, compile=True), network) == "compile asks for a compiled head"
    network.first_trained = 0
    assert why_not_looped(phase, network) == "stages train, too"
    require_features(phase, "no room")
    with pytest.raises(UserError, match=r"^phase 'head': heads trains on stored .* \(no room\); set activations.store"):
        require_features(replace(phase, heads=Heads(seeds=[0, 1])), "no room")
