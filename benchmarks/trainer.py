"""What the trainer costs over a bare PyTorch loop of the same schedule, for three presets; and what safety costs.

    .venv/bin/python benchmarks/trainer.py [--pairs 5] [--fraction 0.15]

Needs `make quickstart`'s dataset. Trainer and loop run in turns in one process; the ratio of a pair is the trainer's
wall-clock seconds over the loop's, so 1.0 is free and 1.1 is a tenth slower. A phase is one short epoch here, so what
it costs once (its Trainer, a checkpoint, its final weights) counts for more than in a real run. Checkpoints and the
check across ranks are timed apart, as a share of the phase. The result goes to benchmarks/trainer.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn

from lit_transfer.config import Config
from lit_transfer.data.module import ImageData
from lit_transfer.files import write_json
from lit_transfer.launch.train import prepare_job
from lit_transfer.model.augment import train_input
from lit_transfer.model.network import Network
from lit_transfer.phases.agreement import check_ranks_equal
from lit_transfer.phases.job import Job
from lit_transfer.phases.optim import build_optimizer, set_lr
from lit_transfer.phases.run import run_phases
from lit_transfer.phases.table import PhasePlan
from lit_transfer.reading import override, parse, read_yaml
from lit_transfer.tracking import ENVIRONMENT

COSINE = {"global_batch": 32, "weight_decay": 0.05, "schedule": "warmup_cosine"}
PRESETS: dict[str, dict[str, Any]] = {
    "linear_probe": {"epochs": 1} | COSINE,
    "freeze_thaw": {"thaw_from": "blocks.4", "head_epochs": 1, "thaw_epochs": 1} | COSINE,
    "layer_decay": {"epochs": 1} | COSINE,
}


def job_of(preset: str, fraction: float, folder: Path, *more: str) -> tuple[Job, list[PhasePlan]]:
    """The quickstart's data and network under a preset, without validation, in a fresh run directory."""
    plain = read_yaml(Path("configs/quickstart.yaml").read_text())
    plain["phases"] = {"preset": preset} | PRESETS[preset]
    plain["data"] = {
        "train": plain["data"]["train"] | {"fraction": fraction},
        "workers": 0,  # decoded in the process, so that the start of a worker is in neither time
    }
    changes = ["--runs_dir", str(folder), "--trainer.progress", "false", "--tracking.wandb", "off"]
    changes += ["--activations.store", "off", *more]  # the loop computes its frozen stages in each step, too
    os.environ.pop(ENVIRONMENT, None)
    job: tuple[Job, list[PhasePlan]] = prepare_job(parse(Config, override(plain, changes)))
    return job


def trainer_seconds(job: Job, plans: list[PhasePlan]) -> float:
    """Wall-clock seconds of all phases, by the trainer: from making the optimizer to the files it leaves."""
    start = time.perf_counter()
    run_phases(job, plans)
    return time.perf_counter() - start


def loop_seconds(job: Job, plans: list[PhasePlan], network: Network) -> float:
    """Wall-clock seconds of the same schedule by a loop as short as it can be, which leaves nothing."""
    start = time.perf_counter()
    for plan in plans:
        network.set_trained(plan.trained)
        network.train()
        optimizer = build_optimizer(network, plan)
        data = ImageData(
            job.streams,
            job.preprocessing,
            seed=0,
            global_batch=plan.phase.global_batch,
            workers=0,
            steps=range(plan.max_steps),
        )
        for step, batch in enumerate(data.train_dataloader()):
            set_lr(optimizer, plan, step)
            pixels = train_input(batch["image"], batch["uniform"], job.config.augment, job.preprocessing)
            with torch.autocast("cpu", torch.bfloat16, enabled=job.config.trainer.precision == "bf16-mixed"):
                logits = network(pixels)
            loss = F.cross_entropy(logits.float(), batch["target"])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return time.perf_counter() - start


def compare(preset: str, pairs: int, fraction: float) -> dict[str, object]:
    """Ratios of interleaved pairs; the order within a pair alternates, and one pair is a warm-up."""
    ratios, seconds = [], []
    for pair in range(pairs + 1):
        with tempfile.TemporaryDirectory() as folder:
            job, plans = job_of(preset, fraction, Path(folder))
            network = copy.deepcopy(job.network)
            if pair % 2:
                loop, trainer = loop_seconds(job, plans, network), trainer_seconds(job, plans)
            else:
                trainer, loop = trainer_seconds(job, plans), loop_seconds(job, plans, network)
        if pair:
            ratios.append(trainer / loop)
            seconds.append((trainer, loop))
            print(
                f"{preset} pair {pair}: trainer {trainer:.2f} s, loop {loop:.2f} s, ratio {ratios[-1]:.3f}", flush=True
            )
    trainer, loop = (statistics.median(times) for times in zip(*seconds, strict=True))
    return {
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
        "trainer_seconds_median": trainer,
        "loop_seconds_median": loop,
    }


def checkpoint_cost(fraction: float) -> dict[str, object]:
    """A checkpoint after every step, the most that can be asked for: seconds of each, and share of the phase."""
    with tempfile.TemporaryDirectory() as folder:
        job, plans = job_of("layer_decay", fraction, Path(folder), "--checkpoint.every_steps", "1")
        result = run_phases(job, plans)[0]
    return {
        "every_steps": 1,
        "seconds_each": result.checkpoint_share * result.seconds / result.steps,
        "percent_of_phase": 100 * result.checkpoint_share,
        "step_seconds": result.seconds / result.steps,
    }


def _time_check(rank: int, state: dict[str, torch.Tensor], folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    times = []
    for _ in range(11):
        start = time.perf_counter()
        check_ranks_equal(state, torch.device("cpu"), "benchmark")
        times.append(time.perf_counter() - start)
    if rank == 0:
        (Path(folder) / "seconds").write_text(str(statistics.median(times)))
    dist.destroy_process_group()


def rank_check_cost(phase_seconds: float) -> dict[str, object]:
    """The check across two gloo ranks at a phase's end: median seconds, and share of a phase that long."""
    with tempfile.TemporaryDirectory() as folder:
        job, _ = job_of("linear_probe", 0.1, Path(folder))
        spawn(_time_check, (dict(job.network.state_dict()), folder), nprocs=2)  # type: ignore[no-untyped-call]
        seconds = float((Path(folder) / "seconds").read_text())
    return {"seconds": seconds, "percent_of_phase": 100 * seconds / phase_seconds, "phase_seconds": phase_seconds}


def main() -> None:
    """Compare the presets, time what safety costs, and write benchmarks/trainer.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--fraction", type=float, default=0.15, help="of the training split, one epoch of it")
    options = parser.parse_args()
    results: dict[str, Any] = {preset: compare(preset, options.pairs, options.fraction) for preset in PRESETS}
    results["step_checkpoints"] = checkpoint_cost(options.fraction)
    results["rank_check"] = rank_check_cost(results["layer_decay"]["trainer_seconds_median"])
    results["torch"], results["threads"] = torch.__version__, torch.get_num_threads()
    write_json(Path(__file__).with_suffix(".json"), results)
    print({name: results[name] for name in ("step_checkpoints", "rank_check")})


if __name__ == "__main__":
    main()
