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

import inspect
import json
import logging
import signal
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import DDPStrategy, Strategy
from safetensors.torch import load_file, save
from torch.nn.parallel import DistributedDataParallel

from lit_transfer.config import Config
from lit_transfer.config import Trainer as TrainerConfig
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.module import ImageData, Samples
from lit_transfer.errors import require
from lit_transfer.files import replacing, write_json
from lit_transfer.model.module import Predictions, TransferModule
from lit_transfer.model.network import Network
from lit_transfer.phases.optim import build_optimizer, set_lr
from lit_transfer.phases.table import PhasePlan
from lit_transfer.tracking import MetricsFile, Recorder, Run

_SYNC_BUFFERS = (  # the same switch, renamed in torch 2.15
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


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


class _Schedule(pl.Callback):
    """Sets the learning rates of a step, and keeps our signal handlers in place of Lightning's.

    Lightning's own SIGTERM handler broadcasts from inside the handler, which can fall into a backward pass.
    """

    def __init__(self, plan: PhasePlan, stop: StopSignal) -> None:
        self.plan = plan
        self.stop = stop

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.install()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        set_lr(trainer.optimizers[0], self.plan, trainer.global_step)


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


def ranks_of(config: TrainerConfig) -> int:
    """Ranks over all nodes, as the config asks for on this machine."""
    per_node = 1 if config.accelerator == "cpu" else max(1, torch.cuda.device_count())
    return (per_node if config.devices == "auto" else config.devices) * config.num_nodes


def check_machine(config: TrainerConfig) -> bool:
    """Whether the run is computed on GPUs.

    Raises:
        UserError: a precision or an accelerator that this machine does not have.
    """
    on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    require(
        on_gpu or config.accelerator != "gpu",
        "trainer.accelerator is gpu but no GPU is visible; use auto or cpu.",
    )
    require(
        on_gpu or config.precision != "16-mixed",
        "trainer.precision 16-mixed needs a GPU and none is visible; use bf16-mixed or 32.",
    )
    return on_gpu


def make_trainer(config: TrainerConfig, **settings: Any) -> pl.Trainer:
    """A fresh Trainer; DDP wraps anew in each, which is what makes thawing right on several ranks."""
    on_gpu = check_machine(config)
    _quiet()
    strategy: Strategy | str = "auto"
    if ranks_of(config) > 1 or config.strategy == "ddp":
        # Buffers are equal on all ranks already (frozen, or shared before each validation): see model/module.py.
        unsynced: dict[str, Any] = {_SYNC_BUFFERS: False}
        strategy = DDPStrategy(**unsynced)
    precision: Any = {"32": "32-true"}.get(config.precision, config.precision)
    return pl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=config.devices if config.devices != "auto" or on_gpu else 1,
        num_nodes=config.num_nodes,
        strategy=strategy,
        precision=precision,
        deterministic=config.deterministic,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )


def _quiet() -> None:
    """Keep Lightning's banners, and warnings about what is meant here, out of the terminal."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*module\(s\) in eval mode at the start of training",  # frozen stages are
        r".*does not have many workers",  # data.workers is the user's choice
        r".*isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with torch 2.15
        r".*Checkpoint directory .* exists and is not empty",  # a resumed phase
    ):
        warnings.filterwarnings("ignore", message=message)


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
    data = ImageData(
        job.streams,
        job.preprocessing,
        seed=config.seed,
        global_batch=phase.global_batch,
        first_epoch=first_epoch,
        workers=config.data.workers,
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
    folder = job.run.checkpoints(phase.name)
    last = folder / "last.ckpt"
    callbacks = [_Schedule(plan, stop), *_phase_callbacks(config, plan, folder), recorder]
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
        metrics.drop_after(phase.name, first_step + _steps_in(last), [r.name for r in before])
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
        callbacks.append(ModelCheckpoint(filename="best", monitor=config.monitor, mode=mode, **common))
    return [*callbacks, ModelCheckpoint(filename="last", **common)]


def _steps_in(checkpoint: Path) -> int:
    if not checkpoint.is_file():
        return 0
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


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


def predict_stream(
    config: TrainerConfig, module: TransferModule, samples: Samples, *, global_batch: int, workers: int
) -> Predictions:
    """What a network says of every sample of a stream, each once; every rank must call it, every rank gets all."""
    data = ImageData(
        {"val": samples},
        module.preprocessing,
        seed=0,
        global_batch=global_batch,
        first_epoch=0,
        workers=workers,
    )
    callbacks: list[pl.Callback] = [TQDMProgressBar()] if config.progress else []
    trainer = make_trainer(
        config,
        logger=False,
        enable_checkpointing=False,
        callbacks=callbacks,
        enable_progress_bar=config.progress,
    )
    trainer.validate(module, datamodule=data, verbose=False)
    module.cpu()
    assert module.predictions is not None, "validation gathers them"
    return module.predictions
