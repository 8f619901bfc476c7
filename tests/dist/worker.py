"""Trains configs one after the other, as `lit-transfer train` does, and leaves what each rank held beside them.

Started as a script, so that Lightning starts the other ranks from it: worker.py FAULT CONFIG...; see `ranks.py`.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from faults import FAULTS
from safetensors.torch import save_file

from lit_transfer.errors import UserError
from lit_transfer.launch.train import prepare_job
from lit_transfer.model.network import Network
from lit_transfer.phases.job import Job
from lit_transfer.phases.run import run_phases
from lit_transfer.phases.steps import Steps
from lit_transfer.phases.table import PhasePlan
from lit_transfer.reading import load

Run = tuple[Path, Job, list[PhasePlan]]


def dump(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)


def rank() -> str:
    return os.environ.get("LOCAL_RANK", "0")


class Witness(pl.Callback):
    """Writes what this rank holds: before DDP wraps, which would make the ranks equal, and at the end of each fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.phase = -1
        self.noisy: list[list[str]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.phase, self.noisy = self.phase + 1, []
        dump(pl_module.network.state_dict(), self.folder / f"{self.phase}-{rank()}.safetensors")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        parts = noisy_parts(pl_module.network)  # the module seeds what is random after this
        if parts not in self.noisy:
            self.noisy.append(parts)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = next(callback for callback in trainer.callbacks if isinstance(callback, Steps))
        if steps.ema:
            dump(steps.ema.weights, self.folder / f"ema-{self.phase}-{rank()}.safetensors")
        end = {"step": steps.step, "reason": steps.reason, "drops": steps.drops, "best": steps.monitor.best_step}
        path = self.folder / f"end-{self.phase}-{rank()}.json"
        path.write_text(json.dumps(end | {"noisy": self.noisy}))


@torch.no_grad()
def noisy_parts(network: Network) -> list[str]:
    """Stages, and `head`, whose output as the network now stands is not that of eval mode."""
    now, quiet = copy.deepcopy(network), copy.deepcopy(network).eval()
    x, found = torch.rand(8, 3, 32, 32), []
    for index, name in enumerate(network.backbone.stage_names):
        expected = quiet.backbone.run(x, index, index + 1)
        found += [] if torch.equal(now.backbone.run(x, index, index + 1), expected) else [name]
        x = expected
    return found + ([] if torch.equal(now.head(x), quiet.head(x)) else ["head"])


def summary(plan: PhasePlan, network: Network) -> dict[str, Any]:
    """A phase as plain values; `parts` are the stages, and `head`, in which anything trains."""
    parts = {parameter.stage for parameter in network.layout().parameters if parameter.name in plan.trained}
    own = {key: getattr(plan.phase, key) for key in ("name", "norm", "ema_decay")}
    return own | {"trained": plan.trained, "parts": sorted(parts), "max_steps": plan.max_steps}


def prepare(file: Path) -> Run:
    """A run and the folder for what its ranks leave."""
    job, plans = prepare_job(load(file))
    folder = file.with_suffix("")
    folder.mkdir(exist_ok=True)
    if rank() == "0":
        (folder / "plans.json").write_text(json.dumps([summary(plan, job.network) for plan in plans]))
    return folder, job, plans


def main(fault: str, *files: str) -> None:
    # All before the first fit, in which the other ranks start: they find every run directory made.
    runs = [prepare(Path(file)) for file in files]
    for folder, job, plans in runs:
        try:
            run_phases(job, plans, callbacks=[Witness(folder), *FAULTS[fault]()])
        except UserError as error:
            (folder / f"error-{rank()}.txt").write_text(str(error))
            raise
        dump(job.network.state_dict(), folder / f"{len(plans)}-{rank()}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
