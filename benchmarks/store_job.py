"""What the benchmarks of the activation store share: the quickstart without augmentation, and its steps timed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch

from lit_transfer.activations.library import Library
from lit_transfer.activations.views import plain_views
from lit_transfer.config import Config
from lit_transfer.launch.train import prepare_job
from lit_transfer.model.memory import keep_freed_memory
from lit_transfer.phases import run
from lit_transfer.phases.checkpoint import PhaseResult
from lit_transfer.phases.job import Job
from lit_transfer.phases.steps import Steps
from lit_transfer.phases.table import PhasePlan
from lit_transfer.phases.trainer import check_machine
from lit_transfer.reading import override, parse, read_yaml
from lit_transfer.tracking import ENVIRONMENT

Row = dict[str, Any]
Result = TypeVar("Result")


def job_of(
    row: Row, folder: Path, store: str, *, fraction: float = 1.0, validated: bool = True
) -> tuple[Job, list[PhasePlan]]:
    """The quickstart with one phase, as a new run in a folder.

    Args:
        row: of the phase; what it leaves out is the quickstart's.
        folder: of runs, and of the store.
        store: `activations.store`.
        fraction: of the samples of each stream.
        validated: whether it has validation.
    """
    plain = read_yaml(Path("configs/quickstart.yaml").read_text())
    quickstart, data = plain["phases"], plain["data"]
    usual = {key: quickstart[key] for key in ("global_batch", "weight_decay")}
    names = ("train", "val") if validated else ("train",)
    plain |= {
        "data": {"workers": data["workers"]} | {name: data[name] | {"fraction": fraction} for name in names},
        "augment": {},
        "phases": [usual | row],
        "activations": {"store": store, "folder": str(folder / "activations")},
    }
    runs = len(list((folder / "runs").glob("*")))
    changes = ["--runs_dir", str(folder / "runs"), "--name", f"run{runs}"]
    changes += ["--trainer.progress", "false", "--trainer.devices", "1", "--tracking.wandb", "off"]
    os.environ.pop(ENVIRONMENT, None)
    job: tuple[Job, list[PhasePlan]] = prepare_job(parse(Config, override(plain, changes)))
    return job


def library_of(job: Job, workers: int) -> Library:
    """The store as the phase of a job sees it; moves the network to the device."""
    device = torch.device("cuda" if check_machine(job.config.trainer) else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    views = plain_views(job.preprocessing)
    inputs = {name: (samples, views) for name, samples in job.streams.items()}
    return Library(job.network.to(device).backbone, job.preprocessing, job.config.activations, inputs, workers)


class Stopwatch(Steps):
    """Steps of a phase that are timed, from the end of one to that of the next; validations and checkpoints are not.

    Args:
        args: of `Steps`.
        warm_up: the first steps, which do not count.
    """

    def __init__(self, *args: Any, warm_up: int) -> None:
        super().__init__(*args)
        self.warm_up = warm_up
        self.seconds_timed, self._since, self._runs = 0.0, 0.0, False

    @property
    def step_s(self) -> float:
        """Mean seconds of a step that counts."""
        return self.seconds_timed / (self.step - self.warm_up)

    def start(self, device: torch.device) -> None:
        """Training begins."""
        super().start(device)
        self._go_on()

    def step_done(self, *args: Any, **settings: Any) -> bool:
        """A step was computed; what may follow it is not timed."""
        is_due = super().step_done(*args, **settings)
        if is_due or self.reason or self.step == self.warm_up or self.step % self.plan.steps_per_epoch == 0:
            synchronize()
            self.seconds_timed += time.perf_counter() - self._since
            self._runs = False
        return is_due

    def end_step(self, *args: Any, **settings: Any) -> None:
        """All that belongs to a step is done."""
        super().end_step(*args, **settings)
        if self.step == self.warm_up:
            self.seconds_timed = 0.0
        if not self._runs:
            self._go_on()

    def _go_on(self) -> None:
        synchronize()
        self._since, self._runs = time.perf_counter(), True


def run_phase(job: Job, plans: Sequence[PhasePlan], warm_up: int) -> tuple[PhaseResult, float]:
    """Train the one phase of a job; its result, and the seconds of a step behind the first `warm_up` ones."""
    made: list[Stopwatch] = []

    def steps(*args: Any) -> Stopwatch:
        made.append(Stopwatch(*args, warm_up=warm_up))
        return made[-1]

    with mock.patch.object(run, "Steps", steps):
        (result,) = run.run_phases(job, plans)
    return result, made[0].step_s


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call, until the device has done its work."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for what was begun on the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(pair: int, first: Callable[[], Result], second: Callable[[], Result]) -> tuple[Result, Result]:
    """What two measurements give; which is made first alternates from pair to pair."""
    if pair % 2:
        other = second()
        return first(), other
    return first(), second()


def ratio_of(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of pairs."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
