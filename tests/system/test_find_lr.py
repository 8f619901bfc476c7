"""`lit-transfer find-lr`: the steps that training would take, and nothing changed afterwards."""

from __future__ import annotations

import csv
import hashlib
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from digits import digits
from PIL import Image

from lit_transfer.errors import UserError
from lit_transfer.launch import main
from lit_transfer.launch.find_lr import described
from lit_transfer.launch.train import prepare_job, prepare_setup
from lit_transfer.model.module import Stopped
from lit_transfer.phases.job import Setup
from lit_transfer.phases.lr_finder import RangeTest, growing_rates, load_weights_before, range_test, results_before
from lit_transfer.phases.run import run_phases
from lit_transfer.phases.steps import StopSignal
from lit_transfer.phases.table import resolve
from lit_transfer.reading import load
from lit_transfer.schedule import Phase
from lit_transfer.tracking import ENVIRONMENT

SHARED = {"max_epochs": 2, "global_batch": 8, "accumulate": 2, "clip_norm": 0.5, "mixup": 0.4, "label_smoothing": 0.1}
PHASES = [
    {"name": "head", "lr": 0.02, "optimizer": "sgd"} | SHARED,
    {"name": "thaw", "train": {"last": 2}, "lr": 0.004, "backbone_lr": 0.001, "layer_decay": 0.5, "norm": "batch"}
    | SHARED,
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config of two phases that use whatever decides a step."""
    manifest = digits(tmp_path / "digits")
    plain = {
        "name": "run",
        "runs_dir": str(tmp_path / "runs"),
        "data": {split: {"manifest": str(manifest.path), "split": split} for split in ("train", "val")}
        | {"workers": 0},
        "image": {"size": 32, "crop": 0.9},
        "augment": {"flip_h": 0.5, "rotate_degrees": 10, "brightness": 0.2},
        "model": {"backbone": "timm/test_resnet", "weights": "none", "head": {"hidden": [8], "dropout": 0.2}},
        "phases": PHASES,
        "trainer": {"accelerator": "cpu", "log_every_steps": 1, "progress": False},
        "tracking": {"wandb": "off"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    return tmp_path / "run.yaml"


@pytest.fixture
def trained(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config, and its run with both phases done."""
    job, plans = prepare_job(load(file))
    monkeypatch.delenv(ENVIRONMENT)
    run_phases(job, plans)
    return file


def losses_of(run: Path, phase: str) -> list[str]:
    with (run / "metrics.csv").open(newline="") as rows:
        return [row["train/loss"] for row in csv.DictReader(rows) if row["phase"] == phase and row["train/loss"]]


def contents(folder: Path) -> dict[Path, str]:
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def state_of(setup: Setup) -> dict[str, Any]:
    """Whatever a test could leave changed: tensors, what trains, modes, and the global random states."""
    network = setup.network
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "trains": {name: p.requires_grad for name, p in network.named_parameters()},
        "gradients": [name for name, p in network.named_parameters() if p.grad is not None],
        "modes": {name: m.training for name, m in network.named_modules()},
        "random": [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()],  # type: ignore[union-attr]
    }


@pytest.mark.parametrize("index", [0, 1])
def test_each_step_is_that_of_training(trained: Path, index: int) -> None:
    """At the rates of the plan a range test is the phase itself: batches, weights, augmentation, dropout, mixup."""
    config = load(trained)
    setup, plans = prepare_setup(config)
    record = yaml.safe_load((config.run_dir / "run.json").read_text())["fingerprint"]
    marks = record | {"phases": record["phases"][:index]}
    before = results_before(config.run_dir, plans[:index], marks)
    load_weights_before(setup, config.run_dir, before)
    rate = plans[index].phase.lr
    assert rate is not None
    test = range_test(setup, plans[index], before, [rate] * plans[index].max_steps)
    assert [f"{loss:.6g}" for loss in test.losses] == losses_of(config.run_dir, plans[index].phase.name)
    assert len(test.losses) == 6 and test.axis == "head" and test.planned == rate


@pytest.mark.parametrize("rates", [growing_rates(1e-4, 10, 20), [1e30] * 20], ids=["grows", "breaks"])
def test_nothing_is_changed(file: Path, rates: list[float]) -> None:
    setup, plans = prepare_setup(load(file))
    before = state_of(setup)
    test = range_test(setup, plans[1], [], rates)
    assert 0 < len(test.losses) < 20 or rates[0] < 1
    after = state_of(setup)
    assert before["tensors"].keys() == after["tensors"].keys()
    assert all(torch.equal(tensor, after["tensors"][name]) for name, tensor in before["tensors"].items())
    assert all(before[key] == after[key] for key in ("trains", "gradients", "modes", "random"))
    assert not (file.parent / "runs").exists()


def test_it_ends_where_the_loss_grows_too_large_or_is_no_number(file: Path) -> None:
    setup, plans = prepare_setup(load(file))
    test = range_test(setup, plans[1], [], growing_rates(1e-3, 1e6, 40))
    assert 4 < len(test.losses) < 40
    lowest = min(test.smoothed[4:])
    assert test.smoothed[-1] > 4 * lowest and all(loss <= 4 * lowest for loss in test.smoothed[4:-1])
    assert len(range_test(setup, plans[1], [], [1e30] * 20).losses) < 20


def test_the_command_prints_rates_for_the_config(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load(trained).run_dir
    before = contents(run)
    common = ["find-lr", "--config", str(trained), "--steps", "30", "--from", "1e-5", "--to", "100"]
    changed = ["--phases.1.lr", "0.01", "--phases.1.optimizer", "sgd", "--phases.1.mixup", "0"]
    assert main([*common, "--phase", "thaw", *changed]) == 0
    printed = capsys.readouterr()
    picture = run.parent / "run_thaw_lr.png"
    assert f"the picture is {picture}" in printed.err
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 600
    first = next(line.split() for line in printed.out.splitlines() if line.startswith("first step"))
    assert first[2:4] == ["1e-05", "1e-06"]
    found = re.search(r"^suggestion +(\S+) +(\S+)", printed.out, flags=re.MULTILINE)
    if found:
        (phase,) = yaml.safe_load(printed.out[printed.out.index("- name") :])
        assert phase == {"name": "thaw", "lr": float(found[1]), "backbone_lr": float(found[2])}
    else:
        assert "no suggestion: the loss does not clearly fall anywhere" in printed.out
    assert contents(run) == before


def test_a_suggestion_is_printed_as_it_stands_in_a_config(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = tuple(growing_rates(1e-6, 10, 70))
    losses = tuple(float(1 / (1 + (rate / 2e-3) ** 1.5)) for rate in rates)
    config = load(file)
    setup, plans = prepare_setup(config)
    test = RangeTest(rates, losses, "head", 0.004, 70)
    text = described(config, plans[1], test)
    (row,) = yaml.safe_load(text[text.index("- name") :])
    assert row["lr"] == pytest.approx(2e-3, rel=0.3) and row["backbone_lr"] == pytest.approx(row["lr"] / 4, rel=0.1)
    assert "70 of 70 steps were done\n" in text and "plan --expand" not in text

    own = {"name": "a", "max_epochs": 1, "train": {"params": {"head/*": 0.004, "stem/*": 4e-4}}}
    other = load(file, ["--phases", yaml.safe_dump([own], default_flow_style=True)])
    (plan,) = resolve(other, setup.network.layout(), 24)
    text = described(other, plan, test)
    (row,) = yaml.safe_load(text[text.index("- name") :])
    assert row["train"]["params"]["head/*"] == pytest.approx(2e-3, rel=0.3)
    assert row["train"]["params"]["stem/*"] == pytest.approx(row["train"]["params"]["head/*"] / 10, rel=0.1)
    assert Phase(**row, max_epochs=1).patterns


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--phase", "thaw"], "phase 'head' is not finished in"),
        (["--phase", "thw"], "--phase 'thw' is not a phase of this config; there are head, thaw. Did you mean 'thaw'?"),
        (["--steps", "5"], "--steps 5 is under 20"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--from", "1", "--to", "0.1"], "--from 1 and --to 0.1 are no range"),
        (["--phases.0.lrr", "1"], "'lrr' is not a key of"),
    ],
)
def test_a_fault_is_one_sentence_and_leaves_nothing(
    file: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["find-lr", "--config", str(file), *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert not (file.parent / "runs").exists()


def test_only_the_tested_phase_may_differ_from_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find-lr", "--config", str(trained), "--phase", "thaw", "--phases.0.lr", "0.5"]) == 2
    assert "holds earlier phases of other settings (phases[0].lr: 0.02 -> 0.5)" in capsys.readouterr().err


def test_a_signal_ends_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopSignal, "__call__", lambda self: True)
    setup, plans = prepare_setup(load(file))
    with pytest.raises(Stopped):
        range_test(setup, plans[0], [], [0.1] * 20)
    assert main(["find-lr", "--config", str(file), "--steps", "20"]) == 130


def test_a_first_loss_that_is_no_number_is_said(file: Path) -> None:
    setup, plans = prepare_setup(load(file))
    with torch.no_grad():
        next(setup.network.head.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"the loss is no number at the first step, at rate 0\.1"):
        range_test(setup, plans[0], [], [0.1] * 20)


def test_two_ranks_see_what_one_sees(file: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    plain = ["--phases.0.mixup", "0", "--model.head.dropout", "0", "--steps", "20", "--from", "1e-3", "--to", "1"]
    printed = []
    for ranks in ("1", "2"):
        command = [sys.executable, "-m", "lit_transfer.launch.find_lr", "--config", str(file), *plain]
        done = subprocess.run(
            [*command, "--trainer.devices", ranks],
            env=clean | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("first step") == 1
        printed.append(done.stdout)
    one, two = ([float(x) for x in re.findall(r" (\d+\.\d+)$", text, flags=re.MULTILINE)] for text in printed)
    assert len(one) >= 3 and one == pytest.approx(two, rel=1e-3)
