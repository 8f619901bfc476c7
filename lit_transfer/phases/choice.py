"""What a phase reads of the activation store, if anything: from the settings, or from a short measurement."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_transfer.activations.costs import Costs, Decision, Use, Weighing, decide, disk_speed, weigh
from lit_transfer.activations.library import Library
from lit_transfer.activations.prefix import Recipe, evaluating, seconds
from lit_transfer.activations.views import Views, train_views
from lit_transfer.config import Config
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.plan import Batch
from lit_transfer.model.augment import scaled
from lit_transfer.phases.checkpoint import PhaseResult
from lit_transfer.phases.job import Job
from lit_transfer.phases.table import PhasePlan
from lit_transfer.schedule import Phase

_WORTH_MEASURING_S = 30.0


@dataclass(frozen=True)
class Choice:
    """What was decided for a phase.

    Args:
        cut: stages before what it reads; None computes.
        tapped: cuts that are stored in the same pass, for later phases.
        recipe: of the prefix; None where nothing is stored.
        why: a line for people.
        weighed: what was measured; None where it is not.
    """

    cut: int | None
    tapped: tuple[int, ...]
    recipe: Recipe | None
    why: str
    weighed: Weighing | None = None

    def to_plain(self) -> dict[str, Any]:
        """For JSON; `from_plain` reads it."""
        recipe = self.recipe.to_plain() if self.recipe else None
        weighed = asdict(self.weighed) if self.weighed else None
        return {"cut": self.cut, "tapped": list(self.tapped), "recipe": recipe, "why": self.why, "weighed": weighed}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Choice:
        """The inverse of `to_plain`; files of earlier versions have no `weighed`."""
        recipe = Recipe.from_plain(plain["recipe"]) if plain["recipe"] else None
        weighed = Weighing.from_plain(plain["weighed"]) if plain.get("weighed") else None
        return cls(plain["cut"], tuple(plain["tapped"]), recipe, plain["why"], weighed)


def frozen_stages(plan: PhasePlan, stages: Sequence[str]) -> int:
    """How many stages, from the front, a phase freezes as a whole."""
    return len(stages) if plan.cut == "head" else list(stages).index(plan.cut)


def why_not(config: Config, phase: Phase, preprocessing: Preprocessing) -> str | None:
    """Why a phase with frozen stages cannot read stored activations; None if it can."""
    if phase.cutmix:
        return "cutmix cuts pictures, which are not there any more; remove it, or set activations.store off"
    if phase.mixup and config.activations.store == "auto":
        return "mixup mixes pictures, and would mix activations at the cut; set activations.store require if it may"
    views = views_of(config, phase, preprocessing, range(1))
    return views if isinstance(views, str) else None


def views_of(config: Config, phase: Phase, preprocessing: Preprocessing, epochs: range) -> Views | str:
    """The pictures that a phase takes in some epochs of the run, or why they cannot be stored."""
    augment = scaled(config.augment, phase.augment_strength)
    return train_views(config.activations.views, augment, preprocessing, config.seed, epochs)


def epochs_of(plan: PhasePlan, first_epoch: int, steps_done: int) -> range:
    """Epochs of the run in which a phase has still steps to do."""
    done, end = steps_done // plan.steps_per_epoch, math.ceil(plan.max_steps / plan.steps_per_epoch)
    return range(first_epoch + done, first_epoch + end)


def choose(
    job: Job, plans: Sequence[PhasePlan], before: Sequence[PhaseResult], steps_done: int, library: Library
) -> Choice:
    """What this phase reads, and what is stored for later ones in the same pass."""
    uses = _uses(job, plans, before, steps_done, library)
    cuts = sorted({use.frozen for use in uses})
    recipe = library.recipe(range(1, uses[0].frozen + 1))
    if job.config.activations.store == "require" or plans[0].phase.heads:  # which train on stored features only
        return _require(plans[0].phase, cuts, recipe or library.new_recipe(cuts), library)
    return _weigh(job, uses, recipe, library)


def with_room(library: Library, cut: int, tapped: Sequence[int], recipe: Recipe) -> tuple[int, ...]:
    """Those of the later phases' cuts that fit beside a phase's own; what nobody uses is evicted for them.

    Raises:
        OSError: there is no room for its own.
    """
    for beside in (tuple(tapped), ()):
        if library.make_room({cut, *beside}, recipe):
            return beside
    limit_gb = library.settings.limit_gb
    raise OSError(errno.ENOSPC, f"there is no room below activations.limit_gb {limit_gb:g} or on its disk")


def _require(phase: Phase, cuts: Sequence[int], recipe: Recipe, library: Library) -> Choice:
    """The deepest of some cuts; without room for it, the deepest one before it that is stored as a whole.

    `heads` read features alone.
    """
    names, deepest = [*library.backbone.stage_names, "head"], cuts[-1]
    try:
        tapped = with_room(library, deepest, cuts[:-1], recipe)
    except OSError:
        whole = [cut for cut in range(1, deepest) if not phase.heads and not library.missing(cut, recipe)]
        if not whole:
            raise
        why = f"reads the activations at {names[max(whole)]}; there is no room for those at {names[deepest]}"
        return Choice(max(whole), (), recipe, why)
    told = ", ".join(names[cut] for cut in (*tapped, deepest))
    return Choice(deepest, tapped, recipe, f"stores the activations at {told}")


def _uses(
    job: Job, plans: Sequence[PhasePlan], before: Sequence[PhaseResult], steps_done: int, library: Library
) -> list[Use]:
    """The phase, and those after it that can read what one pass stores now."""
    stages, found, frozen = job.network.backbone.stage_names, [], len(job.network.backbone.stages)
    stored = [view.key for view in library.inputs["train"][1].views]
    first_epoch = sum(result.epochs for result in before)
    for plan in plans:
        frozen = min(frozen, frozen_stages(plan, stages))  # what an earlier phase trains is not what is stored now
        done = steps_done if plan is plans[0] else 0
        epochs = epochs_of(plan, first_epoch, done)
        if frozen and why_not(job.config, plan.phase, job.preprocessing) is None:
            views = views_of(job.config, plan.phase, job.preprocessing, epochs)
            assert isinstance(views, Views), "it can be stored"
            if all(view.key in stored for view in views.views):
                found.append(Use(plan.phase.name, frozen, _samples(job, plan, done)))
        first_epoch = epochs.stop
    return found


def _samples(job: Job, plan: PhasePlan, steps_done: int) -> int:
    """Samples whose frozen part a phase has still to be given, validation included."""
    steps = plan.max_steps - steps_done
    every = plan.phase.validate_every_steps or plan.steps_per_epoch
    validated = math.ceil(steps / every) * len(job.streams["val"].rows) if "val" in job.streams else 0
    return round(steps / plan.steps_per_epoch * len(job.streams["train"].rows)) + validated


def _weigh(job: Job, uses: Sequence[Use], recipe: Recipe | None, library: Library) -> Choice:
    """Measure what computing and storing cost, and take what is faster."""
    compute_s = _compute_s(job, library, uses[0].frozen)
    load_s = _load_s(job, library, compute_s[uses[0].frozen])
    alone_s = uses[0].samples * (load_s + compute_s[uses[0].frozen])
    if sum(use.samples for use in uses) * (load_s + compute_s[uses[0].frozen]) < _WORTH_MEASURING_S:
        return Choice(None, (), None, f"computes its frozen stages in each epoch, {alone_s:.0f} s in all")
    recipe = recipe or library.new_recipe({use.frozen for use in uses})
    costs = _costs(library, load_s, compute_s, recipe)
    missing = {cut: library.missing(cut, recipe) for cut in compute_s}
    pictures = sum(len(samples.rows) for samples, _ in library.inputs.values())
    room_bytes = library.room_bytes(compute_s, recipe)
    decision = decide(costs, uses, missing, pictures, room_bytes)
    cut = decision.cuts.get(uses[0].name)
    why = _explain(library, decision, costs, uses[0], missing, alone_s)
    if cut is not None and not library.make_room(set(decision.cuts.values()), recipe):
        cut = None
    stages, records = [*library.backbone.stage_names, "head"], library.missing(1, None)
    weighed = weigh(costs, uses[0], stages, records, missing, pictures, room_bytes, cut)
    if cut is None:
        return Choice(None, (), None, f"computes its frozen stages in each epoch; {why}", weighed)
    tapped = tuple(sorted(set(decision.cuts.values()) - {cut}))
    return Choice(cut, tapped, recipe, f"reads stored activations; {why}", weighed)


def _load_s(job: Job, library: Library, compute_s: float) -> float:
    """Seconds that a picture takes to be read and decoded by as many workers as there are, as far as they do not do it
    while a device computes the sample before; on a CPU they share its cores with what computes.
    """
    workers = job.config.data.workers
    samples = job.streams["train"]
    dataset = SampleDataset(samples, job.preprocessing, None)
    rows = samples.rows[:: max(1, len(samples.rows) // 32)][:32]
    start = time.perf_counter()
    dataset[Batch(0, rows)]
    taken = (time.perf_counter() - start) / len(rows)
    loaded_s = taken / max(1, min(workers, _cores()))
    return max(0.0, loaded_s - compute_s) if workers and library.device.type != "cpu" else loaded_s


def _cores() -> int:
    """That this process may use, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compute_s(job: Job, library: Library, frozen: int) -> dict[int, float]:
    """Seconds that a sample takes in training up to each cut, by how many stages stand before."""
    x = library.images("train", 32)
    backbone, found, total = library.backbone, {}, 0.0
    is_mixed = job.config.trainer.precision != "32"
    dtype = torch.float16 if job.config.trainer.precision == "16-mixed" else torch.bfloat16
    with torch.no_grad(), evaluating(backbone), torch.autocast(x.device.type, dtype, enabled=is_mixed):
        x = x.contiguous(memory_format=torch.channels_last)
        for stage in range(frozen):
            outputs: list[Tensor] = []
            total += seconds(partial(_run_stage, library, stage, outputs), x) / len(x)
            found[stage + 1] = total
            x = outputs[-1]
    return found


def _run_stage(library: Library, stage: int, outputs: list[Tensor], x: Tensor) -> None:
    outputs.append(library.backbone.run(x, stage, stage + 1))


def _costs(library: Library, load_s: float, compute_s: dict[int, float], recipe: Recipe) -> Costs:
    """The rest of what a decision needs: the prefix as it would be stored, and the disk."""
    deepest = max(compute_s)
    images = library.images("train", recipe.batch)
    prefix = library.prefix([deepest], recipe)
    start = time.perf_counter()
    prefix(images)
    first_s = time.perf_counter() - start
    batch_s = seconds(prefix, images)
    whole_s = batch_s / len(images)
    write, read = disk_speed(library.store.folder)
    return Costs(
        compile_s=max(0.0, first_s - batch_s) if recipe.compiled else 0.0,
        load_s=load_s,
        compute_s=compute_s,
        store_s={cut: whole_s * value / compute_s[deepest] for cut, value in compute_s.items()},
        bytes={cut: library.record_bytes(cut) for cut in compute_s},
        write_bytes_per_s=write,
        read_bytes_per_s=read,
    )


def _explain(
    library: Library, decision: Decision, costs: Costs, use: Use, missing: dict[int, int], alone_s: float
) -> str:
    """The numbers of a decision on one line."""
    cut = decision.cuts.get(use.name)
    if cut is None:
        folder = library.store.folder
        return f"building would take longer than it saves of {alone_s:.0f} s, or there is no room in {folder}"
    name, size = [*library.backbone.stage_names, "head"][cut], costs.bytes[cut] * missing[cut] / 1e6
    return (
        f"at {name}: building {decision.build_s:.0f} s ({missing[cut]:,} records, {size:,.0f} MB), which saves "
        f"{decision.saved_s:.0f} s of this and later phases; computing takes {alone_s:.0f} s in this one"
    )
