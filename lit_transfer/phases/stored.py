"""Whether a phase reads stored activations in the place of pictures, and which; decided once a phase.

Rank 0 decides, from a measurement or from what an earlier start of the phase left in `activations.json`, and tells the
others. Then all ranks build what is missing, together with whoever else wants the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from lit_transfer.activations.data import StoredStream
from lit_transfer.activations.library import Library
from lit_transfer.activations.views import Views, plain_views
from lit_transfer.config import Config
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.streams import Samples
from lit_transfer.errors import UserError, require
from lit_transfer.files import write_json
from lit_transfer.phases.checkpoint import PhaseFiles, PhaseResult
from lit_transfer.phases.choice import Choice, choose, epochs_of, frozen_stages, views_of, why_not, with_room
from lit_transfer.phases.job import Job
from lit_transfer.phases.table import PhasePlan
from lit_transfer.phases.trainer import on_all_ranks

FILE_NAME = "activations.json"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Stored:
    """What a phase reads in the place of pictures.

    Args:
        cut: stages that are not run any more; 0 where it reads pictures.
        streams: `train`, and `val` if the run has it; empty where it reads pictures.
    """

    cut: int = 0
    streams: dict[str, StoredStream] = field(default_factory=dict)


def check_activations(
    config: Config, plans: Sequence[PhasePlan], stages: Sequence[str], preprocessing: Preprocessing
) -> None:
    """Refuse phases that need stored activations, by `require` or for their `heads`, and cannot have them."""
    for plan in plans:
        reason = why_not(config, plan.phase, preprocessing)
        require(
            plan.phase.heads is None or reason is None,
            f"phase '{plan.phase.name}': heads trains on stored features, but {reason}.",
        )
        require(
            config.activations.store != "require" or frozen_stages(plan, stages) == 0 or reason is None,
            f"phase '{plan.phase.name}': activations.store is require, but {reason}.",
        )


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
        UserError: a stored record is not what its picture gives, `require` cannot be kept, or a phase that began with
            stored activations finds no room for them.
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
    name = plans[0].phase.name
    library = _library(job, plans[0], before, steps_done, trainer.strategy.root_device)
    began = trainer.strategy.broadcast(_begun_with(job, files) if steps_done > 0 else None)
    found: Choice | Stored | OSError | UserError | None = None
    if trainer.is_global_zero:
        found = _attempt(partial(_settle, job, plans, before, steps_done, files, library, began))
    found = trainer.strategy.broadcast(found)
    if isinstance(found, Choice):
        found = Stored() if found.cut is None else _fill(library, found, trainer, uses)
    if isinstance(found, Stored):
        return found
    if isinstance(found, UserError):
        raise found
    assert found is not None
    uses.close()
    told = f"activations cannot be stored in {library.store.folder}: {found.strerror or found}"
    require(
        began is None,
        f"{told}, but phase '{name}' began with stored ones and would end with other weights without; make room, name "
        "another activations.folder, or choose another --name.",
    )
    require(
        job.config.activations.store != "require",
        f"{told}, but activations.store is require; make room, name another activations.folder, or use auto.",
    )
    if trainer.is_global_zero:
        print(f"phase {name} computes its frozen stages in each epoch: {told}", flush=True)
        write_json(files.folder / FILE_NAME, Choice(None, (), None, told).to_plain())
    return Stored()


def _settle(
    job: Job,
    plans: Sequence[PhasePlan],
    before: Sequence[PhaseResult],
    steps_done: int,
    files: PhaseFiles,
    library: Library,
    began: Choice | None,
) -> Choice:
    """What the phase reads, written down: rank 0 decides."""
    choice = began
    if choice is None:
        choice = choose(job, plans, before, steps_done, library)
        write_json(files.folder / FILE_NAME, choice.to_plain())
    elif choice.cut is not None and choice.recipe is not None:
        recipe = library.here(choice.recipe)  # another machine may have begun it
        choice = replace(choice, recipe=recipe, tapped=with_room(library, choice.cut, choice.tapped, recipe))
    print(f"phase {plans[0].phase.name}: {choice.why}", flush=True)
    return choice


def _begun_with(job: Job, files: PhaseFiles) -> Choice | None:
    """What a phase goes on with: to compute and to read rounded numbers would not give the same weights.

    None where nothing was decided, or where it was to compute and `require` has been agreed to since.
    """
    choice = read_choice(files)
    computes = choice is not None and choice.cut is None
    return None if computes and job.config.activations.store == "require" else choice


def read_choice(files: PhaseFiles) -> Choice | None:
    """What a phase has decided in an earlier start; None if nothing was decided."""
    path = files.folder / FILE_NAME
    return Choice.from_plain(json.loads(path.read_text())) if path.is_file() else None


def _fill(library: Library, choice: Choice, trainer: pl.Trainer, uses: ExitStack) -> Stored | OSError | UserError:
    """Build what is missing, mend what is damaged, and compare some records with their pictures.

    Returns what can be read then, or what went wrong on any rank; the same on every rank.
    """
    assert choice.cut is not None and choice.recipe is not None
    cut, recipe, share = choice.cut, choice.recipe, (trainer.global_rank, trainer.world_size)
    progress = _shows_progress(trainer)
    for work in library.opening_steps(cut, recipe, choice.tapped, uses=uses, share=share, progress=progress):
        results = _of_all_ranks(trainer, _attempt(work))
        for error in (result for result in results if isinstance(result, OSError | UserError)):
            return error
        wrong = sum(result for result in results if isinstance(result, int))
        if wrong and trainer.is_global_zero:
            print(f"{wrong} stored records are damaged; they are computed again", flush=True)
    return Stored(cut, library.streams(cut, recipe))


def _attempt(work: Callable[[], Result]) -> Result | OSError | UserError:
    """What a function gives, or raises: others wait for this rank, and must hear of it."""
    try:
        return work()
    except (OSError, UserError) as error:
        return error


def _of_all_ranks(trainer: pl.Trainer, result: Result) -> list[Result]:
    """What every rank has, on every rank."""
    results = [result] * trainer.world_size
    if trainer.world_size > 1:
        dist.all_gather_object(results, result)
    return results


def _shows_progress(trainer: pl.Trainer) -> bool:
    return trainer.progress_bar_callback is not None and trainer.is_global_zero


def _library(
    job: Job, plan: PhasePlan, before: Sequence[PhaseResult], steps_done: int, device: torch.device
) -> Library:
    """The store as this phase sees it; moves the network to the device."""
    first_epoch = sum(result.epochs for result in before)
    views = views_of(job.config, plan.phase, job.preprocessing, epochs_of(plan, first_epoch, steps_done))
    assert isinstance(views, Views), "a phase without is refused before"
    inputs: dict[str, tuple[Samples, Views]] = {"train": (job.streams["train"], views)}
    if "val" in job.streams:
        inputs["val"] = (job.streams["val"], plain_views(job.preprocessing))
    backbone = job.network.to(device).backbone
    return Library(backbone, job.preprocessing, job.config.activations, inputs, job.config.data.workers)
