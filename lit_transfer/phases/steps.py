"""What happens between the optimizer steps of a phase: one order, the same decisions on every rank.

After each step: the average of the weights, the curves, validation if it is due, what validation decides, a
checkpoint if it is due, the end of the phase, a stop that was asked for. A checkpoint is therefore always taken when
all that belongs to its step is done, and the position in a phase is one number: the steps done. Lightning's hooks
follow these rules, and so does the plain loop of `head_loop.py`.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_transfer.config import Config
from lit_transfer.errors import require
from lit_transfer.model.ema import Ema
from lit_transfer.model.module import Stopped, TransferModule
from lit_transfer.phases.agreement import check_ranks_equal
from lit_transfer.phases.checkpoint import PhaseFiles
from lit_transfer.phases.optim import current_lr, set_lr
from lit_transfer.phases.table import PhasePlan
from lit_transfer.phases.watch import Watch, reason_to_end
from lit_transfer.tracking import Recorder


class StopSignal:
    """Remembers SIGINT and SIGTERM; the ranks agree on it at the next step. A second SIGINT ends at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def install(self) -> None:
        """Take over both signals; main thread only."""
        for number in self._before:
            signal.signal(number, self._handle)

    def restore(self) -> None:
        """Give both signals back to who had them when this object was made; main thread only."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, b"\nstopping at the next step; Ctrl-C again ends at once\n")  # print is not safe in a handler


def trained_of(plan: PhasePlan) -> list[tuple[str, list[str]]]:
    """What a phase trains, by groups, and as how many heads: an optimizer's state has a meaning for these alone."""
    groups, heads = [(group.name, list(group.parameters)) for group in plan.groups], plan.phase.heads
    if heads is None:
        return groups
    return [*groups, (f"{len(heads.lr)} lr, {len(heads.weight_decay)} weight_decay, seeds {heads.seeds}", [])]


class Steps(pl.Callback):
    """Runs the rules of a phase between its steps; hands the module its questions to all ranks (`requests`).

    Args:
        plan: of the phase.
        config: its `monitor` and `checkpoint` are read.
        files: of the phase.
        recorder: of the phase.
        stop: whether a signal has come.
        identity: what a checkpoint must carry to be gone on from: the hash of the run's fingerprint.
        after: names of the phases before it.
    """

    def __init__(
        self,
        plan: PhasePlan,
        config: Config,
        files: PhaseFiles,
        recorder: Recorder,
        stop: StopSignal,
        identity: str,
        after: Sequence[str],
    ) -> None:
        self.plan, self.config, self.files, self.recorder = plan, config, files, recorder
        self.stop, self.identity, self.after = stop, identity, list(after)
        phase = plan.phase
        args = phase.full_schedule_args
        self.step = 0
        self.drops = 0
        self.reason: str | None = None
        self.ema: Ema | None = None
        self.heads: dict[str, Any] | None = None  # the state of many (see many_heads.py)
        self.saves_epochs = True  # not where an epoch is shorter than writing a checkpoint
        self._best: dict[str, Tensor] = {}  # what the next checkpoint will keep as the best
        self.monitor = Watch(config.monitor)
        self.until = Watch(phase.until.metric, phase.until.min_delta) if phase.until else None
        self.plateau = Watch(args["metric"], args["min_delta"]) if phase.schedule == "plateau" else None
        self._validates = config.data.val is not None
        self._saved_at = time.monotonic()

    @property
    def run_step(self) -> int:
        """Steps of the run so far, those of earlier phases included."""
        return self.recorder.first_step + self.step

    def requests(self) -> tuple[bool, bool, bool]:
        """What this rank asks at a step: to stop, to end the phase for its time, to save for the time gone by."""
        minutes, every = self.plan.phase.max_minutes, self.config.checkpoint.every_minutes
        return (
            self.stop(),
            minutes is not None and self.recorder.seconds >= minutes * 60,
            every is not None and time.monotonic() - self._saved_at >= every * 60,
        )

    def state(self, module: TransferModule, precision: dict[str, Any]) -> dict[str, Any]:
        """All that going on from this step needs, as plain values and tensors; equal on every rank but for times."""
        return {
            "identity": self.identity,
            "after": self.after,
            "trained": trained_of(self.plan),
            "steps_per_epoch": self.plan.steps_per_epoch,
            "global_batch": self.plan.phase.global_batch,
            "step": self.step,
            "reason": self.reason,
            "network": module.network.state_dict(),
            "optimizer": module.configure_optimizers().state_dict(),
            "ema": self.ema.weights if self.ema else None,
            "precision": precision,
            "watches": {name: watch.state() for name, watch in self._watches().items()},
            "drops": self.drops,
            "heads": self.heads,
            "quarantine": module.quarantine.state(),
            "recorder": self.recorder.state(),
        }

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave, but for the network, the optimizer, the precision and the quarantine."""
        self.step, self.reason, self.drops, self.heads = (state[key] for key in ("step", "reason", "drops", "heads"))
        if self.ema:
            self.ema.load(state["ema"])
        for name, watch in self._watches().items():
            watch.go_on_from(state["watches"].get(name, watch.state()))
        self.recorder.go_on_from(state["recorder"])

    def _watches(self) -> dict[str, Watch]:
        named = {"monitor": self.monitor, "until": self.until, "plateau": self.plateau}
        return {name: watch for name, watch in named.items() if watch}

    def start(self, device: torch.device) -> None:
        """What follows is training on a device."""
        self.stop.install()
        if self.ema:
            self.ema.move_to(device)
        self.recorder.mark()

    def step_done(self, optimizer: torch.optim.Optimizer, loss: Callable[[], float], *, time_is_up: bool) -> bool:
        """Count a step after its update; whether it is validated before it ends. Mutates the average of the weights.

        Args:
            optimizer: of the phase.
            loss: of the step; asked for where the step has a row in the curves.
            time_is_up: whether the ranks agreed that the phase has lasted `max_minutes`.
        """
        self.step += 1
        if self.ema:
            self.ema.update()
        if self.recorder.step_ended(self.step):
            self.recorder.write_step(self.step, loss(), current_lr(optimizer, self.plan))
        if self.step >= self.plan.max_steps:
            self.reason = self._limit_reached()
        elif time_is_up:
            self.reason = f"max_minutes {self.plan.phase.max_minutes:g} reached"
        every = self.plan.phase.validate_every_steps or self.plan.steps_per_epoch
        return self._validates and (self.reason is not None or self.step % every == 0)

    def show_average(self) -> None:
        """Put the average of the weights into the network, for a validation; `take` puts the weights back."""
        if self.ema:
            self.ema.swap()

    def take(self, values: dict[str, float], network: nn.Module, *, is_writer: bool) -> None:
        """Decide by the metrics of a validation; mutates the network, which gets its own weights back.

        Args:
            values: by name, the same on every rank.
            network: that was validated.
            is_writer: whether this rank keeps the best weights.
        """
        self.recorder.write(self.step, values)
        for watch in self._watches().values():
            self._check_finite(watch.metric, values[watch.metric])
        if self.monitor.see(values[self.monitor.metric], self.step) and is_writer:
            self._keep_best(network)
        if self.ema:
            self.ema.swap()
        if self.plateau:
            self.plateau.see(values[self.plateau.metric], self.step)
            if self.plateau.waited >= self.plan.phase.full_schedule_args["patience"]:
                self.drops, self.plateau.waited = self.drops + 1, 0
        if self.until:
            assert self.plan.phase.until
            self.until.see(values[self.until.metric], self.step)
            met = reason_to_end(self.plan.phase.until, self.until, values[self.until.metric])
            self.reason = met or self.reason

    def _keep_best(self, network: nn.Module) -> None:
        """Keep the weights of this step: on disk, or in memory where epochs are shorter than writing them takes."""
        if self.saves_epochs:
            with self.recorder.saving():
                self.files.write_best(network.state_dict(), self.step)
        else:
            self._best = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}

    def saves(self, agreed: Sequence[bool]) -> bool:
        """Whether the step ends with a checkpoint; `agreed`: what any rank asked for (see `requests`)."""
        stop, _, time_to_save = agreed
        every = self.config.checkpoint.every_steps
        epoch_ends = self.saves_epochs and self.step % self.plan.steps_per_epoch == 0
        is_due = epoch_ends or (every is not None and self.step % every == 0)
        return is_due or stop or time_to_save or self.reason is not None

    def end_step(
        self, module: TransferModule, agreed: Sequence[bool], precision: dict[str, Any], *, is_writer: bool
    ) -> None:
        """Save if it is due, and stop the run if that was asked for.

        Raises:
            Stopped: a signal came, and the phase has not ended anyway.
        """
        if self.saves(agreed):
            self._saved_at = time.monotonic()
            if is_writer:
                with self.recorder.saving():
                    if self._best:
                        assert self.monitor.best_step is not None
                        self.files.write_best({**module.network.state_dict(), **self._best}, self.monitor.best_step)
                        self._best = {}
                    self.files.write_last(self.state(module, precision), self.monitor.best_step)
        if agreed[0] and not self.reason:
            raise Stopped
        self.recorder.mark()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep our signal handlers: Lightning's own broadcasts from inside, which can fall into a backward pass."""
        self.start(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch has come; give the optimizer the rates of this step."""
        self.recorder.batch_came()
        set_lr(trainer.optimizers[0], self.plan, self.step, self.drops)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last part of a step: count it, and see what is due."""
        assert isinstance(pl_module, TransferModule)
        trainer.val_check_batch = math.inf
        if (batch_idx + 1) % self.plan.phase.accumulate:
            self.recorder.part_ended()
            return
        pl_module.share_running_statistics()
        if self.step_done(trainer.optimizers[0], lambda: pl_module.train_loss, time_is_up=pl_module.agreed[1]):
            trainer.val_check_batch = 1
        else:
            self._end_step(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The average of the weights is what is validated."""
        self.show_average()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take its metrics, decide by them, and end the step."""
        assert isinstance(pl_module, TransferModule)
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        values = trainer.strategy.broadcast(values)  # so that no rank decides by itself
        self.take(values, pl_module.network, is_writer=trainer.is_global_zero)
        self._end_step(trainer, pl_module)

    def _end_step(self, trainer: pl.Trainer, module: TransferModule) -> None:
        """End the step, and the phase if that was decided; every rank must call it.

        Raises:
            RanksDiffer: at the phase's end, before anything says that it has ended.
            Stopped: a signal came.
        """
        if self.reason and dist.is_initialized():
            averages = self.ema.weights if self.ema else {}
            tensors = dict(module.network.state_dict()) | {f"ema.{name}": tensor for name, tensor in averages.items()}
            check_ranks_equal(tensors, module.device, f"phase '{self.plan.phase.name}'")
        precision = trainer.precision_plugin.state_dict()
        self.end_step(module, module.agreed, precision, is_writer=trainer.is_global_zero)
        if self.reason:
            trainer.should_stop = True

    def _limit_reached(self) -> str:
        phase = self.plan.phase
        return f"max_steps {phase.max_steps} reached" if phase.max_steps else f"max_epochs {phase.max_epochs} reached"

    def _check_finite(self, metric: str, value: float) -> None:
        require(
            math.isfinite(value),  # NaN would be neither better nor worse
            f"{metric} is {value} after step {self.step} of phase '{self.plan.phase.name}', so none is the best; a "
            "class may be missing from data.val: monitor val/loss instead.",
        )
