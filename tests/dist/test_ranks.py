"""What must hold on several ranks: two gloo processes, different data on each, real subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from digits import digits
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")
PHASES = {
    "freeze_thaw": [
        {"name": "head", "train": "head", "max_epochs": 2, "lr": 0.01, "global_batch": 10},
        {
            "name": "thaw",
            "train": {"from": "blocks.3"},
            "max_epochs": 2,
            "lr": 0.003,
            "backbone_lr": 0.001,
            "global_batch": 10,
            "schedule": "warmup_cosine",
            "warmup_steps": 2,
            "weight_decay": 0.01,
        },
        {
            "name": "all",
            "train": "all",
            "max_epochs": 1,
            "lr": 0.003,
            "backbone_lr": 0.001,
            "global_batch": 10,
            "optimizer": "sgd",
        },
    ],
    "scratch": [
        {
            "name": "scratch",
            "train": "all",
            "max_epochs": 2,
            "lr": 0.003,
            "backbone_lr": 0.003,
            "global_batch": 10,
            "norm": "batch",
        }
    ],
}

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 digits; 24 to train on, so the last of three batches of 10 has 4 rows."""
    return digits(tmp_path_factory.mktemp("digits") / "data").path


def config(manifest: Path, folder: Path, phases: str, ranks: int, **changes: Any) -> Path:
    """A small real run: a network with BatchNorm and drop-out of nothing, augmentation on."""
    streams = {name: {"manifest": str(manifest), "split": name} for name in ("train", "val")}
    plain = {
        "name": f"ranks{ranks}",
        "runs_dir": str(folder),
        "data": {**streams, "workers": 0},
        "image": {"size": 32, "crop": 0.9},
        "augment": {"flip_h": 0.5, "rotate_degrees": 10, "brightness": 0.2},
        "model": {"backbone": "timm/test_efficientnet", "weights": "none"},
        "phases": PHASES[phases],
        "trainer": {"accelerator": "cpu", "devices": ranks, "progress": False, "deterministic": True},
        "tracking": {"wandb": "off"},
    } | changes
    file = folder / f"ranks{ranks}.yaml"
    file.write_text(yaml.safe_dump(plain))
    return file


def train(file: Path, folder: Path) -> None:
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(file), str(folder)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def differing(a: State, b: State) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module", params=list(PHASES))
def trained(request: pytest.FixtureRequest, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The same run on one rank and on two; folders `1` and `2` hold each rank's weights after each phase."""
    folder = tmp_path_factory.mktemp(request.param)
    for ranks in (1, 2):
        train(config(manifest, folder, request.param, ranks), folder / str(ranks))
    return request.param, folder


def test_ranks_are_equal_to_the_bit_after_every_phase(trained: tuple[str, Path]) -> None:
    phases, folder = trained
    for phase in PHASES[phases]:
        ranks = [load_file(folder / "2" / f"{phase['name']}-{rank}.safetensors") for rank in (0, 1)]
        assert differing(*ranks) == []


def test_each_phase_moves_what_it_trains_and_nothing_else_by_a_bit(trained: tuple[str, Path]) -> None:
    phases, folder = trained
    before = load_file(folder / "2" / "start-0.safetensors")
    frozen = {"head": ("backbone.",), "thaw": tuple(f"backbone.net.blocks.{i}." for i in (0, 1, 2)) + ("backbone.net.conv_stem", "backbone.net.bn1")}
    for phase in PHASES[phases]:
        after = load_file(folder / "2" / f"{phase['name']}-0.safetensors")
        moved = differing(before, after)
        parameters = [name for name in after if "running" not in name and "num_batches" not in name]
        trains = [name for name in parameters if not name.startswith(frozen.get(phase["name"], ("none",)))]
        assert set(trains) <= set(moved)
        statistics = phase.get("norm") == "batch"
        assert set(moved) <= set(trains) | ({n for n in after if n not in parameters} if statistics else set())
        before = after


def test_one_rank_and_two_give_the_same_weights(trained: tuple[str, Path]) -> None:
    phases, folder = trained
    if phases == "scratch":  # BatchNorm over half a batch is another function; only running it is compared
        assert load_file(folder / "1" / "scratch-0.safetensors").keys()
        return
    for phase in PHASES[phases]:
        one, two = (load_file(folder / str(ranks) / f"{phase['name']}-0.safetensors") for ranks in (1, 2))
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
