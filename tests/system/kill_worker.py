"""Runs `lit-transfer train`, has it killed at a given moment, and gives the same command again: kill_worker.py JOBS.

JOBS is a JSON list of {"config": FILE, "moment": [NAME, PHASE, COUNT] or null}. Each command runs in a process forked
from this one, which has the imports done and never computes: SIGKILL takes the whole of it, in the middle of what it
does.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lit_transfer.activations import shelf
from lit_transfer.launch import train
from lit_transfer.phases import checkpoint
from lit_transfer.phases.checkpoint import PhaseFiles
from lit_transfer.phases.run import run_phases


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(pl.Callback):
    """Dies at the COUNT-th batch of training, or of validation, that it sees in a phase."""

    def __init__(self, moment: str, phase: str, count: int) -> None:
        self.moment, self.phase, self.left = moment, phase, count

    def _count(self, moment: str, trainer: pl.Trainer) -> None:
        steps = next(c for c in trainer.callbacks if type(c).__name__ == "Steps")
        if moment == self.moment and steps.plan.phase.name == self.phase:
            self.left -= 1
            if self.left < 0:
                die()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._count("train", trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        self._count("backward", trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._count("validation", trainer)


def half_written(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    die()


def die_in_last(phase: str, count: int) -> None:
    """In the middle of the COUNT-th checkpoint of a phase."""
    real, left = torch.save, count

    def save(state: Any, path: Path) -> None:
        nonlocal left
        left -= path.parent.name == phase
        if left >= 0:
            return real(state, path)
        buffer = io.BytesIO()
        real(state, buffer)
        return half_written(path, buffer.getvalue())

    checkpoint.torch.save = save  # type: ignore[attr-defined]


def die_in_best(phase: str, count: int) -> None:
    """In the middle of the COUNT-th file of best weights of a phase."""
    real, left = checkpoint._write_weights, count

    def write(path: Path, network: torch.nn.Module) -> None:
        nonlocal left
        left -= path.parent.name == phase and path.name.startswith("best")
        if left < 0:
            Path.write_bytes = half_written  # type: ignore[assignment,method-assign]
        real(path, network)

    checkpoint._write_weights = write


def die_in_final(phase: str, count: int) -> None:
    """The final weights of a phase are there, its mark is not."""
    real = checkpoint.write_json
    checkpoint.write_json = lambda path, value: die() if path.parent.name == phase else real(path, value)  # type: ignore[attr-defined]


def die_between(phase: str, count: int) -> None:
    """A phase is done, the next has not begun."""
    real: Callable[..., None] = PhaseFiles.finish

    def finish(self: PhaseFiles, *arguments: Any) -> None:
        real(self, *arguments)
        if self.folder.name == phase:
            die()

    PhaseFiles.finish = finish  # type: ignore[method-assign]


def die_in_part(phase: str, count: int) -> None:
    """In the middle of the COUNT-th part of the activation store."""
    real, left = shelf.write_part, count

    def write(path: Path, *arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            real(path, *arguments)
            half_written(path, path.read_bytes())
        real(path, *arguments)

    shelf.write_part = write  # type: ignore[attr-defined]


IN_FILES = {
    **{"last": die_in_last, "best": die_in_best, "final": die_in_final, "between": die_between},
    "part": die_in_part,
}
"""The moments that lie in files; those of `Killer` lie in the batches of a phase."""


def command(config: str, moment: list[Any] | None) -> int:
    """The exit status of the command in a forked process, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        try:
            if moment:
                name, phase, count = moment
                IN_FILES.get(name, lambda *_: None)(phase, count)
                train.run_phases = partial(run_phases, callbacks=[Killer(*moment)])  # type: ignore[attr-defined]
            os._exit(train.main(["--config", config]))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print(f"--- {job}", flush=True)
        if job["moment"]:
            status = command(job["config"], job["moment"])
            assert status == -signal.SIGKILL, f"{job}: was to be killed, but ended with {status}"
        assert command(job["config"], None) == 0, job
