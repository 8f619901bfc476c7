"""What the trainer costs over a bare PyTorch loop: images per second on the same batches, frozen and thawed.

    .venv/bin/python benchmarks/trainer.py [--pairs 5] [--fraction 0.15]

Needs `make quickstart`'s dataset. Trainer and loop run in turns in one process; the ratio of a pair is loop / trainer
in images per second, so 1.0 is free and 1.1 is a tenth slower. The result goes to benchmarks/trainer.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from lit_transfer.config import Config
from lit_transfer.data.module import ImageData
from lit_transfer.files import write_json
from lit_transfer.launch.train import prepare_job
from lit_transfer.model.augment import train_input
from lit_transfer.model.network import Network
from lit_transfer.phases.run import Job, run_phases
from lit_transfer.phases.table import PhasePlan
from lit_transfer.reading import override, parse, read_yaml
from lit_transfer.tracking import ENVIRONMENT

PHASES = {
    "frozen": {"train": "head", "lr": 1e-3},
    "thawed": {"train": {"from": "blocks.4"}, "lr": 1e-3, "backbone_lr": 1e-4},
}


def job_of(phase: str, fraction: float, folder: Path) -> tuple[Job, list[PhasePlan]]:
    """One epoch of one phase of the quickstart, without validation, in a fresh run directory."""
    plain = read_yaml(Path("configs/quickstart.yaml").read_text())
    plain["phases"] = [{"name": phase, "max_epochs": 1, "global_batch": 32, **PHASES[phase]}]
    plain["data"] = {
        "train": plain["data"]["train"] | {"fraction": fraction},
        "workers": 0,  # decoded in the process, so that the start of a worker is in neither time
    }
    changes = ["--runs_dir", str(folder), "--trainer.progress", "false", "--tracking.wandb", "off"]
    os.environ.pop(ENVIRONMENT, None)
    return prepare_job(parse(Config, override(plain, changes)))


def trainer_speed(job: Job, plans: list[PhasePlan]) -> float:
    """Images per second of the phase, by the trainer."""
    return run_phases(job, plans)[0].images_per_s


def loop_speed(job: Job, plan: PhasePlan, network: Network) -> float:
    """Images per second of the same epoch by a loop as short as it can be."""
    network.set_cut(plan.cut)
    network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    data = ImageData(
        job.streams,
        job.preprocessing,
        seed=0,
        global_batch=32,
        first_epoch=0,
        workers=job.config.data.workers,
    )
    loader = data.train_dataloader()
    start, images = time.perf_counter(), 0
    for batch in loader:
        pixels = train_input(batch["image"], batch["uniform"], job.config.augment, job.preprocessing)
        with torch.autocast("cpu", torch.bfloat16, enabled=job.config.trainer.precision == "bf16-mixed"):
            logits = network(pixels)
        loss = F.cross_entropy(logits.float(), batch["target"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        images += len(batch["target"])
    return images / (time.perf_counter() - start)


def compare(phase: str, pairs: int, fraction: float) -> dict[str, object]:
    """Ratios of interleaved pairs; the order within a pair alternates, and one pair is a warm-up."""
    ratios: list[float] = []
    speeds: dict[str, list[float]] = {"trainer": [], "loop": []}
    for pair in range(pairs + 1):
        with tempfile.TemporaryDirectory() as folder:
            job, plans = job_of(phase, fraction, Path(folder))
            network = copy.deepcopy(job.network)
            if pair % 2:
                loop, trainer = loop_speed(job, plans[0], network), trainer_speed(job, plans)
            else:
                trainer, loop = trainer_speed(job, plans), loop_speed(job, plans[0], network)
        if pair:
            ratios.append(loop / trainer)
            speeds["trainer"].append(trainer)
            speeds["loop"].append(loop)
            print(
                f"{phase} pair {pair}: trainer {trainer:.1f}, loop {loop:.1f} images/s, ratio {loop / trainer:.3f}",
                flush=True,
            )
    return {
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
        "trainer_images_per_s_median": statistics.median(speeds["trainer"]),
        "loop_images_per_s_median": statistics.median(speeds["loop"]),
    }


def main() -> None:
    """Compare both phases and write benchmarks/trainer.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--fraction", type=float, default=0.15, help="of the training split, one epoch of it")
    options = parser.parse_args()
    results: dict[str, object] = {phase: compare(phase, options.pairs, options.fraction) for phase in PHASES}
    results["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    results["torch"], results["threads"] = torch.__version__, torch.get_num_threads()
    write_json(Path(__file__).with_suffix(".json"), results)


if __name__ == "__main__":
    main()
