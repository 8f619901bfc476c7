"""The files of a phase, and what of them a run goes on from after its settings were changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from digits import digits, fine_tuning, metric_rows, prepared
from torch import Tensor, nn

from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.errors import UserError
from lit_transfer.phases.checkpoint import PhaseFiles, PhaseResult
from lit_transfer.phases.run import run_phases
from lit_transfer.reading import parse, to_plain

RESULT = PhaseResult("a", 1, 2, 3.0, 4.0, 0.1, 0.2, 5.0, "max_epochs 1 reached")


def network(value: float) -> nn.Linear:
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, value)
    return net


def names(files: PhaseFiles) -> set[str]:
    return {path.name for path in files.folder.iterdir()}


def test_a_write_that_is_interrupted_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = PhaseFiles(tmp_path / "a")
    assert files.read_last() is None
    files.write_last({"step": 1, "weight": torch.ones(3)}, None)

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        files.write_last({"step": 2}, None)
    state = files.read_last()
    assert state is not None and state["step"] == 1 and torch.equal(state["weight"], torch.ones(3))
    assert names(files) == {"last.ckpt"}


def test_best_weights_stay_until_the_checkpoint_names_others(tmp_path: Path) -> None:
    files = PhaseFiles(tmp_path / "a")
    files.write_best(network(1), 3)
    files.write_last({}, 3)
    files.write_best(network(2), 12)
    assert {"best-00000003.safetensors", "best-00000012.safetensors"} <= names(files), "last.ckpt still names step 3"
    files.write_last({}, 12)
    assert names(files) == {"last.ckpt", "best-00000012.safetensors"}
    assert torch.equal(files.read_best(12)["weight"], network(2).weight)


def test_a_finished_phase_leaves_its_final_and_best_weights_and_a_mark(tmp_path: Path) -> None:
    files = PhaseFiles(tmp_path / "a")
    assert files.result() is None
    files.write_best(network(1), 3)
    files.write_last({}, 3)
    files.finish(network(2), RESULT, 3)
    assert names(files) == {"last.ckpt", "best.safetensors", "final.safetensors", "done.json"}
    assert files.result() == RESULT
    assert torch.equal(files.read_final()["weight"], network(2).weight)
    modes = {path.stat().st_mode for path in files.folder.glob("[df]*")}
    assert len(modes) == 1, "who may read one may read the other"
    files.prune()
    assert names(files) == {"best.safetensors", "final.safetensors", "done.json"}


def test_the_mark_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = PhaseFiles(tmp_path / "a")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_transfer.phases.checkpoint.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        files.finish(network(2), RESULT, None)
    assert files.result() is None and names(files) == {"final.safetensors"}


def test_tidying_removes_what_was_left_half_written_and_nothing_else(tmp_path: Path) -> None:
    files = PhaseFiles(tmp_path / "a")
    files.tidy()
    files.write_last({}, None)
    (files.folder / ".last.0123abcd.ckpt").write_bytes(b"half")
    files.tidy()
    assert names(files) == {"last.ckpt"}


class Killed(Exception):
    pass


class KilledAt(pl.Callback):
    """Ends a phase of a run as if its process had died, after a step of that fit."""

    def __init__(self, trained: int, step: int) -> None:
        self.trained, self.step = trained, step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trained = sum(p.requires_grad for p in pl_module.parameters())
        if trained > self.trained and trainer.global_step == self.step:
            raise Killed

    @staticmethod
    def now(*_: object) -> None:
        """Wherever it is called."""
        raise Killed


HEAD = {"name": "head", "max_epochs": 1, "lr": 0.1, "global_batch": 8}
THAW = {"name": "thaw", "train": {"last": 1}, "max_epochs": 2, "lr": 0.01, "backbone_lr": 1e-3, "global_batch": 8}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return digits(tmp_path_factory.mktemp("digits") / "data")


@pytest.fixture
def config(manifest: Manifest, tmp_path: Path) -> Config:
    """A run that was killed at step 5 of the 6 of its second phase; its last checkpoint is that of step 3."""
    settings = fine_tuning(manifest, tmp_path, [HEAD, THAW])
    job, plans = prepared(settings)
    with pytest.raises(Killed):
        run_phases(job, plans, [KilledAt(trained=2, step=5)])
    return settings


def last(config: Config) -> dict[str, Any]:
    state = PhaseFiles(config.run_dir / "checkpoints" / "thaw").read_last()
    assert state is not None
    return state


def gone_on(config: Config, phase: dict[str, Any], **sections: Any) -> tuple[PhaseResult, dict[str, Tensor]]:
    """Change the second phase, and go on: its result, and what the network ends with."""
    changed = fine_tuning_like(config, [HEAD, phase], **sections)
    with pytest.raises(UserError, match="--allow-changed-plan"):
        prepared(changed)
    job, plans = prepared(changed, allow_changed_plan=True)
    return run_phases(job, plans)[1], job.network.state_dict()


def fine_tuning_like(config: Config, phases: list[dict[str, Any]], **sections: Any) -> Config:
    return parse(Config, to_plain(config) | {"phases": phases} | sections)


def test_a_killed_run_goes_on_to_the_bits_of_a_whole_one(config: Config) -> None:
    states = []
    for name in ("tiny", "straight"):
        job, plans = prepared(replace(config, name=name))
        run_phases(job, plans)
        states.append((job.network.state_dict(), last(replace(config, name=name))["optimizer"]["state"]))
    (weights, moments), (straight, straight_moments) = states
    assert all(torch.equal(tensor, straight[name]) for name, tensor in weights.items())
    assert moments.keys() == straight_moments.keys()
    assert all(torch.equal(moments[i][key], value) for i, of in straight_moments.items() for key, value in of.items())


def test_a_phase_that_had_reached_its_end_may_get_longer(manifest: Manifest, tmp_path: Path) -> None:
    config = fine_tuning(manifest, tmp_path, [HEAD, THAW])
    job, plans = prepared(config)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        run_phases(job, plans[:1])
        patch.setattr(PhaseFiles, "finish", KilledAt.now)
        run_phases(job, plans)
    assert last(config)["reason"] == "max_epochs 2 reached"
    result, _ = gone_on(config, THAW | {"max_epochs": 3})
    assert (result.steps, result.reason) == (9, "max_epochs 3 reached")


def test_a_phase_that_got_longer_goes_on(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert last(config)["step"] == 3
    head = config.run_dir / "checkpoints" / "head"
    before = {path.name: path.read_bytes() for path in head.iterdir()}
    result, _ = gone_on(config, THAW | {"max_epochs": 3})
    assert "phase thaw goes on from step 3 of 9 steps" in capsys.readouterr().out
    assert (result.steps, result.epochs, result.reason) == (9, 3, "max_epochs 3 reached")
    before.pop("last.ckpt")  # no later phase needs it
    assert {path.name: path.read_bytes() for path in head.iterdir()} == before, "a finished phase stays"
    assert last(config)["step"] == 9
    record = json.loads((config.run_dir / "run.json").read_text())
    (earlier,) = record["earlier"]
    assert (
        earlier["fingerprint"]["phases"][1]["max_epochs"] == 2 and record["fingerprint"]["phases"][1]["max_epochs"] == 3
    )
    assert "phases[1].max_epochs: 2 -> 3" in earlier["changes"]
    steps = [int(row["step"]) for row in metric_rows(config) if row["phase"] == "thaw"]
    assert steps == list(range(4, 13))


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"last": 2}},
        {"layer_decay": 0.5},
        {"optimizer": "sgd"},
        {"optimizer_args": {"amsgrad": True}},
        {"ema_decay": 0.9},
    ],
)
def test_a_phase_that_trains_otherwise_starts_anew(
    config: Config, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    result, weights = gone_on(config, THAW | changes)
    assert "phase thaw trains otherwise than before, and starts anew" in capsys.readouterr().out
    assert result.steps == 6
    straight, plans = prepared(replace(fine_tuning_like(config, [HEAD, THAW | changes]), name="straight"))
    run_phases(straight, plans)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in straight.network.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"until": {"metric": "val/loss", "patience": 9}},
        {"schedule": "plateau", "schedule_args": {"metric": "val/accuracy"}},
        {"lr": 0.5, "backbone_lr": 0.5},
        {"weight_decay": 0.5},
    ],
)
def test_a_phase_of_which_other_things_changed_goes_on_under_the_new_ones(
    config: Config, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    result, _ = gone_on(config, THAW | changes)
    assert "phase thaw goes on from step 3 of 6 steps" in capsys.readouterr().out
    assert result.steps == 6
    for group in last(config)["optimizer"]["param_groups"]:
        assert group["weight_decay"] == (changes.get("weight_decay", 0.0) if group["name"].endswith("/decay") else 0.0)
        assert "lr" not in changes or group["lr"] == 0.5


def test_another_monitor_starts_to_look_for_the_best_anew(config: Config) -> None:
    assert last(config)["watches"]["monitor"]["metric"] == "val/loss"
    gone_on(config, THAW, monitor="val/accuracy")
    watch = last(config)["watches"]["monitor"]
    assert watch["metric"] == "val/accuracy" and 0 <= watch["best"] <= 1 and watch["best_step"] == 6


def test_a_checkpoint_of_another_run_is_refused(config: Config) -> None:
    path = config.run_dir / "checkpoints" / "thaw" / "last.ckpt"
    torch.save(last(config) | {"identity": "of another run"}, path)
    job, plans = prepared(config)
    with pytest.raises(UserError, match=r"thaw/last\.ckpt is of a run with other settings; remove it, or choose"):
        run_phases(job, plans)
