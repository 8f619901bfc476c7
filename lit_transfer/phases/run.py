"""Runs a table of phases: one `Trainer.fit` each.

How a run that was stopped goes on, in this order:

1. `tracking.open_run` refuses a directory whose fingerprint (all that decides the result) is another.
2. A phase with `checkpoints/<phase>/done.json` is finished: its weights are read from `final.safetensors`.
3. The first phase without it goes on from `checkpoints/<phase>/last.ckpt`, the end of its last whole epoch.
   The cut is set before DDP wraps, and the optimizer is rebuilt from the table before its state is read.
4. Rows of `metrics.csv` behind that checkpoint are dropped; they will be written again.
5. Without a `last.ckpt` the phase starts anew from the weights of the phase before.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import WandbLogger
from safetensors.torch import load_file, save
from timm.layers import convert_sync_batchnorm

from lit_transfer.config import Config
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.module import ImageData, Samples
from lit_transfer.errors import require
from lit_transfer.files import replacing, write_json
from lit_transfer.model.module import Stopped, TransferModule
from lit_transfer.model.network import Network
from lit_transfer.phases.optim import build_optimizer, set_lr
from lit_transfer.phases.table import PhasePlan, fingerprint_hash
from lit_transfer.phases.trainer import check_machine, make_trainer, ranks_of
from lit_transfer.tracking import MetricsFile, Recorder, Run


class StopSignal:
    """Remembers SIGINT and SIGTERM; the ranks agree on it at the next step. A second SIGINT ends at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def install(self) -> None:
        """Take over both signals; main thread only."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, b"\nstopping at the next step; Ctrl-C again ends at once\n")  # print is not safe in a handler


class _Schedule(pl.Callback):
    """Sets the learning rates of a step, and keeps our signal handlers in place of Lightning's.

    Lightning's own SIGTERM handler broadcasts from inside the handler, which can fall into a backward pass.
    """

    def __init__(self, plan: PhasePlan, stop: StopSignal, watched: Sequence[str], fingerprint: str) -> None:
        self.plan = plan
        self.stop = stop
        self.watched = watched
        self.fingerprint = fingerprint

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        require(
            state_dict["fingerprint"] == self.fingerprint,
            "the checkpoint is of a run with other settings; remove it, or choose another --name.",
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.install()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        set_lr(trainer.optimizers[0], self.plan, trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for metric in self.watched:  # Lightning would take NaN for the end of the phase, and keep its first epoch
            value = float(trainer.callback_metrics[metric])
            require(
                math.isfinite(value),
                f"{metric} is {value} after epoch {trainer.current_epoch} of phase '{self.plan.phase.name}': none is "
                "the best; a class may be missing from data.val: monitor val/loss instead.",
            )


class _Checkpoint(ModelCheckpoint):
    """Remembers its best score also where the run directory has been moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"dirpath": self.dirpath})


@dataclass(frozen=True)
class PhaseResult:
    """What became of a phase: also the content of its `done.json`.

    Args:
        name: of the phase.
        epochs: whole epochs trained.
        steps: optimizer steps.
        seconds: wall clock, validation and checkpoints included, over all its restarts.
        images_per_s: while training.
        data_wait_share: share of the training time spent waiting for data.
        reason: why it ended.
    """

    name: str
    epochs: int
    steps: int
    seconds: float
    images_per_s: float
    data_wait_share: float
    reason: str


def improves_downwards(metric: str) -> bool:
    """Whether smaller is better."""
    return metric.split("/")[-1] in ("loss", "mae", "rmse", "mse")


@dataclass(frozen=True)
class Job:
    """What every phase of a run shares; `network` is mutated by training."""

    config: Config
    network: Network
    streams: dict[str, Samples]
    preprocessing: Preprocessing
    class_weights: torch.Tensor | None
    run: Run
    logger: WandbLogger | None


def run_phases(job: Job, plans: list[PhasePlan]) -> list[PhaseResult]:
    """Train all phases that are not done yet; mutates the job's network. Every rank must call it.

    Raises:
        Stopped: a signal came; the same command goes on from the last whole epoch.
    """
    stop = StopSignal()
    metrics = MetricsFile(job.run.folder / "metrics.csv")
    results: list[PhaseResult] = []
    for plan in plans:
        done = job.run.checkpoints(plan.phase.name) / "done.json"
        if done.is_file():
            job.network.load_state_dict(load_file(done.with_name("final.safetensors")))
            results.append(PhaseResult(**json.loads(done.read_text())))
        else:
            results.append(_run_phase(job, plan, metrics, results, stop))
    return results


def _run_phase(
    job: Job, plan: PhasePlan, metrics: MetricsFile, before: list[PhaseResult], stop: StopSignal
) -> PhaseResult:
    config, phase = job.config, plan.phase
    first_epoch, first_step = sum(r.epochs for r in before), sum(r.steps for r in before)
    if phase.norm == "batch" and check_machine(config.trainer) and ranks_of(config.trainer) > 1:
        convert_sync_batchnorm(job.network)  # timm's: PyTorch's own would drop the activations that timm fuses in
    job.network.set_cut(plan.cut, phase.norm)
    module = TransferModule(
        job.network,
        task=job.streams["train"].manifest.task,
        preprocessing=job.preprocessing,
        augment=config.augment,
        objective=config.objective,
        class_weights=job.class_weights,
        optimizer=build_optimizer(job.network, plan),
        seed=config.seed,
        first_step=first_step,
        stop_requested=stop,
    )
    folder = job.run.checkpoints(phase.name)
    last = folder / "last.ckpt"
    epochs_done, steps_done = _done_in(last)
    data = ImageData(
        job.streams,
        job.preprocessing,
        seed=config.seed,
        global_batch=phase.global_batch,
        first_epoch=first_epoch,
        workers=config.data.workers,
        epochs_done=epochs_done,
    )
    recorder = Recorder(
        metrics,
        job.logger,
        phase=phase.name,
        first_epoch=first_epoch,
        first_step=first_step,
        samples=len(job.streams["train"].rows),
        global_batch=phase.global_batch,
        log_every_steps=config.trainer.log_every_steps,
    )
    watched = [config.monitor, *([phase.until.metric] if phase.until else [])] if "val" in job.streams else []
    schedule = _Schedule(plan, stop, watched, fingerprint_hash(job.run.record["fingerprint"]))
    callbacks = [schedule, *_phase_callbacks(config, plan, folder), recorder]
    trainer = make_trainer(
        config.trainer,
        max_epochs=phase.max_epochs,
        callbacks=callbacks,
        logger=job.logger or False,
        default_root_dir=job.run.folder,
        enable_progress_bar=config.trainer.progress,
    )
    if trainer.is_global_zero:
        _announce(plan, last.is_file())
        metrics.drop_after(phase.name, first_step + steps_done, [r.name for r in before])
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    if phase.restore_best:
        best = torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)
        module.load_state_dict(best["state_dict"])
    module.cpu()
    result = PhaseResult(
        name=phase.name,
        epochs=trainer.current_epoch,
        steps=trainer.global_step,
        seconds=recorder.seconds,
        images_per_s=recorder.images / max(recorder.train_seconds, 1e-9),
        data_wait_share=recorder.wait_seconds / max(recorder.train_seconds, 1e-9),
        reason=_reason(trainer, callbacks),
    )
    if trainer.is_global_zero:
        _finish(folder, job.network, result)
    trainer.strategy.barrier()
    if trainer.strategy.reduce_boolean_decision(stop(), all=False):  # it came after the last step
        raise Stopped
    return result


def _phase_callbacks(config: Config, plan: PhasePlan, folder: Path) -> list[pl.Callback]:
    callbacks: list[pl.Callback] = [TQDMProgressBar()] if config.trainer.progress else []
    mode = "min" if improves_downwards(config.monitor) else "max"
    common: dict[str, Any] = {
        "dirpath": folder,
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
    }
    until = plan.phase.until
    if until:
        until_mode = "min" if improves_downwards(until.metric) else "max"
        callbacks.append(
            EarlyStopping(until.metric, min_delta=until.min_delta, patience=until.patience, mode=until_mode)
        )
    if config.data.val is not None:
        callbacks.append(_Checkpoint(filename="best", monitor=config.monitor, mode=mode, **common))
    return [*callbacks, _Checkpoint(filename="last", **common)]


def _done_in(checkpoint: Path) -> tuple[int, int]:
    """Whole epochs and optimizer steps of the phase that a `last.ckpt` holds; none if there is none."""
    if not checkpoint.is_file():
        return 0, 0
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return int(saved["epoch"]) + 1, int(saved["global_step"])


def _announce(plan: PhasePlan, resumed: bool) -> None:
    rates = ", ".join(f"{group.name} {group.lr:g}" for group in plan.groups)
    what = "goes on" if resumed else "begins"
    print(
        f"phase {plan.phase.name} {what}: trains {plan.cut}, learning rates {rates}, {plan.max_steps} steps",
        flush=True,
    )


def _reason(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> str:
    stopper = next((c for c in callbacks if isinstance(c, EarlyStopping)), None)
    if stopper and stopper.stopped_epoch:
        return f"{stopper.monitor} has not improved for {stopper.patience} validations"
    return f"max_epochs {trainer.max_epochs} reached"


def _finish(folder: Path, network: Network, result: PhaseResult) -> None:
    """Write the phase's final weights, then the mark that it is done."""
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    with replacing(folder / "final.safetensors") as temporary:
        temporary.write_bytes(save(state))  # save_file would make it unreadable for the rest of the group
    write_json(folder / "done.json", asdict(result))
    print(f"phase {result.name} ended after {result.epochs} epochs: {result.reason}", flush=True)
