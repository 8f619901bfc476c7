"""Heads trained on features in memory: a plain loop, because there a Trainer would cost more than the training.

The samples of a step are those of the plan, and the rules between steps those of `steps.py`, as with a Trainer: on one
rank a head ends with the weights to the bit that a Trainer gives it on the same features. `Phase.heads` trains many at
once (`many_heads.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_transfer.errors import UserError, require
from lit_transfer.model.augment import mix
from lit_transfer.model.module import LossNotFinite, Stopped, TransferModule, seed_step
from lit_transfer.model.network import Network
from lit_transfer.objectives.losses import loss_rows
from lit_transfer.phases.features import Features, Stretch, stretches
from lit_transfer.phases.many_heads import ManyHeads
from lit_transfer.phases.optim import divide_gradients, set_lr
from lit_transfer.phases.resume import load_weights
from lit_transfer.phases.steps import Steps
from lit_transfer.phases.validation import Validation
from lit_transfer.schedule import Phase

BEAT_S = 60.0
"""Between signs of life to the ranks that wait; a process group gives up after minutes without one."""


def why_not_looped(phase: Phase, network: Network) -> str | None:
    """Why a phase cannot be trained on pooled features; None if it can. What trains must have been set."""
    if network.first_trained < len(network.backbone.stages):
        return "stages train, too"
    if phase.cutmix:
        return "cutmix cuts pictures"
    return "compile asks for a compiled head" if phase.compile else None


def require_features(phase: Phase, reason: str) -> None:
    """Refuse `heads` where the features of a phase are not in memory, for a reason."""
    require(
        phase.heads is None,
        f"phase '{phase.name}': heads trains on stored features, but they are not stored ({reason}); set "
        "activations.store to require, or remove heads.",
    )


def train_heads(module: TransferModule, steps: Steps, train: Features | None, val: Features | None) -> None:
    """Train a phase's head, or heads, from the step where it stands to the phase's end. Every rank must call it.

    Mutates the module's head, its optimizer and `steps`. Rank 0 trains alone; the others wait, and take what it saved:
    the result is that of one rank, and a signal must reach rank 0 to stop the run in time.

    Args:
        module: of the phase; its optimizer holds the state to go on from.
        steps: of the phase.
        train: features of the training stream; only rank 0 needs them.
        val: those of the validation stream, where there is one.

    Raises:
        LossNotFinite: before anything is saved that came of it.
        Stopped: a signal came.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        (_lead if dist.get_rank() == 0 else _follow)(module, steps, train, val)
    else:
        assert train is not None
        HeadLoop(module, steps, train, val).run()


def _lead(module: TransferModule, steps: Steps, train: Features | None, val: Features | None) -> None:
    """Rank 0: train, and tell the others how it ends."""
    assert train is not None
    ended = "rank 0 met an error; its own message says which."
    try:
        HeadLoop(module, steps, train, val, beat=lambda: _told("trains")).run()
        ended = "ended"
    except Stopped:
        ended = "stopped"
        raise
    except UserError as error:
        ended = str(error)
        raise
    finally:
        _told(ended)


def _follow(module: TransferModule, steps: Steps, *_: object) -> None:
    """Another rank: wait for rank 0, and take what it saved."""
    steps.stop.install()
    while (ended := _told("")) == "trains":
        pass
    if ended == "stopped":
        raise Stopped
    require(ended == "ended", ended)
    saved = steps.files.read_last()
    assert saved is not None, "a phase ends with a checkpoint"
    load_weights(module.network, saved["network"], steps.files.last)
    module.quarantine.go_on_from(saved["quarantine"])
    steps.go_on_from(saved)


def _told(word: str) -> str:
    """The word of rank 0, on every rank."""
    words = [word]
    dist.broadcast_object_list(words, src=0)
    return words[0]


class Learner(Protocol):
    """What the loop trains: one head, or `copies` of it side by side."""

    copies: int

    @property
    def leader(self) -> int:
        """Place of the head whose loss is shown."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """Features [B, F] -> [B * copies, O]; the heads of a row follow each other."""
        ...

    def update(self, read_share: float) -> None:
        """Divide the gradient by `read_share`, take an optimizer step, and drop the gradient; mutates the heads."""
        ...

    def validate(self, validation: Validation) -> dict[str, float]:
        """Metrics by name of the head in the network; of many, the best one is put there."""
        ...

    def finish(self) -> None:
        """The phase has a reason to end."""
        ...


class OneHead:
    """The head of the network, trained by an optimizer of torch."""

    copies, leader = 1, 0

    def __init__(self, module: TransferModule, steps: Steps) -> None:
        self.head, self.optimizer = module.network.head, module.configure_optimizers()
        self.clip_norm = steps.plan.phase.clip_norm
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)  # type: ignore[no-any-return]

    def update(self, read_share: float) -> None:
        divide_gradients(self.parameters, read_share)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def validate(self, validation: Validation) -> dict[str, float]:
        self.head.eval()
        values = validation.metrics(validation.logits(self.head))
        self.head.train()
        return values

    def finish(self) -> None:
        pass


class HeadLoop:
    """The loop of a phase on one rank; see `train_heads`.

    Args:
        module: of the phase.
        steps: of the phase.
        train: features of the training stream.
        val: those of the validation stream.
        beat: called between stretches of steps, once `BEAT_S` have passed.
    """

    def __init__(
        self,
        module: TransferModule,
        steps: Steps,
        train: Features,
        val: Features | None,
        beat: Callable[[], object] | None = None,
    ) -> None:
        phase = steps.plan.phase
        self.module, self.steps, self.train = module, steps, train
        self.optimizer = module.configure_optimizers()
        module.network.head.to(train.device).train()
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # which takes it to the head's device
        self.learner: Learner = ManyHeads(module, steps) if phase.heads else OneHead(module, steps)
        self.validation = Validation(module, val, math.ceil(phase.global_batch / phase.accumulate)) if val else None
        self.class_weights = None if module.class_weights is None else module.class_weights.to(train.device)
        self.is_random = phase.mixup > 0 or any(isinstance(m, nn.Dropout) for m in module.network.head.modules())
        self.beat, self._beaten = beat, time.monotonic()
        self._losses: list[Tensor] = []  # [copies] of each step since they were last looked at
        self._last_losses: list[float] = []

    def run(self) -> None:
        """Train to the end of the phase."""
        steps, phase = self.steps, self.steps.plan.phase
        steps.start(self.train.device)
        for stretch in stretches(
            self.train,
            steps.config.data.order,
            seed=steps.config.seed,
            global_batch=phase.global_batch,
            steps=range(steps.step, steps.plan.max_steps),
            parts=phase.accumulate,
            first_epoch=steps.recorder.first_epoch,
        ):
            steps.recorder.batch_came()
            for place in range(len(stretch.damaged)):
                self._step(stretch, place)
                if steps.reason:
                    return
            if self.beat and time.monotonic() - self._beaten > BEAT_S:
                self.beat()
                self._beaten = time.monotonic()

    def _step(self, stretch: Stretch, place: int) -> None:
        steps, parts = self.steps, self.steps.plan.phase.accumulate
        set_lr(self.optimizer, steps.plan, steps.step, steps.drops)
        if stretch.damaged[place]:
            samples = len(self.train.samples.rows)
            self.module.quarantine.count("train", stretch.epoch, stretch.damaged[place], samples)
        losses = [self._part(stretch, place, part) for part in range(parts)]
        self._losses.append(losses[0] if parts == 1 else torch.stack(losses).sum(0))
        self.learner.update(stretch.read_share[place])
        agreed = steps.requests()
        if steps.step_done(self.optimizer, self._loss, time_is_up=agreed[1]):
            self._validate()
        if steps.reason:
            self.learner.finish()
        if steps.saves(agreed):
            self._check_losses()
        steps.end_step(self.module, agreed, {}, is_writer=True)

    def _part(self, stretch: Stretch, place: int, part: int) -> Tensor:
        """Add the gradient of a part of a step; its part of the step's loss [copies]."""
        phase, copies = self.steps.plan.phase, self.learner.copies
        start, end = stretch.parts[place * phase.accumulate + part]
        features, target, weight = (t[start:end] for t in (stretch.features, stretch.targets, stretch.weights))
        if self.is_random:
            seed_step(self.steps.config.seed, self.steps.run_step, part, rank=0)
        own = 1.0
        if phase.mixup:
            features, own = mix(features, phase.mixup, 0.0)
        logits = self.learner.logits(features)
        values = self._rows(logits, target, weight)
        if own < 1:
            values = own * values + (1 - own) * self._rows(logits, target.roll(1, 0), weight.roll(1, 0))
        gradient, share = stretch.gradient[start:end], stretch.share[start:end]
        torch.autograd.backward(values, gradient if copies == 1 else gradient.repeat_interleave(copies))
        return values.detach().view(-1, copies).T.mv(share)

    def _rows(self, logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Weighted loss of each row and head [B * copies]."""
        copies = self.learner.copies
        if copies > 1:
            target, weight = target.repeat_interleave(copies, 0), weight.repeat_interleave(copies)
        module = self.module
        return loss_rows(module.task, logits, target, module.objective, self.class_weights)[0] * weight

    def _validate(self) -> None:
        assert self.validation is not None, "a phase is validated where there is a stream for it"
        self._check_losses()
        self.validation.count_damaged(self.steps.run_step)
        self.steps.show_average()
        values = self.learner.validate(self.validation)
        self.steps.take(values, self.module.network, is_writer=True)

    def _loss(self) -> float:
        """The loss of this step, of the leading head."""
        self._check_losses()
        return self._last_losses[self.learner.leader]

    def _check_losses(self) -> None:
        """Look at the losses since the last look: seldom, for on a GPU it waits for all that was begun."""
        if not self._losses:
            return
        losses = torch.stack(self._losses)
        self._losses.clear()
        self._last_losses = losses[-1].tolist()
        bad = ~losses.isfinite().any(1)  # heads train apart: one may fail, all may not
        if bad.any():
            first = int(bad.nonzero()[0])
            raise LossNotFinite(
                f"train/loss is {float(losses[first, 0])} at step {self.steps.run_step - len(losses) + first}; lower "
                "the phase's learning rates."
            )
