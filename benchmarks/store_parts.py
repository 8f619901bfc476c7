"""The frozen prefix against eager PyTorch, building against its parts, and a thawed step against the sum of its own."""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from store_job import Row, in_turns, job_of, library_of, ratio_of, run_phase, seconds_of, spread
from torch import Tensor

from lit_transfer.activations.library import Library
from lit_transfer.activations.prefix import Prefix, Recipe, cosines
from lit_transfer.data.loading import SampleDataset, loader
from lit_transfer.data.samplers import EvalSampler
from lit_transfer.phases.job import Job
from lit_transfer.phases.optim import build_optimizer
from lit_transfer.phases.run import set_trained
from lit_transfer.phases.table import PhasePlan

HEAD: Row = {"name": "head", "lr": 5e-3, "max_epochs": 1}
THAW: Row = {"name": "thaw", "lr": 1e-3, "backbone_lr": 3e-4}


def prefix_forward(folder: Path, repetitions: int, compiled: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """fp32 eager over ours, both in steady state on one batch of pictures; other ways to run it, and cosines.

    Eager PyTorch runs in a process of its own, whose allocator is as glibc's is; `eager_keeping` runs in this one,
    which keeps the memory that it frees.
    """
    library = library_of(job_of(HEAD, folder, "require")[0], workers=0)
    cut, size = len(library.backbone.stages), library.preprocessing.size
    recipe = library.new_recipe([cut])
    images = library.images("train", recipe.batch)
    plain = copy.deepcopy(library.backbone).eval()
    prefixes = {"ours": Prefix(library.backbone, [cut], recipe, size)}
    if compiled:
        prefixes["compiled"] = Prefix(library.backbone, [cut], replace(recipe, compiled=True), size)
    keeping = Eager(plain, images, torch.contiguous_format)
    here: dict[str, Callable[[], Any]] = {name: partial(prefix, images) for name, prefix in prefixes.items()}
    here["eager_keeping"] = keeping
    formats = {"eager": torch.contiguous_format, "eager_channels_last": torch.channels_last}
    with ExitStack() as stack:
        ways: dict[str, Callable[[], float]] = {name: partial(seconds_of, way) for name, way in here.items()}
        for name, memory_format in formats.items():
            ways[name] = stack.enter_context(elsewhere(Eager(plain.cpu(), images.cpu(), memory_format), library.device))
        first_s = {name: way() for name, way in ways.items()}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repetitions):
            for name, way in ways.items():
                found[name].append(way())
    expected = {cut: keeping()}
    measured: dict[str, Any] = {"batch": recipe.batch, "recipe": recipe.to_plain()}
    for name, seconds in found.items():
        measured[name] = {"seconds": spread(seconds), "eager_over_it": ratio_of(found["eager"], seconds)}
    for name, prefix in prefixes.items():
        measured[name]["cosine"] = cosines(prefix(images), expected)[cut]
    if compiled:
        measured["compiled"]["compile_s"] = first_s["compiled"] - measured["compiled"]["seconds"]["median"]
    return {"prefix_forward": measured["ours"]["eager_over_it"]}, measured


class Eager:
    """A backbone on pictures, as PyTorch runs it in fp32."""

    def __init__(self, backbone: torch.nn.Module, images: Tensor, memory_format: torch.memory_format) -> None:
        self.network = copy.deepcopy(backbone).to(memory_format=memory_format)
        self.images = images.contiguous(memory_format=memory_format)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        return self.network(self.images)  # type: ignore[no-any-return]


_eager: Eager  # of a process that times nothing else


@contextmanager
def elsewhere(eager: Eager, device: torch.device) -> Iterator[Callable[[], float]]:
    """Seconds of a call in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), _set_eager, (eager, device)) as process:
        yield lambda: process.submit(_eager_s).result()


def _set_eager(eager: Eager, device: torch.device) -> None:
    global _eager
    eager.network.to(device)
    eager.images = eager.images.to(device)
    _eager = eager


def _eager_s() -> float:
    return seconds_of(_eager)


def build_efficiency(folder: Path, pairs: int, fraction: float) -> tuple[dict[str, float], dict[str, Any]]:
    """Images per second of building the store over what decoding and the forward pass allow together.

    Decoding alone and building have as many workers as there are cores; the forward pass has their threads. On a CPU
    they share the cores, so an image takes the sum of their times; on a GPU the longer one.
    """
    workers = len(os.sched_getaffinity(0))
    found: list[dict[str, float]] = []
    recipe: Recipe | None = None
    for pair in range(pairs + 1):  # the first is a warm-up
        job, _ = job_of(HEAD, folder / f"build{pair}", "require", fraction=fraction, validated=False)
        library = library_of(job, workers)
        recipe = recipe or library.new_recipe([len(library.backbone.stages)])
        found.append(_build_times(library, recipe))
    columns = {name: [times[name] for times in found[1:]] for name in found[0]}
    together = columns.pop("least_s")
    ratio = ratio_of(together, columns["build_s"])
    rates = {f"{name.removesuffix('_s')}_images_per_s": spread([1 / s for s in all_]) for name, all_ in columns.items()}
    return {"build_efficiency": ratio}, {"images": len(job.streams["train"].rows), "workers": workers, **rates}


def _build_times(library: Library, recipe: Recipe) -> dict[str, float]:
    """Seconds of an image: decoding alone, the forward pass alone, the least for both, and building."""
    cut, count = len(library.backbone.stages), len(library.inputs["train"][0].rows)
    decode_s = seconds_of(partial(_decode, library, recipe.batch)) / count
    forward_s = _forward_s(library, cut, recipe)
    build_s = seconds_of(partial(library.fill, [cut], recipe, share=(0, 1), progress=False)) / count
    least_s = max(decode_s, forward_s) if library.device.type == "cuda" else decode_s + forward_s
    return {"decode_s": decode_s, "forward_s": forward_s, "build_s": build_s, "least_s": least_s}


def _decode(library: Library, batch: int) -> None:
    """Decode the training stream, the start of the workers included, as it is in building."""
    samples = library.inputs["train"][0]
    dataset = SampleDataset(samples, library.preprocessing, None)
    for item in loader(dataset, EvalSampler(samples, global_batch=batch, rank=0, ranks=1), library.workers):
        item["image"].to(library.device)


def _forward_s(library: Library, cut: int, recipe: Recipe, batches: int = 8) -> float:
    """Seconds of an image in the prefix, the copy of what is stored included."""
    prefix = Prefix(library.backbone, [cut], recipe, library.preprocessing.size)
    images = library.images("train", recipe.batch)
    prefix(images)
    return seconds_of(lambda: [prefix(images)[cut].cpu() for _ in range(batches)]) / (batches * recipe.batch)


def thawed_steps(folder: Path, pairs: int, steps: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Step time of a phase thawed from each stage with a stored prefix over the sum of its parts; the worst stage."""
    job, _ = _thaw_job(folder, {"train": "head", "backbone_lr": None}, steps)
    library = library_of(job, job.config.data.workers)
    cuts = range(1, len(library.backbone.stages))
    library.fill(cuts, library.new_recipe(cuts), share=(0, 1), progress=False)
    stages = [library.backbone.stage_names[cut] for cut in cuts]
    found: dict[str, list[tuple[float, float]]] = {stage: [] for stage in stages}
    for pair in range(pairs):
        for stage, times in found.items():
            row = {"train": {"from": stage}}
            times.append(in_turns(pair, partial(_step_s, folder, row, steps), partial(_parts_s, folder, row, steps)))
    measured = {stage: _compared(times) for stage, times in found.items()}
    return {"thawed_step_over_parts": max(one["ratio"] for one in measured.values())}, measured


def _compared(times: list[tuple[float, float]]) -> dict[str, Any]:
    step_s, parts_s = zip(*times, strict=True)
    return {"ratio": ratio_of(step_s, parts_s), "step_s": spread(step_s), "parts_s": spread(parts_s)}


def _thaw_job(folder: Path, row: Row, steps: int) -> tuple[Job, list[PhasePlan]]:
    return job_of(THAW | {"max_steps": steps} | row, folder, "require", fraction=0.15, validated=False)


def _step_s(folder: Path, row: Row, steps: int) -> float:
    """Seconds of a step by the trainer; the first two do not count."""
    return run_phase(*_thaw_job(folder, row, steps), warm_up=2)[1]


def _parts_s(folder: Path, row: Row, steps: int) -> float:
    """Seconds of all parts of a step, each by itself: the mean, the first two times left out."""
    job, plans = _thaw_job(folder, row, steps)
    parts = _Parts(job, plans[0])
    return statistics.mean([parts.seconds() for _ in range(steps)][2:])


class _Parts:
    """What a step of a phase must compute, one part after the other: each stage, the head, and the optimizer."""

    def __init__(self, job: Job, plan: PhasePlan) -> None:
        library = library_of(job, workers=0)
        set_trained(job, plan)
        self.network = job.network.train()
        self.optimizer = build_optimizer(job.network, plan)
        self.cut = self.network.first_trained
        batch = plan.phase.global_batch
        with torch.no_grad():
            self.given = self.network.backbone.run(library.images("train", batch), 0, self.cut)
        self.target = job.streams["train"].labels[:batch].to(library.device)

    def seconds(self) -> float:
        """Of all parts; takes a step of the optimizer."""
        x, total = self.given, 0.0
        for stage in range(self.cut, len(self.network.backbone.stages)):
            x, taken = _both_ways(partial(self._stage, stage), x, needs_gradient=stage > self.cut)
            total += taken
        total += _both_ways(self._loss, x, needs_gradient=True)[1]
        return total + seconds_of(self.optimizer.step) + seconds_of(self.optimizer.zero_grad)

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        return self.network.backbone.run(x, stage, stage + 1)

    def _loss(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.network.head(x), self.target)


def _both_ways(part: Callable[[Tensor], Tensor], x: Tensor, needs_gradient: bool) -> tuple[Tensor, float]:
    """The output of a part, and the seconds of its forward and backward pass."""
    x = x.detach().requires_grad_(needs_gradient)
    outputs: list[Tensor] = []
    forward_s = seconds_of(lambda: outputs.append(part(x)))
    gradient = torch.ones_like(outputs[0])
    return outputs[0].detach(), forward_s + seconds_of(partial(torch.autograd.backward, outputs[0], gradient))
