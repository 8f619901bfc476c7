"""Trains a config phase by phase, as `lit-transfer train` does, and leaves each rank's weights beside the run.

Started as a script, so that Lightning starts the other ranks from it: worker.py CONFIG OUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from lit_transfer.launch.train import prepare_job
from lit_transfer.reading import load
from lit_transfer.phases.run import run_phases


def dump(network: torch.nn.Module, path: Path) -> None:
    save_file({name: tensor.clone().contiguous() for name, tensor in network.state_dict().items()}, path)


def main(config_file: str, out: str) -> None:
    job, plans = prepare_job(load(config_file))
    rank = os.environ.get("LOCAL_RANK", "0")
    dump(job.network, Path(out) / f"start-{rank}.safetensors")
    for count, plan in enumerate(plans, start=1):
        run_phases(job, plans[:count])
        dump(job.network, Path(out) / f"{plan.phase.name}-{rank}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
