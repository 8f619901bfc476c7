"""What goes wrong on one rank, planted: each a function that gives the callbacks which do it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch

from lit_transfer.activations import build, shelf
from lit_transfer.activations.costs import Decision
from lit_transfer.activations.shelf import Shelf
from lit_transfer.model import module
from lit_transfer.phases import choice
from lit_transfer.phases.checkpoint import PhaseFiles
from lit_transfer.phases.steps import Steps

DRIFTING = "backbone.net.blocks.3.0.conv_dw.weight"


class Drift(pl.Callback):
    """Moves one weight on rank 1 after the second step of the phase `thaw`."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        steps = next(callback for callback in trainer.callbacks if isinstance(callback, Steps))
        if (steps.plan.phase.name, steps.step, trainer.global_rank) == ("thaw", 2, 1):
            with torch.no_grad():
                dict(pl_module.network.named_parameters())[DRIFTING].view(-1)[0] += 1e-3


def disagree() -> list[pl.Callback]:
    """Rank 1 has metrics of its own, far from those of rank 0, and reads the best weights late."""
    given, read_best = module.metrics, PhaseFiles.read_best
    count = 0

    def other(*arguments: Any) -> dict[str, float]:
        nonlocal count
        count += 1
        return {name: 2.0 if count % 2 else -1.0 for name in given(*arguments)}

    def read_late(files: PhaseFiles, step: int) -> dict[str, torch.Tensor]:
        time.sleep(2)
        return read_best(files, step)

    if os.environ.get("LOCAL_RANK") == "1":
        module.metrics, PhaseFiles.read_best = other, read_late
    return []


def small_parts() -> list[pl.Callback]:
    """Parts of 16 records, each written so slowly that no rank can do all of them."""
    write = Shelf.write

    def write_slowly(*arguments: Any) -> None:
        time.sleep(0.2)
        write(*arguments)

    shelf.ROWS_PER_PART = build.ROWS_PER_PART = 16
    Shelf.write = write_slowly  # type: ignore[method-assign]
    return []


def full_disk() -> list[pl.Callback]:
    """Rank 1 has no room on its disk, where storing would pay."""

    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    choice._WORTH_MEASURING_S = 0.0
    choice.decide = lambda _, uses, *__: Decision({use.name: use.frozen for use in uses}, 0.0, 1.0)
    shelf.ROWS_PER_PART = build.ROWS_PER_PART = 16
    if os.environ.get("LOCAL_RANK") == "1":
        Shelf.write = write  # type: ignore[method-assign]
    return []


FAULTS: dict[str, Callable[[], list[pl.Callback]]] = {
    "none": list,
    "drift": lambda: [Drift()],
    "disagree": disagree,
    "small_parts": small_parts,
    "full_disk": full_disk,
}
