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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import WandbLogger
from timm.layers import convert_sync_batchnorm

from lit_transfer.config import Config
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.module import ImageData, Samples
from lit_transfer.errors import require
from lit_transfer.model.augment import scaled
from lit_transfer.model.ema import Ema
from lit_transfer.model.memory import peak_memory_mib, reset_peak_memory
from lit_transfer.model.module import Stopped, TransferModule
from lit_transfer.model.network import Network
from lit_transfer.phases.agreement import check_ranks_equal
from lit_transfer.phases.checkpoint import PhaseFiles, PhaseResult
from lit_transfer.phases.optim import build_optimizer
from lit_transfer.phases.steps import Steps, StopSignal
from lit_transfer.phases.table import PhasePlan, fingerprint_hash
from lit_transfer.phases.trainer import PhaseBar, check_machine, make_trainer, ranks_of
from lit_transfer.tracking import MetricsFile, Recorder, Run


@dataclass(frozen=True)
class Setup:
    """What phases train, and on what; `network` is mutated by training."""

    config: Config
    network: Network
    streams: dict[str, Samples]
    preprocessing: Preprocessing
    class_weights: torch.Tensor | None


@dataclass(frozen=True)
class Job(Setup):
    """What every phase of a run shares: the setup, the run directory, and where its curves are also sent."""

    run: Run
    logger: WandbLogger | None


def run_phases(job: Job, plans: Sequence[PhasePlan], callbacks: Sequence[pl.Callback] = ()) -> list[PhaseResult]:
    """Train all phases that are not done yet; mutates the job's network. Every rank must call it.

    Args:
        job: the run.
        plans: its table.
        callbacks: called beside our own in every phase; each phase is one fit and one epoch of Lightning's.

    Raises:
        Stopped: a signal came; the same command goes on from that step.
        RanksDiffer: ranks hold different weights at the end of a phase.
    """
    stop = StopSignal()
    metrics = MetricsFile(job.run.folder / "metrics.csv")
    results: list[PhaseResult] = []
    for plan in plans:
        files = PhaseFiles(job.run.checkpoints(plan.phase.name))
        result = files.result()
        if result:
            job.network.load_state_dict(files.read_final())
        else:
            result = _run_phase(job, plan, files, metrics, results, stop, callbacks)
        results.append(result)
    return results


def _run_phase(
    job: Job,
    plan: PhasePlan,
    files: PhaseFiles,
    metrics: MetricsFile,
    before: list[PhaseResult],
    stop: StopSignal,
    callbacks: Sequence[pl.Callback],
) -> PhaseResult:
    """Train one phase from where it stands to its end."""
    set_trained(job, plan)
    optimizer = build_optimizer(job.network, plan)
    saved = _checkpoint(job, plan, files, optimizer)
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
    if saved:
        job.network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        trainer.precision_plugin.load_state_dict(saved["precision"])
        steps.go_on_from(saved)
    first_step = sum(result.steps for result in before)
    module = build_module(job, plan, optimizer, first_step + steps.step, steps.requests)
    if trainer.is_global_zero:
        files.tidy()
        _announce(plan, steps.step)
        metrics.drop_after(plan.phase.name, first_step + steps.step, [result.name for result in before])
    reset_peak_memory()
    if not steps.reason:
        try:
            trainer.fit(module, datamodule=build_data(job, plan, range(steps.step, plan.max_steps), before))
        finally:
            trainer.fit_loop.teardown()  # where validation raised, Lightning leaves the workers of training alive
    module.cpu()
    return _end_phase(trainer, job, plan, files, steps, before)


def _checkpoint(
    job: Job, plan: PhasePlan, files: PhaseFiles, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """What the phase goes on from; None where it starts anew, also after a change of what trains.

    Raises:
        UserError: the checkpoint belongs to another run, or to settings that were not agreed to be changed.
    """
    saved = files.read_last()
    if saved is None:
        return None
    record = job.run.record
    now = fingerprint_hash(record["fingerprint"])
    known = [now, *(fingerprint_hash(earlier["fingerprint"]) for earlier in record.get("earlier", []))]
    require(
        saved["identity"] in known,
        f"{files.last} is of a run with other settings; remove it, or choose another --name.",
    )
    if saved["identity"] != now:
        old, new = saved["optimizer"], optimizer.state_dict()
        if _settings(old) != _settings(new) or (saved["ema"] is None) != (plan.phase.ema_decay is None):
            print(f"phase {plan.phase.name} trains otherwise than before, and starts anew", flush=True)
            return None
        old["param_groups"] = new["param_groups"]  # or the weight decay would be that of before
        saved["reason"] = None  # it may be longer now
    if saved["step"] >= plan.max_steps and saved["reason"] is None:
        saved["reason"] = f"{plan.max_steps} steps were done already"
    return saved


def _settings(state: dict[str, Any]) -> list[dict[str, Any]]:
    """What of an optimizer's groups must be as it was for its state to have a meaning."""
    return [{k: v for k, v in group.items() if k not in ("lr", "weight_decay")} for group in state["param_groups"]]


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
        log_every_steps=job.config.trainer.log_every_steps,
    )
    steps = Steps(plan, job.config, files, recorder, stop, fingerprint_hash(job.run.record["fingerprint"]))
    if plan.phase.ema_decay is not None:
        steps.ema = Ema(job.network, plan.phase.ema_decay)
    return steps


def build_module(
    setup: Setup,
    plan: PhasePlan,
    optimizer: torch.optim.Optimizer,
    first_step: int,
    requests: Callable[[], Sequence[bool]],
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
    )


def build_data(setup: Setup, plan: PhasePlan, steps: range, before: Sequence[PhaseResult]) -> ImageData:
    """The streams as one fit of a phase reads them, after the phases `before`; `steps` of the phase, from 0."""
    return ImageData(
        setup.streams,
        setup.preprocessing,
        seed=setup.config.seed,
        global_batch=plan.phase.global_batch,
        workers=setup.config.data.workers,
        steps=steps,
        parts=plan.phase.accumulate,
        first_epoch=sum(result.epochs for result in before),
    )


def _end_phase(
    trainer: pl.Trainer,
    job: Job,
    plan: PhasePlan,
    files: PhaseFiles,
    steps: Steps,
    before: Sequence[PhaseResult],
) -> PhaseResult:
    """Settle the phase's final weights, prove them equal on all ranks, and mark the phase done."""
    assert steps.reason, "a fit ends with a reason"
    if dist.is_initialized():  # before restore_best, which would hide a difference
        tensors = dict(job.network.state_dict()) | {
            f"ema.{k}": v for k, v in (steps.ema.weights if steps.ema else {}).items()
        }
        check_ranks_equal(tensors, trainer.strategy.root_device, f"phase '{plan.phase.name}'")
    if plan.phase.restore_best:
        assert steps.monitor.best_step is not None, "restore_best needs validation: checked by resolve"
        job.network.load_state_dict(files.read_best(steps.monitor.best_step))
    elif steps.ema:
        steps.ema.move_to(torch.device("cpu"))
        steps.ema.swap()
    totals = steps.recorder.state()
    result = PhaseResult(
        name=plan.phase.name,
        epochs=math.ceil(steps.step / plan.steps_per_epoch),
        steps=steps.step,
        seconds=totals["seconds"],
        images_per_s=totals["images"] / max(totals["train_seconds"], 1e-9),
        data_wait_share=totals["wait_seconds"] / max(totals["train_seconds"], 1e-9),
        checkpoint_share=totals["checkpoint_seconds"] / max(totals["seconds"], 1e-9),
        peak_memory_mib=peak_memory_mib(),
        reason=steps.reason,
    )
    if trainer.is_global_zero:
        files.finish(job.network, result, steps.monitor.best_step)
        for earlier in before:
            PhaseFiles(job.run.checkpoints(earlier.name)).prune()
        print(f"phase {result.name} ended after {result.steps} steps: {result.reason}", flush=True)
    trainer.strategy.barrier()
    if trainer.strategy.reduce_boolean_decision(steps.stop(), all=False):  # it came after the last step
        raise Stopped
    return result


def _announce(plan: PhasePlan, steps_done: int) -> None:
    rates = ", ".join(f"{name} {lr:g}" for name, lr in plan.rates.items())
    what = f"goes on from step {steps_done} of" if steps_done else "begins:"
    print(
        f"phase {plan.phase.name} {what} {plan.max_steps} steps; trains from {plan.cut}, learning rates {rates}",
        flush=True,
    )
