"""Whether a phase reads stored activations in the place of pictures, and which; decided once a phase.

Rank 0 decides, from a measurement or from what an earlier start of the phase left in `activations.json`, and tells the
others. Then all ranks build what is missing, together with whoever else wants the same.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lit_transfer.activations.costs import Costs, Decision, Use, decide, disk_speed
from lit_transfer.activations.data import StoredStream
from lit_transfer.activations.library import Library
from lit_transfer.activations.prefix import Prefix, Recipe, seconds
from lit_transfer.activations.views import Views, plain_views, train_views
from lit_transfer.config import Config
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.module import SampleDataset
from lit_transfer.data.plan import Batch
from lit_transfer.data.streams import Samples
from lit_transfer.errors import UserError, require
from lit_transfer.files import write_json
from lit_transfer.model.augment import scaled
from lit_transfer.phases.checkpoint import PhaseFiles, PhaseResult
from lit_transfer.phases.job import Job
from lit_transfer.phases.table import PhasePlan
from lit_transfer.phases.trainer import on_all_ranks
from lit_transfer.schedule import Phase

FILE_NAME = "activations.json"
_WORTH_MEASURING_S = 30.0


@dataclass(frozen=True)
class Stored:
    """What a phase reads in the place of pictures.

    Args:
        cut: stages that are not run any more; 0 where it reads pictures.
        streams: `train`, and `val` if the run has it; empty where it reads pictures.
    """

    cut: int = 0
    streams: dict[str, StoredStream] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What was decided for a phase.

    Args:
        cut: stages before what it reads; None computes.
        tapped: cuts that are stored in the same pass, for later phases.
        recipe: of the prefix; None where nothing is stored.
        why: a line for people.
    """

    cut: int | None
    tapped: tuple[int, ...]
    recipe: Recipe | None
    why: str

    def to_plain(self) -> dict[str, Any]:
        """For JSON; `from_plain` reads it."""
        recipe = self.recipe.to_plain() if self.recipe else None
        return {"cut": self.cut, "tapped": list(self.tapped), "recipe": recipe, "why": self.why}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Choice:
        """The inverse of `to_plain`."""
        recipe = Recipe.from_plain(plain["recipe"]) if plain["recipe"] else None
        return cls(plain["cut"], tuple(plain["tapped"]), recipe, plain["why"])


def frozen_stages(plan: PhasePlan, stages: Sequence[str]) -> int:
    """How many stages, from the front, a phase freezes as a whole."""
    return len(stages) if plan.cut == "head" else list(stages).index(plan.cut)


def check_activations(
    config: Config, plans: Sequence[PhasePlan], stages: Sequence[str], preprocessing: Preprocessing
) -> None:
    """Refuse phases that `activations.store: require` cannot store."""
    for plan in plans:
        reason = why_not(config, plan.phase, preprocessing)
        require(
            config.activations.store != "require" or frozen_stages(plan, stages) == 0 or reason is None,
            f"phase '{plan.phase.name}': activations.store is require, but {reason}.",
        )


def why_not(config: Config, phase: Phase, preprocessing: Preprocessing) -> str | None:
    """Why a phase with frozen stages cannot read stored activations; None if it can."""
    if phase.cutmix:
        return "cutmix cuts pictures, which are not there any more; remove it, or set activations.store off"
    if phase.mixup and config.activations.store == "auto":
        return "mixup mixes pictures, and would mix activations at the cut; set activations.store require if it may"
    views = _train_views(config, phase, preprocessing, range(1))
    return views if isinstance(views, str) else None


@contextmanager
def open_stored(
    job: Job,
    plans: Sequence[PhasePlan],
    before: Sequence[PhaseResult],
    steps_done: int,
    files: PhaseFiles,
    trainer: pl.Trainer,
) -> Iterator[Stored]:
    """What a phase reads, built if need be; nobody evicts it while the block runs. Every rank must call it.

    Args:
        job: its network has the weights of the phase's start, and what the phase trains is set.
        plans: the phase, and those after it.
        before: what became of earlier ones.
        steps_done: of the phase.
        files: of the phase.
        trainer: of the phase; ranks that do not run yet are started.

    Raises:
        UserError: a stored record is not what its picture gives, or `require` cannot be kept.
    """
    settings, name = job.config.activations, plans[0].phase.name
    if settings.store == "off" or job.network.first_trained == 0:
        yield Stored()
        return
    reason = why_not(job.config, plans[0].phase, job.preprocessing)
    if reason:
        if trainer.is_global_zero:
            print(f"phase {name} computes its frozen stages in each epoch: {reason}", flush=True)
        yield Stored()
        return
    with ExitStack() as uses:
        yield on_all_ranks(trainer, partial(_open, job, plans, before, steps_done, files, trainer, uses))


def _open(
    job: Job,
    plans: Sequence[PhasePlan],
    before: Sequence[PhaseResult],
    steps_done: int,
    files: PhaseFiles,
    trainer: pl.Trainer,
    uses: ExitStack,
) -> Stored:
    library = _library(job, plans[0], before, steps_done, trainer.strategy.root_device)
    path, name = files.folder / FILE_NAME, plans[0].phase.name
    choice: Choice | None = None
    if trainer.is_global_zero:
        # A phase goes on as it was begun: to compute and to read rounded numbers would not give the same weights.
        begun = steps_done > 0 and path.is_file()
        choice = Choice.from_plain(json.loads(path.read_text())) if begun else _choose(job, plans, steps_done, library)
        write_json(path, choice.to_plain())
        print(f"phase {name}: {choice.why}", flush=True)
    choice = trainer.strategy.broadcast(choice)
    assert choice is not None
    if choice.cut is None or choice.recipe is None:
        return Stored()
    streams = library.streams(choice.cut, choice.recipe)
    for shelf in (shelf for stream in streams.values() for shelf in stream.shelves):
        uses.enter_context(shelf.in_use())
    error = _fill(library, choice, trainer)
    if error is None:
        return Stored(choice.cut, streams)
    told = f"activations cannot be stored in {library.store.folder}: {error}"
    if job.config.activations.store == "require" or isinstance(error, UserError):
        raise UserError(told) from error
    print(f"phase {name} computes its frozen stages in each epoch: {told}", flush=True)
    return Stored()


def _fill(library: Library, choice: Choice, trainer: pl.Trainer) -> OSError | UserError | None:
    """Build what is missing, mend what is damaged, and compare some records with their pictures.

    Returns what went wrong, on every rank where anything did on any.
    """
    assert choice.cut is not None and choice.recipe is not None
    cut, recipe, share = choice.cut, choice.recipe, (trainer.global_rank, trainer.world_size)
    fill = partial(library.fill, recipe=recipe, share=share, progress=_shows_progress(trainer))
    for work in (
        partial(fill, {cut, *choice.tapped}),
        partial(library.mend, cut, recipe, share),
        partial(fill, {cut}),
        partial(library.check, cut, recipe),
    ):
        error: OSError | UserError | None = None
        try:
            if wrong := work():
                print(f"{wrong} stored records are damaged; they are computed again", flush=True)
        except (OSError, UserError) as raised:
            error = raised
        if not trainer.strategy.reduce_boolean_decision(error is None, all=True):
            return error or OSError("another rank says why")
    return None


def _shows_progress(trainer: pl.Trainer) -> bool:
    return trainer.progress_bar_callback is not None and trainer.is_global_zero


def _library(
    job: Job, plan: PhasePlan, before: Sequence[PhaseResult], steps_done: int, device: torch.device
) -> Library:
    """The store as this phase sees it; moves the network to the device."""
    first = sum(result.epochs for result in before)
    last = first + math.ceil(plan.max_steps / plan.steps_per_epoch)
    epochs = range(first + steps_done // plan.steps_per_epoch, last)
    views = _train_views(job.config, plan.phase, job.preprocessing, epochs)
    assert isinstance(views, Views), "a phase without is refused before"
    inputs: dict[str, tuple[Samples, Views]] = {"train": (job.streams["train"], views)}
    if "val" in job.streams:
        inputs["val"] = (job.streams["val"], plain_views(job.preprocessing))
    backbone = job.network.to(device).backbone
    return Library(backbone, job.preprocessing, job.config.activations, inputs, job.config.data.workers)


def _train_views(config: Config, phase: Phase, preprocessing: Preprocessing, epochs: range) -> Views | str:
    augment = scaled(config.augment, phase.augment_strength)
    return train_views(config.activations.views, augment, preprocessing, config.seed, epochs)


def _choose(job: Job, plans: Sequence[PhasePlan], steps_done: int, library: Library) -> Choice:
    """What this phase reads, and what is stored for later ones in the same pass; rank 0 decides."""
    uses = _uses(job, plans, steps_done)
    cuts = sorted({use.frozen for use in uses})
    recipe = library.recipe(range(1, uses[0].frozen + 1))
    if job.config.activations.store == "require":
        recipe = recipe or library.new_recipe(cuts)
        require(
            library.make_room(cuts, recipe),
            f"activations.store is require, but activations.limit_gb {job.config.activations.limit_gb:g} or the disk "
            f"of {library.store.folder} has no room for what phase '{plans[0].phase.name}' needs; make some, or use "
            "auto.",
        )
        names = ", ".join([*library.backbone.stage_names, "head"][cut] for cut in cuts)
        return Choice(uses[0].frozen, tuple(cuts[:-1]), recipe, f"stores the activations at {names}")
    return _weigh(job, uses, recipe, library)


def _uses(job: Job, plans: Sequence[PhasePlan], steps_done: int) -> list[Use]:
    """The phase, and those after it that can read what one pass stores now."""
    stages, found, frozen = job.network.backbone.stage_names, [], len(job.network.backbone.stages)
    for plan in plans:
        frozen = min(frozen, frozen_stages(plan, stages))  # what an earlier phase trains is not what is stored now
        same = plan is plans[0] or (
            why_not(job.config, plan.phase, job.preprocessing) is None
            and plan.phase.augment_strength == plans[0].phase.augment_strength
        )
        if frozen and same:
            found.append(Use(plan.phase.name, frozen, _samples(job, plan, steps_done if plan is plans[0] else 0)))
    return found


def _samples(job: Job, plan: PhasePlan, steps_done: int) -> int:
    """Samples whose frozen part a phase has still to be given, validation included."""
    steps = plan.max_steps - steps_done
    every = plan.phase.validate_every_steps or plan.steps_per_epoch
    validated = math.ceil(steps / every) * len(job.streams["val"].rows) if "val" in job.streams else 0
    return round(steps / plan.steps_per_epoch * len(job.streams["train"].rows)) + validated


def _weigh(job: Job, uses: Sequence[Use], recipe: Recipe | None, library: Library) -> Choice:
    """Measure what computing and storing cost, and take what is faster."""
    load_s = _load_s(job, library)
    compute_s = _compute_s(job, library, uses[0].frozen)
    alone_s = uses[0].samples * (load_s + compute_s[uses[0].frozen])
    if sum(use.samples for use in uses) * (load_s + compute_s[uses[0].frozen]) < _WORTH_MEASURING_S:
        return Choice(None, (), None, f"computes its frozen stages in each epoch, {alone_s:.0f} s in all")
    recipe = recipe or library.new_recipe({use.frozen for use in uses})
    costs = _costs(library, load_s, compute_s, recipe)
    missing = {cut: library.missing(cut, recipe) for cut in compute_s}
    pictures = sum(len(samples.rows) for samples, _ in library.inputs.values())
    decision = decide(costs, uses, missing, pictures, library.store.free_bytes())
    cut = decision.cuts.get(uses[0].name)
    why = _explain(library, decision, costs, uses[0], missing, alone_s)
    if cut is None or not decision.pays or not library.make_room(set(decision.cuts.values()), recipe):
        return Choice(None, (), None, f"computes its frozen stages in each epoch; {why}")
    return Choice(cut, tuple(sorted(set(decision.cuts.values()) - {cut})), recipe, f"reads stored activations; {why}")


def _load_s(job: Job, library: Library) -> float:
    """Seconds that a picture takes to be read and decoded, by as many workers as there are."""
    samples = job.streams["train"]
    dataset = SampleDataset(samples, job.preprocessing, None)
    rows = samples.rows[:: max(1, len(samples.rows) // 32)][:32]
    start = time.perf_counter()
    dataset[Batch(0, rows)]
    taken = (time.perf_counter() - start) / len(rows)
    return taken / max(1, min(job.config.data.workers, len(os.sched_getaffinity(0))))


def _compute_s(job: Job, library: Library, frozen: int) -> dict[int, float]:
    """Seconds that a sample takes in training up to each cut, by how many stages stand before."""
    x = library.images("train", 32)
    backbone, found, total = library.backbone.eval(), {}, 0.0
    is_mixed = job.config.trainer.precision != "32"
    dtype = torch.float16 if job.config.trainer.precision == "16-mixed" else torch.bfloat16
    with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=is_mixed):
        x = x.contiguous(memory_format=torch.channels_last)
        for stage in range(frozen):
            total += seconds(partial(_run_stage, library, stage), x, repeats=1) / len(x)
            found[stage + 1] = total
            x = backbone.run(x, stage, stage + 1)
    return found


def _run_stage(library: Library, stage: int, x: Tensor) -> Tensor:
    return library.backbone.run(x, stage, stage + 1)


def _costs(library: Library, load_s: float, compute_s: dict[int, float], recipe: Recipe) -> Costs:
    """The rest of what a decision needs: the prefix as it would be stored, and the disk."""
    deepest = max(compute_s)
    images = library.images("train", recipe.batch)
    prefix = Prefix(library.backbone, [deepest], recipe, library.preprocessing.size)
    whole_s = seconds(prefix, images, repeats=1) / len(images)
    write, read = disk_speed(library.store.folder)
    return Costs(
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
        return f"reading them would save nothing of {alone_s:.0f} s, or there is no room in {library.store.folder}"
    name, size = [*library.backbone.stage_names, "head"][cut], costs.bytes[cut] * missing[cut] / 1e6
    return (
        f"at {name}: building {decision.build_s:.0f} s ({missing[cut]:,} records, {size:,.0f} MB), which saves "
        f"{decision.saved_s:.0f} s of this and later phases; computing takes {alone_s:.0f} s in this one"
    )
