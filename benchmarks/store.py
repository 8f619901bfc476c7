"""What the activation store saves, and what our way of using it costs, on the quickstart without augmentation.

    .venv/bin/python benchmarks/store.py [--pairs 3] [--fraction 0.5] [--steps 8] [--compile] [--only NAME ...]

Needs `make quickstart`'s dataset. All figures are medians of pairs that are measured in turns in one run:

- frozen: a phase of 20 epochs of the head on the frozen backbone, validation included, with `activations.store` off
  and auto, each time with an empty store; wall-clock seconds of the phase, and of its training steps.
- loops: training steps of an epoch over stored features: our loop, a bare one over the same tensors, 16 heads.
- prefix: the frozen backbone on a batch, as PyTorch runs it in fp32 (in a process of its own) and as the store does;
  --compile adds `activations.prefix: compiled`.
- thawed: a step with all before a stage read from the store, over the times of the stages behind it (forward and
  backward), the head's and the optimizer's, each by itself.
- build: filling the store, over decoding and the forward pass by themselves.
- memory: peak of a process that trains a frozen phase, without and with the store, which it builds.

On a GPU the same runs there. The result goes to benchmarks/results/store-<hardware>.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from store_heads import compare_loops
from store_job import Row, in_turns, job_of, ratio_of, run_phase, spread
from store_parts import build_efficiency, prefix_forward, thawed_steps
from table import write_result

EPOCHS = 20
STORES = ("off", "auto")
PHASE: Row = {"name": "head", "lr": 5e-3, "schedule": "warmup_cosine"}
Found = tuple[dict[str, float], dict[str, Any]]


def frozen_phases(folder: Path, pairs: int, fraction: float) -> Found:
    """20 epochs of the head with and without the store; and an epoch of their training steps."""
    frozen_phase(folder / "warm_up", "require", fraction / 4, 1)
    found: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for pair in range(pairs):
        plain, stored = (partial(frozen_phase, folder / f"{store}{pair}", store, fraction, EPOCHS) for store in STORES)
        found.append(in_turns(pair, plain, stored))
        print(f"frozen phase, without and with a store: {found[-1][0][0]:.1f} s, {found[-1][1][0]:.1f} s", flush=True)
    (off, off_steps), (on, on_steps) = (zip(*side, strict=True) for side in zip(*found, strict=True))
    ratios = {"frozen_phase_20_epochs": ratio_of(off, on), "stored_epoch": ratio_of(off_steps, on_steps)}
    seconds = {"off_s": off, "store_s": on, "off_epoch_steps_s": off_steps, "store_epoch_steps_s": on_steps}
    return ratios, {"epochs": EPOCHS, "fraction": fraction} | {name: spread(all_) for name, all_ in seconds.items()}


def frozen_phase(folder: Path, store: str, fraction: float, epochs: int) -> tuple[float, float]:
    """Wall-clock seconds of a phase, an empty store filled if it has one, and of the training steps of an epoch."""
    job, plans = job_of(PHASE | {"max_epochs": epochs}, folder, store, fraction=fraction)
    steps = plans[0].steps_per_epoch
    start = time.perf_counter()
    _, step_s = run_phase(job, plans, warm_up=steps if epochs > 1 else 0)
    seconds = time.perf_counter() - start
    if store == "auto":
        choice = json.loads((job.run.checkpoints("head") / "activations.json").read_text())
        assert choice["cut"], f"the phase is too short for the store to pay, raise --fraction: {choice['why']}"
    return seconds, step_s * steps


def peak_memory(folder: Path, pairs: int) -> Found:
    """Peak memory of a process that trains a short frozen phase, without / with the store."""
    found: dict[str, list[float]] = {"off": [], "require": []}
    for pair in range(pairs):
        for store, peaks in found.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                peaks.append(process.submit(_peak_mib, folder / f"{store}{pair}", store).result())
    ratios = {"peak_memory": ratio_of(found["off"], found["require"])}
    return ratios, {"without": "activations.store off"} | {f"{name}_mib": spread(all_) for name, all_ in found.items()}


def _peak_mib(folder: Path, store: str) -> float:
    job, plans = job_of(PHASE | {"max_epochs": 1}, folder, store, fraction=0.1)
    return run_phase(job, plans, warm_up=0)[0].peak_memory_mib


def main() -> None:
    """Measure, print the figures with their aims, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--fraction", type=float, default=0.5, help="of the pictures, for phases of 20 epochs")
    parser.add_argument("--stored_fraction", type=float, default=1.0, help="the same for loops and building")
    parser.add_argument("--steps", type=int, default=8, help="of a thawed phase; the first two do not count")
    parser.add_argument("--compile", action="store_true", help="also time the compiled prefix")
    parser.add_argument("--only", nargs="+", help="parts to measure; nothing is written then")
    options = parser.parse_args()
    pairs = options.pairs
    parts: dict[str, Callable[[Path], Found]] = {
        "build": partial(build_efficiency, pairs=pairs, fraction=options.stored_fraction),
        "loops": partial(compare_loops, pairs=pairs, fraction=options.stored_fraction),
        "prefix": partial(prefix_forward, repetitions=2 * pairs + 1, compiled=options.compile),
        "thawed": partial(thawed_steps, pairs=pairs, steps=options.steps),
        "memory": partial(peak_memory, pairs=pairs),
        "frozen": partial(frozen_phases, pairs=pairs, fraction=options.fraction),
    }
    ratios: dict[str, float] = {}
    measured: dict[str, Any] = {"settings": vars(options) | {"threads": torch.get_num_threads()}}
    for name in options.only or parts:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found, measured[name] = parts[name](Path(folder))
        ratios |= found
        print(f"{name}: {found} in {time.perf_counter() - start:.0f} s", flush=True)
    if options.only:
        print(json.dumps(measured, indent=1))
    else:
        write_result("store", ratios, measured)


if __name__ == "__main__":
    main()
