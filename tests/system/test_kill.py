"""SIGKILL at a random moment, then the same command: the result of an uninterrupted run, to the bit."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from digits import digits
from safetensors.torch import load_file

from lit_transfer.phases.presets import bit

WORKER = Path(__file__).with_name("kill_worker.py")
SCHEDULES: dict[str, Any] = {
    "freeze_thaw": {
        "preset": "freeze_thaw",
        **{"thaw_from": "blocks.3", "head_epochs": 2, "thaw_epochs": 3, "global_batch": 7},
        **{"ema_decay": 0.9, "validate_every_steps": 3, "restore_best": True, "schedule": "warmup_cosine"},
    },
    "lp_ft": {
        "preset": "lp_ft",
        **{"head_epochs": 2, "tune_epochs": 2, "global_batch": 8, "accumulate": 2, "mixup": 0.4, "clip_norm": 0.5},
    },
    "gradual": {"preset": "gradual", "down_to": "blocks.4", "last_epochs": 2, "global_batch": 10, "optimizer": "sgd"},
    "fastai": {"preset": "fastai", "epochs": 3, "global_batch": 9, "cutmix": 1.0, "ema_decay": 0.5},
    "plateau": [
        {"name": "head", "max_steps": 11, "lr": 0.01, "global_batch": 6, "validate_every_steps": 2}
        | {"schedule": "plateau", "schedule_args": {"patience": 1}},
        {"name": "tune", "train": "all", "max_epochs": 4, "lr": 0.01, "backbone_lr": 0.001, "global_batch": 8}
        | {"until": {"metric": "val/loss", "patience": 2}, "validate_every_steps": 2, "restore_best": True},
    ],
    "scratch": {"preset": "scratch", "epochs": 3, "global_batch": 8, "ema_decay": 0.8},
    "surgical": {
        "preset": "surgical",
        **{"stage": "blocks.2", "head_epochs": 2, "stage_epochs": 2, "global_batch": 7, "weight_decay": 0.1},
        **{"validate_every_steps": 2, "restore_best": True},
    },
    "norm_only": {"preset": "norm_only", "epochs": 3, "global_batch": 10, "norm": "batch", "validate_every_steps": 2},
    "bit": [
        row | {"max_steps": 9, "warmup_steps": 3}  # the preset's own length is 500
        for row in bit(samples=24, global_batch=32, mixup=0.1, validate_every_steps=2)
    ],
}
PHASES = {
    "freeze_thaw": ("head", "thaw"),
    "lp_ft": ("head", "tune"),
    "gradual": ("head", "thaw_1", "thaw_2"),
    "fastai": ("head", "thaw"),
    "plateau": ("head", "tune"),
    "scratch": ("scratch",),
    "surgical": ("head", "stage"),
    "norm_only": ("norms",),
    "bit": ("tune",),
}
MOMENTS = {"train": 5, "backward": 5, "validation": 2, "last": 2, "best": 1, "final": 1, "between": 1}
"""Where a run is killed, and how often that comes at least in any phase: the count is drawn below it."""
DRAWS = 40
TIMING = {"images_per_s", "data_wait_share"}


def draws() -> list[tuple[str, str, str, int]]:
    """Schedule, moment, phase and count of each draw: every schedule and every moment several times."""
    chance = random.Random(3)
    found = []
    for number in range(DRAWS):
        schedule = list(SCHEDULES)[number % len(SCHEDULES)]
        moment = list(MOMENTS)[number % len(MOMENTS)]
        found.append((schedule, moment, chance.choice(PHASES[schedule]), chance.randrange(MOMENTS[moment])))
    return found


def config(folder: Path, manifest: Path, schedule: str, name: str) -> str:
    streams = {split: {"manifest": str(manifest), "split": split} for split in ("train", "val", "test")}
    plain = {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "data": {**streams, "workers": 0},
        "image": {"size": 32, "crop": 0.9},
        "augment": {"flip_h": 0.5, "rotate_degrees": 10},
        "model": {"backbone": "timm/test_efficientnet", "weights": "none", "head": {"hidden": [8], "dropout": 0.3}},
        "phases": SCHEDULES[schedule],
        "trainer": {"accelerator": "cpu", "devices": 1, "deterministic": True, "log_every_steps": 1, "progress": False},
        "checkpoint": {"every_steps": 2},
        "tracking": {"wandb": "off"},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(plain))
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are."""
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Path:
    """Their dataset."""
    return digits(folder / "digits").path


def run_jobs(folder: Path, jobs: list[dict[str, Any]]) -> None:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    clean = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(file)],
        env=clean | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def curves(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in TIMING} for row in csv.DictReader(file)]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested containers by their place."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: leaf for key, item in items for place, leaf in flat(item, f"{path}/{key}").items()}
    return {path: value}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for place, value in ours.items():
        same = torch.equal(value, theirs[place]) if isinstance(value, torch.Tensor) else value == theirs[place]
        assert same, f"{place}: {value} is not {theirs[place]}"


def assert_same_run(run: Path, reference: Path, phases: tuple[str, ...]) -> None:
    for phase in phases:
        ours, theirs = (load_file(r / "checkpoints" / phase / "final.safetensors") for r in (run, reference))
        assert_same(ours, theirs)
    states = [torch.load(r / "checkpoints" / phases[-1] / "last.ckpt", weights_only=True) for r in (run, reference)]
    kept = ("step", "reason", "network", "optimizer", "ema", "watches", "drops")
    assert_same(*(flat({key: state[key] for key in kept}) for state in states))
    assert curves(run) == curves(reference)
    results = [json.loads((r / "summary.json").read_text()) for r in (run, reference)]
    assert_same(*({k: v for k, v in r.items() if k.startswith(("test/", "val/", "ended/", "steps/"))} for r in results))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_killed_run_goes_on_to_the_same_result(
    folder: Path, manifest: Path, schedule: str, request: pytest.FixtureRequest
) -> None:
    every = [draw for draw in draws() if draw[0] == schedule]
    whole = request.config.getoption("--full")
    chosen = every if whole else random.Random(os.environ.get("LIT_TRANSFER_TEST_SEED", "0")).sample(every, 1)
    names = [f"{schedule}-{moment}-{phase}-{count}" for _, moment, phase, count in chosen]
    jobs = [{"config": config(folder, manifest, schedule, f"{schedule}-straight"), "moment": None}]
    for name, (_, moment, phase, count) in zip(names, chosen, strict=True):
        jobs.append({"config": config(folder, manifest, schedule, name), "moment": [moment, phase, count]})
    run_jobs(folder, jobs)
    for name in names:
        assert_same_run(folder / "runs" / name, folder / "runs" / f"{schedule}-straight", PHASES[schedule])


def test_the_draws_cover_every_moment_and_schedule() -> None:
    assert len(draws()) >= 20
    assert {moment for _, moment, _, _ in draws()} == set(MOMENTS)
    assert {schedule for schedule, _, _, _ in draws()} == set(SCHEDULES)
