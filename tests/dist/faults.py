"""What goes wrong on one rank, planted: each a function that gives the callbacks which do it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch

from lit_transfer.model import module
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


FAULTS: dict[str, Callable[[], list[pl.Callback]]] = {
    "none": list,
    "drift": lambda: [Drift()],
    "disagree": disagree,
}
