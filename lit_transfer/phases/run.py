"""Runs a table of phases: one `Trainer.fit` each, over the steps that are still to come.

How a run that was stopped or killed goes on, in this order:

1. `tracking.open_run` refuses a directory whose fingerprint (all that decides the result) is another.
2. A phase with `checkpoints/<phase>/done.json` is finished: its weights are read from `final.safetensors`.
3. The first phase without it goes on from `checkpoints/<phase>/last.ckpt`, which is always taken when all that
   belongs to a step is done. What trains is set before DDP wraps, and the optimizer is rebuilt from the table before
   its state is read. Lightning's own way of resuming inside an epoch is not used: a fit is given the steps left.
4. Rows of `metrics.csv` behind that checkpoint are dropped; they will be written again.
5. Without a `last.ckpt` the phase starts anew from the weights of the phase before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pytorch_lightning as pl
import torch
from timm.layers import convert_sync_batchnorm

from lit_transfer.activations.data import StoredDataset, StoredStream
from lit_transfer.activations.module import StoredData
from lit_transfer.data.module import ImageData
from lit_transfer.data.quarantine import FILE_NAME as QUARANTINE
from lit_transfer.data.quarantine import Quarantine
from lit_transfer.features.initialise import start_of_head
from lit_transfer.model.augment import scaled
from lit_transfer.model.ema import Ema
from lit_transfer.model.memory import peak_memory_mib, reset_peak_memory
from lit_transfer.model.module import Stopped, TransferModule
from lit_transfer.phases.checkpoint import PhaseFiles, PhaseResult
from lit_transfer.phases.features import Features, in_memory
from lit_transfer.phases.heads import require_features, train_heads, why_not_looped
from lit_transfer.phases.job import Job, Setup
from lit_transfer.phases.optim import build_optimizer
from lit_transfer.phases.rank_zero import from_rank_0
from lit_transfer.phases.resume import finished, load_weights, read_checkpoint
from lit_transfer.phases.steps import Steps, StopSignal
from lit_transfer.phases.stored import Stored, open_stored
from lit_transfer.phases.table import PhasePlan, fingerprint_hash
from lit_transfer.phases.trainer import PhaseBar, check_machine, make_trainer, on_all_ranks, ranks_of
from lit_transfer.tracking import MetricsFile, Recorder


def run_phases(job: Job, plans: Sequence[PhasePlan], callbacks: Sequence[pl.Callback] = ()) -> list[PhaseResult]:
    """Train all phases that are not done yet; mutates the job's network. Every rank must call it.

    Args:
        job: the run.
        plans: its table.
        callbacks: called beside our own in every phase that a Trainer runs, as one fit and one epoch of Lightning's;
            heads on features in memory have none.

    Raises:
        Stopped: a signal came; the same command goes on from that step.
        RanksDiffer: ranks hold different weights at the end of a phase.
    """
    stop = StopSignal()
    metrics = MetricsFile(job.run.folder / "metrics.csv")
    names = [plan.phase.name for plan in plans]
    folders = [PhaseFiles(job.run.checkpoints(name)) for name in names]
    known = [finished(files, names[:place]) for place, files in enumerate(folders)]  # refused before any work
    results: list[PhaseResult] = []
    try:
        for place, (files, result) in enumerate(zip(folders, known, strict=True)):
            if result:
                load_weights(job.network, files.read_final(), files.folder)
            else:
                result = _run_phase(job, plans[place:], files, metrics, results, stop, callbacks)
            results.append(result)
    finally:
        stop.restore()  # a signal in the evaluation that follows must end it
    return results


def _run_phase(
    job: Job,
    plans: Sequence[PhasePlan],
    files: PhaseFiles,
    metrics: MetricsFile,
    before: list[PhaseResult],
    stop: StopSignal,
    callbacks: Sequence[pl.Callback],
) -> PhaseResult:
    """Train the first of the phases that are left, from where it stands to its end."""
    plan = plans[0]
    set_trained(job, plan)
    optimizer = build_optimizer(job.network, plan)
    saved = read_checkpoint(job.run.record, job.config, plan, files, optimizer, before)
    steps = _steps(job, plan, files, metrics, before, stop)
    trainer = make_trainer(
        job.config.trainer,
        max_epochs=1,
        accumulate_grad_batches=plan.phase.accumulate,
        gradient_clip_val=plan.phase.clip_norm,
        callbacks=[*([PhaseBar(plan.phase.name)] if job.config.trainer.progress else []), steps, *callbacks],
        logger=job.logger or False,
        enable_checkpointing=False,
        limit_val_batches=1.0 if job.config.data.val else 0,
        check_val_every_n_epoch=None,
        val_check_interval=1,
        default_root_dir=job.run.folder,
        enable_progress_bar=job.config.trainer.progress,
    )
    quarantine = Quarantine(job.run.folder / QUARANTINE, job.config.data.max_bad_fraction)
    if saved:
        load_weights(job.network, saved["network"], files.last)
        optimizer.load_state_dict(saved["optimizer"])
        if saved["precision"]:  # a phase that was begun on features in memory has none
            trainer.precision_plugin.load_state_dict(saved["precision"])
        quarantine.go_on_from(saved["quarantine"])
        steps.go_on_from(saved)
    elif not before and job.config.model.head.init != "random":
        on_all_ranks(trainer, partial(_start_head, job, trainer))
        steps.ema = steps.ema and Ema(job.network, steps.ema.decay)
    first_step = sum(result.steps for result in before)
    if trainer.is_global_zero:
        files.tidy()
        _announce(plan, steps.step)
        metrics.drop_after(plan.phase.name, first_step + steps.step, [result.name for result in before])
    reset_peak_memory()
    if not steps.reason:
        stop.restore()  # no step is near while a store is built, and what is built stays: a signal ends that at once
        with open_stored(job, plans, before, steps.step, files, trainer) as stored:
            module = build_module(job, plan, optimizer, first_step + steps.step, steps.requests, quarantine, stored.cut)
            if not _train_on_features(job, plan, trainer, module, steps, stored):
                data = build_data(job, plan, range(steps.step, plan.max_steps), before, stored.streams)
                try:
                    trainer.fit(module, datamodule=data)
                finally:
                    trainer.fit_loop.teardown()  # where validation raised, Lightning leaves training's workers alive
    job.network.cpu()
    return _end_phase(trainer, job, plan, files, steps, before)


def _start_head(job: Job, trainer: pl.Trainer) -> None:
    """Fit the head's last layer to what the backbone gives (LP-FT); mutates the network. Every rank must call it."""
    network = job.network.to(trainer.strategy.root_device)
    start = from_rank_0(partial(start_of_head, network, job.config, job.streams["train"], job.preprocessing))
    if trainer.is_global_zero:
        print(f"the head starts as a logistic regression: {start.record}", flush=True)
    start.put_into(network.cpu().head)


def _train_on_features(
    job: Job, plan: PhasePlan, trainer: pl.Trainer, module: TransferModule, steps: Steps, stored: Stored
) -> bool:
    """Train a phase's heads by the plain loop where their features fit into memory; returns whether it was done."""
    reason = why_not_looped(plan.phase, job.network)
    if reason is None and stored.cut < len(job.network.backbone.stages):
        reason = "the phase does not read the output of the whole backbone from the store"
    features: dict[str, Features] | None = None
    if reason is None and trainer.is_global_zero:  # which trains alone
        features = in_memory(stored.streams, trainer.strategy.root_device)
    if reason is None and not trainer.strategy.broadcast(features is not None):
        reason = "they do not fit into memory"
    if reason is not None:
        require_features(plan.phase, reason)
        return False
    of_streams = features or {}
    for name, found in of_streams.items():
        damaged = StoredDataset(stored.streams[name], job.preprocessing, None).damages(sorted(found.damaged))
        module.quarantine.add(name, damaged)
    train_heads(module, steps, of_streams.get("train"), of_streams.get("val"))
    return True


def set_trained(setup: Setup, plan: PhasePlan) -> None:
    """Freeze and thaw what the phase does; mutates the network. Every rank must call it, before DDP wraps."""
    phase, trainer = plan.phase, setup.config.trainer
    if phase.norm == "batch" and check_machine(trainer) and ranks_of(trainer) > 1:
        convert_sync_batchnorm(setup.network)  # timm's: PyTorch's own would drop the activations that timm fuses in
    setup.network.set_trained(
        plan.trained, phase.norm, compile=phase.compile, grad_checkpointing=phase.grad_checkpointing
    )


def _steps(
    job: Job,
    plan: PhasePlan,
    files: PhaseFiles,
    metrics: MetricsFile,
    before: Sequence[PhaseResult],
    stop: StopSignal,
) -> Steps:
    recorder = Recorder(
        metrics,
        job.logger,
        phase=plan.phase.name,
        first_epoch=sum(result.epochs for result in before),
        first_step=sum(result.steps for result in before),
        samples=len(job.streams["train"].rows),
        global_batch=plan.phase.global_batch,
        steps_per_epoch=plan.steps_per_epoch,
        log_every_steps=job.config.trainer.log_every_steps,
    )
    identity, after = fingerprint_hash(job.run.record["fingerprint"]), [result.name for result in before]
    steps = Steps(plan, job.config, files, recorder, stop, identity, after)
    if plan.phase.ema_decay is not None:
        steps.ema = Ema(job.network, plan.phase.ema_decay)
    return steps


def build_module(
    setup: Setup,
    plan: PhasePlan,
    optimizer: torch.optim.Optimizer,
    first_step: int,
    requests: Callable[[], Sequence[bool]],
    quarantine: Quarantine | None = None,
    stored_cut: int = 0,
) -> TransferModule:
    """What one fit of a phase trains; `first_step` counts the run's steps before that fit."""
    phase, objective = plan.phase, setup.config.objective
    if phase.label_smoothing is not None:
        objective = replace(objective, label_smoothing=phase.label_smoothing)
    return TransferModule(
        setup.network,
        task=setup.streams["train"].manifest.task,
        preprocessing=setup.preprocessing,
        augment=scaled(setup.config.augment, phase.augment_strength),
        objective=objective,
        class_weights=setup.class_weights,
        optimizer=optimizer,
        mixup=phase.mixup,
        cutmix=phase.cutmix,
        parts=phase.accumulate,
        seed=setup.config.seed,
        first_step=first_step,
        requests=requests,
        quarantine=quarantine or Quarantine(None, setup.config.data.max_bad_fraction),
        stored_cut=stored_cut,
    )


def build_data(
    setup: Setup,
    plan: PhasePlan,
    steps: range,
    before: Sequence[PhaseResult],
    stored: Mapping[str, StoredStream] | None = None,
) -> ImageData:
    """The streams as one fit of a phase reads them, after the phases `before`; `steps` of the phase, from 0."""
    return StoredData(
        stored or {},
        setup.streams,
        setup.preprocessing,
        seed=setup.config.seed,
        global_batch=plan.phase.global_batch,
        workers=setup.config.data.workers,
        steps=steps,
        parts=plan.phase.accumulate,
        first_epoch=sum(result.epochs for result in before),
        order=setup.config.data.order,
    )


def _end_phase(
    trainer: pl.Trainer,
    job: Job,
    plan: PhasePlan,
    files: PhaseFiles,
    steps: Steps,
    before: Sequence[PhaseResult],
) -> PhaseResult:
    """Settle the phase's final weights and mark it done; mutates the network. Every rank must call it.

    Raises:
        Stopped: a signal came after the last step.
    """
    if plan.phase.restore_best:
        assert steps.monitor.best_step is not None, "the last step is validated"
        load_weights(job.network, files.read_best(steps.monitor.best_step), files.folder)
    elif steps.ema:
        steps.ema.move_to(torch.device("cpu"))
        steps.ema.swap()
    result = _result(plan, steps, before)
    if trainer.is_global_zero:
        files.finish(job.network, result, steps.monitor.best_step)
        for earlier in before:
            PhaseFiles(job.run.checkpoints(earlier.name)).prune()
        print(f"phase {result.name} ended after {_count(result.steps)}: {result.reason}", flush=True)
    trainer.strategy.barrier()
    if trainer.strategy.reduce_boolean_decision(steps.stop(), all=False):
        raise Stopped
    return result


def _result(plan: PhasePlan, steps: Steps, before: Sequence[PhaseResult]) -> PhaseResult:
    assert steps.reason, "a fit ends with a reason"
    totals = steps.recorder.state()
    return PhaseResult(
        name=plan.phase.name,
        after=[earlier.name for earlier in before],
        epochs=math.ceil(steps.step / plan.steps_per_epoch),
        steps=steps.step,
        seconds=totals["seconds"],
        images_per_s=totals["images"] / max(totals["train_seconds"], 1e-9),
        data_wait_share=totals["wait_seconds"] / max(totals["train_seconds"], 1e-9),
        checkpoint_share=totals["checkpoint_seconds"] / max(totals["seconds"], 1e-9),
        peak_memory_mib=peak_memory_mib(),
        reason=steps.reason,
    )


def _announce(plan: PhasePlan, steps_done: int) -> None:
    rates = ", ".join(f"{name} {lr:g}" for name, lr in plan.rates.items())
    what = f"goes on from step {steps_done} of" if steps_done else "begins:"
    print(f"phase {plan.phase.name} {what} {_count(plan.max_steps)}; learning rates {rates}", flush=True)


def _count(steps: int) -> str:
    return f"{steps} step{'' if steps == 1 else 's'}"
