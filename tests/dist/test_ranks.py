"""What must hold on several ranks: two gloo processes, different data on each, real subprocesses.

24 samples in batches of 7 leave padded places on rank 1, and in batches of 23 a step in which it has no sample.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from digits import digits
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")
State = dict[str, torch.Tensor]


def phase(name: str, train: object, batch: int, **settings: Any) -> dict[str, Any]:
    rates = {"lr": 0.005} | ({} if train == "head" else {"backbone_lr": 0.001})
    return {"name": name, "train": train, "max_epochs": 1, "global_batch": batch} | rates | settings


FROM_3 = {"from": "blocks.3"}
COSINE = {"schedule": "warmup_cosine", "warmup_steps": 1, "weight_decay": 0.01}


@dataclass(frozen=True)
class Case:
    """A run: its phases, and what else is special about it."""

    phases: list[dict[str, Any]]
    task: str = "multiclass"
    val: bool = True
    changes: dict[str, Any] = field(default_factory=dict)


CASES = {
    "freeze_thaw": Case(
        [
            phase("head", "head", 7, max_epochs=2),
            phase("thaw", FROM_3, 23, max_epochs=2, **COSINE),
            phase("all", "all", 7, optimizer="sgd"),
        ]
    ),
    "missing_labels": Case([phase("head", "head", 7), phase("thaw", FROM_3, 7)], task="multilabel"),
    "bf16": Case(
        [phase("head", "head", 7), phase("thaw", FROM_3, 23)], changes={"trainer": {"precision": "bf16-mixed"}}
    ),
    "scratch": Case([phase("all", "all", 10, norm="batch", max_epochs=2)], val=False),
}
FROZEN = {
    "head": ("backbone.",),
    "thaw": ("backbone.net.conv_stem", "backbone.net.bn1", *(f"backbone.net.blocks.{i}." for i in range(3))),
    "all": (),
}


def config(case: Case, manifest: Path, folder: Path, ranks: int) -> Path:
    """A small real run of a network with BatchNorm; augmentation on, sample weights on."""
    splits = ("train", "val") if case.val else ("train",)
    trainer = {"accelerator": "cpu", "devices": ranks, "progress": False, "deterministic": True}
    plain = {
        "name": f"ranks{ranks}",
        "runs_dir": str(folder),
        "data": {**{split: {"manifest": str(manifest), "split": split} for split in splits}, "workers": 0},
        "image": {"size": 32, "crop": 0.9},
        "augment": {"flip_h": 0.5, "rotate_degrees": 10, "brightness": 0.2},
        "model": {"backbone": "timm/test_efficientnet", "weights": "none"},
        "phases": case.phases,
        "trainer": trainer | case.changes.get("trainer", {}),
        "tracking": {"wandb": "off"},
    }
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


@pytest.fixture(scope="module", params=list(CASES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """The same run on one rank and on two; folders `1` and `2` hold each rank's weights after each phase."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp(request.param)
    manifest = digits(folder / "digits", task=case.task, weighted=True).path
    for ranks in (1, 2):
        train(config(case, manifest, folder, ranks), folder / str(ranks))
    return case, folder


def test_ranks_are_equal_to_the_bit_after_every_phase(trained: tuple[Case, Path]) -> None:
    case, folder = trained
    for row in case.phases:
        ranks = [load_file(folder / "2" / f"{row['name']}-{rank}.safetensors") for rank in (0, 1)]
        assert differing(*ranks) == []


def test_each_phase_moves_what_it_trains_and_nothing_else_by_a_bit(trained: tuple[Case, Path]) -> None:
    case, folder = trained
    before = load_file(folder / "2" / "start-0.safetensors")
    for row in case.phases:
        after = load_file(folder / "2" / f"{row['name']}-0.safetensors")
        moved = set(differing(before, after))
        statistics = {name for name in after if "running" in name or "num_batches" in name}
        trains = {name for name in after if not name.startswith(FROZEN[row["name"]])} - statistics
        assert trains <= moved
        assert moved <= (trains | statistics if row.get("norm") == "batch" else trains)
        before = after


def test_one_rank_and_two_give_the_same_weights(trained: tuple[Case, Path]) -> None:
    case, folder = trained
    exact = not case.changes and "norm" not in case.phases[0]
    # In bf16, and with BatchNorm over half a batch, ranks round and normalise apart: near, but not the same.
    tolerance = 1e-5 if exact else 0.05
    for row in case.phases:
        one, two = (load_file(folder / str(ranks) / f"{row['name']}-0.safetensors") for ranks in (1, 2))
        for name in one:
            if exact or "running" not in name:
                torch.testing.assert_close(
                    one[name], two[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
                )
