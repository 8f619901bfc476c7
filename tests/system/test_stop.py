"""A signal in the middle of an epoch, then the same command again: the result of an uninterrupted run, to the bit.

SIGKILL at chosen moments is in test_kill.py; here it ends two ranks and their workers at once.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from digits import digits
from safetensors.torch import load_file

PHASES = [
    {"name": "head", "train": "head", "max_epochs": 3, "lr": 0.01, "global_batch": 8},
    {
        "name": "thaw",
        "train": {"from": "blocks.3"},
        "max_epochs": 3,
        "lr": 0.003,
        "backbone_lr": 0.001,
        "global_batch": 8,
        "schedule": "warmup_cosine",
        "warmup_steps": 2,
        "restore_best": True,
    },
]
TIMING = ["images_per_s", "data_wait_share"]


def command(file: Path) -> list[str]:
    return [sys.executable, "-m", "lit_transfer.launch.train", "--config", str(file)]


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    return clean | {"OMP_NUM_THREADS": "1"}


def config(folder: Path, manifest: Path, name: str, ranks: int, workers: int = 0) -> Path:
    streams = {split: {"manifest": str(manifest), "split": split} for split in ("train", "val", "test")}
    plain = {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "data": {**streams, "workers": workers},
        "image": {"size": 32, "crop": 0.9},
        "augment": {"flip_h": 0.5, "rotate_degrees": 10},
        "model": {
            "backbone": "timm/test_efficientnet",
            "weights": "none",
            "head": {"hidden": [8], "dropout": 0.3},
        },
        "phases": PHASES,
        "trainer": {
            "accelerator": "cpu",
            "devices": ranks,
            "deterministic": True,
            "log_every_steps": 1,
            "progress": False,
        },
        "tracking": {"wandb": "off"},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(plain))
    return file


def finish(file: Path) -> str:
    done = subprocess.run(command(file), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stop(file: Path, run: Path, phase: str, rows: int, number: signal.Signals) -> tuple[int, str]:
    """Start the command, signal its process group, as a terminal does, once a phase has written so many rows; wait."""
    process = subprocess.Popen(
        command(file),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        metrics = run / "metrics.csv"
        if metrics.is_file() and metrics.read_text().count(f"\n{phase},") >= rows:
            os.killpg(process.pid, number)
            break
        time.sleep(0.005)
    output, _ = process.communicate(timeout=100)
    return process.returncode, output


@pytest.mark.parametrize(
    ("phase", "rows", "number", "ranks", "workers"),
    [
        ("thaw", 5, signal.SIGINT, 1, 1),
        ("thaw", 4, signal.SIGTERM, 2, 1),
        pytest.param("thaw", 5, signal.SIGKILL, 2, 1, marks=pytest.mark.full),
        pytest.param("head", 4, signal.SIGKILL, 2, 0, marks=pytest.mark.full),
        *(
            pytest.param(phase, rows, number, 1, workers, marks=pytest.mark.full)
            for phase, rows in (("head", 1), ("head", 5), ("thaw", 1), ("thaw", 8))
            for number, workers in ((signal.SIGINT, 0), (signal.SIGTERM, 1))
        ),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_result(
    tmp_path: Path, phase: str, rows: int, number: signal.Signals, ranks: int, workers: int
) -> None:
    manifest = digits(tmp_path / "digits").path
    straight, stopped = (config(tmp_path, manifest, name, ranks, workers) for name in ("straight", "stopped"))
    finish(straight)
    run, reference = tmp_path / "runs" / "stopped", tmp_path / "runs" / "straight"

    status, output = stop(stopped, run, phase, rows, number)
    assert "Traceback" not in output
    assert not (run / "summary.json").exists()
    told = finish(stopped)
    if number == signal.SIGKILL:  # the last whole epoch is what is left
        assert status == -signal.SIGKILL
    else:  # the very step is
        assert status == 130, output
        assert "the same command continues" in output
        done = [int(count) for count in re.findall(rf"phase {phase} goes on from step (\d+) of", told)]
        assert (done and done[0] >= rows) or f"phase {phase} ended" in output

    for name in ("head", "thaw"):
        ours, theirs = (load_file(r / "checkpoints" / name / "final.safetensors") for r in (run, reference))
        assert [key for key in ours if not ours[key].equal(theirs[key])] == []
    curves = [pd.read_csv(r / "metrics.csv").drop(columns=TIMING) for r in (run, reference)]
    pd.testing.assert_frame_equal(*curves, check_exact=True, check_like=True)


def test_a_finished_run_prints_its_summary_again_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    file = config(tmp_path, digits(tmp_path / "digits").path, "once", 1)
    first = finish(file)
    summary = tmp_path / "runs" / "once" / "summary.json"
    written = summary.stat().st_mtime_ns
    assert finish(file).splitlines()[-3:] == first.splitlines()[-3:]
    assert summary.stat().st_mtime_ns == written

    changed = [*command(file), "--phases.0.lr", "0.02"]
    done = subprocess.run(changed, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "phases[0].lr: 0.01 -> 0.02" in done.stderr
    assert "Traceback" not in done.stderr
