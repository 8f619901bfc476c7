"""Real runs on one rank or on two gloo ranks in subprocesses, and what each rank held at each boundary of phases.

A process starts in seconds and a tiny run takes less, so one process trains many configs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")
State = dict[str, torch.Tensor]


class Left:
    """What the ranks of a run left; phases are counted from 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def plans(self) -> list[dict[str, Any]]:
        """Of each phase its name, what it trains and the like (`worker.py: summary`)."""
        plans: list[dict[str, Any]] = json.loads((self.folder / "plans.json").read_text())
        return plans

    def network(self, phase: int, rank: int = 0) -> State:
        """Parameters and buffers as a phase found them; for the number of phases, as the run left them."""
        state: State = load_file(self.folder / f"{phase}-{rank}.safetensors")
        return state

    def ema(self, phase: int, rank: int = 0) -> State | None:
        """The average of the weights at the end of a phase's fit; None if it has none."""
        path = self.folder / f"ema-{phase}-{rank}.safetensors"
        return load_file(path) if path.is_file() else None

    def end(self, phase: int, rank: int = 0) -> dict[str, Any]:
        """`step`, `reason`, `drops`, `best` and `noisy`: the sets of parts of the network that were noisy in a step."""
        end: dict[str, Any] = json.loads((self.folder / f"end-{phase}-{rank}.json").read_text())
        return end


def write_config(folder: Path, name: str, manifest: Path, ranks: int, phases: Any, **sections: Any) -> Path:
    """A small real run of a network with BatchNorm, with augmentation; `sections` change those of the config."""
    plain: dict[str, Any] = {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "data": {split: {"manifest": str(manifest), "split": split} for split in ("train", "val")} | {"workers": 0},
        "image": {"size": 32, "crop": 0.9},
        "augment": {"flip_h": 0.5, "rotate_degrees": 10, "brightness": 0.2},
        "model": {"backbone": "timm/test_efficientnet", "weights": "none"},
        "phases": phases,
        "trainer": {"accelerator": "cpu", "devices": ranks, "progress": False, "deterministic": True},
        "tracking": {"wandb": "off"},
    }
    for section, values in sections.items():
        plain[section] = plain.get(section, {}) | values if isinstance(values, dict) else values
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(plain))
    return file


def start(files: Sequence[Path], fault: str = "none", timeout_s: int = 300) -> subprocess.CompletedProcess[str]:
    """Train configs in one process, or one for each rank."""
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    return subprocess.run(
        [sys.executable, str(WORKER), fault, *map(str, files)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def train(files: Sequence[Path], fault: str = "none", timeout_s: int = 300) -> dict[str, Left]:
    """What configs leave that train to their end, by the names of their files."""
    done = start(files, fault, timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return {file.stem: Left(file.with_suffix("")) for file in files}


def differing(a: State, b: State) -> list[str]:
    """Names of the tensors that differ by a bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
