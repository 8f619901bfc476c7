"""What of an earlier start a phase goes on from, also after its settings were changed."""

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
from lit_transfer.phases.resume import load_weights
from lit_transfer.phases.run import run_phases
from lit_transfer.reading import parse, to_plain


def network(value: float) -> nn.Linear:
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, value)
    return net


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
    return killed(manifest, tmp_path, THAW)


def killed(manifest: Manifest, folder: Path, phase: dict[str, Any]) -> Config:
    settings = fine_tuning(manifest, folder, [HEAD, phase])
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
        {"global_batch": 6},
        {"global_batch": 9},  # as many steps an epoch, of other samples
    ],
)
def test_a_phase_that_trains_otherwise_starts_anew(
    config: Config, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    assert_starts_anew(config, THAW | changes, capsys)


def assert_starts_anew(
    config: Config, phase: dict[str, Any], capsys: pytest.CaptureFixture[str], **sections: Any
) -> None:
    """It ends with the weights of a run that had these settings from the start."""
    _, weights = gone_on(config, phase, **sections)
    assert "phase thaw trains otherwise than before, and starts anew" in capsys.readouterr().out
    straight, plans = prepared(replace(fine_tuning_like(config, [HEAD, phase], **sections), name="straight"))
    run_phases(straight, plans)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in straight.network.state_dict().items())


def test_other_parameters_of_the_same_shapes_start_anew(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state of the optimizer would fit, and belong to others."""
    weights, biases = (THAW | {"train": {"params": ["head/*", f"stem/bn1.{name}"]}} for name in ("weight", "bias"))
    config = killed(manifest, tmp_path, weights)
    groups = [
        [(group["name"], len(group["params"])) for group in last(config)["optimizer"]["param_groups"]],
        [(group.name, len(group.parameters)) for group in prepared(replace(config, name="other"))[1][1].groups],
    ]
    assert groups[0] == groups[1]
    assert_starts_anew(config, biases, capsys)


@pytest.mark.parametrize("until", [{}, {"until": {"metric": "val/accuracy", "above": 1.5}}])
def test_another_monitor_starts_anew_where_the_best_weights_count(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], until: dict[str, Any]
) -> None:
    """Those of the steps before were never judged by it, also where it was watched to end the phase."""
    phase = THAW | {"restore_best": True} | until
    assert_starts_anew(killed(manifest, tmp_path, phase), phase, capsys, monitor="val/accuracy")


def test_a_phase_with_others_before_it_starts_anew(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    more = HEAD | {"name": "more", "max_steps": 1, "max_epochs": None}
    job, plans = prepared(fine_tuning_like(config, [HEAD, more, THAW]), allow_changed_plan=True)
    assert [result.steps for result in run_phases(job, plans)] == [3, 1, 6]
    assert "phase thaw trains otherwise than before, and starts anew" in capsys.readouterr().out


def test_finished_phases_in_another_order_are_refused_before_any_work(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    job, plans = prepared(fine_tuning_like(config, [THAW, HEAD]), allow_changed_plan=True)
    before = {name: tensor.clone() for name, tensor in job.network.state_dict().items()}
    capsys.readouterr()
    with pytest.raises(UserError) as caught:
        run_phases(job, plans)
    folder = config.run_dir.absolute() / "checkpoints" / "head"
    assert str(caught.value) == (
        f"phase 'head' was trained after [], but now stands after ['thaw']; remove {folder} to train it again, or put "
        "the phases back in their order."
    )
    assert not capsys.readouterr().out and last(config)["step"] == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.network.state_dict().items())


@pytest.mark.parametrize(
    ("weights", "count", "named"),
    [
        ({"weight": torch.ones(2, 2)}, 1, "bias"),
        ({"weight": torch.ones(2, 2), "bias": torch.ones(2), "more": torch.ones(1)}, 1, "more"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(3)}, 2, "weight, bias"),
        ({"weight": torch.ones(2, 2), "bias": torch.ones(1)}, 1, "bias"),
    ],
)
def test_weights_of_another_network_are_refused_and_none_is_copied(
    weights: dict[str, Tensor], count: int, named: str
) -> None:
    net = network(5)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(net, weights, "runs/a/head")
    assert str(caught.value) == (
        f"runs/a/head holds the weights of another network ({count} tensors differ, such as {named}); put the model "
        "section back as it was, or choose another --name."
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    load_weights(net, network(3).state_dict(), "runs/a/head")
    assert torch.equal(net.weight, network(3).weight)


def test_a_run_of_another_network_is_refused_in_a_sentence(config: Config) -> None:
    model = to_plain(config)["model"] | {"head": {"hidden": [8]}}
    job, plans = prepared(fine_tuning_like(config, [HEAD, THAW], model=model), allow_changed_plan=True)
    with pytest.raises(UserError, match=r"checkpoints/head holds the weights of another network \(\d tensors differ"):
        run_phases(job, plans)


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
