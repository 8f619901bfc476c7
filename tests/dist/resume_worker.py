"""Trains a config and writes which samples each step had; SIGKILLs its process group at a step.

Started as a script, so that Lightning starts the other ranks from it: resume_worker.py CONFIG RANKS SEEN KILL_AT
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from lit_transfer.launch.train import prepare_job
from lit_transfer.phases.run import run_phases
from lit_transfer.phases.steps import Steps
from lit_transfer.reading import load


class Seen(pl.Callback):
    """Appends `step, rank, rows` to a file of this rank; the first rank ends all of them."""

    def __init__(self, path: Path, kill_at: int) -> None:
        self.path, self.kill_at = path, kill_at

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        step = next(callback for callback in trainer.callbacks if isinstance(callback, Steps)).step
        if step == self.kill_at and trainer.global_rank == 0:
            os.killpg(os.getpgid(0), signal.SIGKILL)
        with self.path.open("a") as file:
            file.write(json.dumps([step, trainer.global_rank, batch["row"].tolist()]) + "\n")


def main(config_file: str, ranks: str, seen: str, kill_at: str) -> None:
    config = load(config_file)
    job, plans = prepare_job(replace(config, trainer=replace(config.trainer, devices=int(ranks))))
    path = Path(f"{seen}-{os.environ.get('LOCAL_RANK', '0')}.jsonl")
    run_phases(job, plans, [Seen(path, int(kill_at))])


if __name__ == "__main__":
    main(*sys.argv[1:])
