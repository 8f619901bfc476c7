"""A run that is killed in mid-epoch goes on with another number of ranks: every sample of the plan, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from digits import digits
from ranks import write_config

from lit_transfer.config import Data, Stream
from lit_transfer.data.samplers import TrainSampler
from lit_transfer.data.streams import open_streams
from lit_transfer.data.plan import PADDING

WORKER = Path(__file__).with_name("resume_worker.py")
STEPS, BATCH = 12, 7


def attempt(file: Path, ranks: int, seen: Path, kill_at: int) -> int:
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    process = subprocess.run(
        [sys.executable, str(WORKER), str(file), str(ranks), str(seen), str(kill_at)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
        check=False,
    )
    assert process.returncode in (0, -signal.SIGKILL), process.stdout + process.stderr
    return process.returncode


@pytest.mark.parametrize(
    "attempts",
    [
        [(2, 5), (1, -1)],
        pytest.param([(4, 3), (2, 6), (3, 10), (1, -1)], marks=pytest.mark.full("worlds")),
        pytest.param([(1, 2), (3, 7), (2, -1)], marks=pytest.mark.full("worlds")),
    ],
    ids=lambda attempts: "-".join(str(ranks) for ranks, _ in attempts),
)
def test_the_samples_of_each_step_are_those_of_the_plan(tmp_path: Path, attempts: list[tuple[int, int]]) -> None:
    manifest = digits(tmp_path / "digits")
    phases = [{"name": "head", "max_epochs": 3, "lr": 0.01, "global_batch": BATCH}]
    file = write_config(tmp_path, "worlds", manifest.path, 1, phases, checkpoint={"every_steps": 1})
    steps: dict[int, dict[int, list[int]]] = {}
    for number, (ranks, kill_at) in enumerate(attempts):
        seen = tmp_path / f"seen{number}"
        assert attempt(file, ranks, seen, kill_at) == (-signal.SIGKILL if kill_at >= 0 else 0)
        lines = [
            json.loads(line) for path in tmp_path.glob(f"seen{number}-*") for line in path.read_text().splitlines()
        ]
        assert {rank for _, rank, _ in lines} == set(range(ranks))
        here: dict[int, dict[int, list[int]]] = {}
        for step, rank, rows in lines:
            here.setdefault(step, {})[rank] = rows
        assert number == 0 or min(here) >= attempts[number - 1][1] - 1, "it went on where it was, not anew"
        steps |= {step: rows for step, rows in here.items() if len(rows) == ranks}  # the last word on a step counts
    train = open_streams(Data(train=Stream(manifest=str(manifest.path), split="train")), 0)["train"]
    plan = TrainSampler(train, seed=0, global_batch=BATCH, steps=range(STEPS))
    assert sorted(steps) == list(range(STEPS))
    for step, batch in enumerate(plan):
        together = [row for rank in sorted(steps[step]) for row in steps[step][rank] if row != PADDING]
        assert together == batch.rows.tolist(), step
