"""The loop that trains heads on features in memory: plain, because there a Trainer would cost more than the training.

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
from torch import Tensor, nn
from tqdm import tqdm

from lit_transfer.model.augment import mix
from lit_transfer.model.module import LossNotFinite, TransferModule, seed_step
from lit_transfer.objectives.losses import loss_rows
from lit_transfer.phases import rank_zero
from lit_transfer.phases.features import Features, Part, Stretch, stretches
from lit_transfer.phases.many_heads import ManyHeads
from lit_transfer.phases.optim import divide_gradients, set_lr
from lit_transfer.phases.steps import Steps
from lit_transfer.phases.validation import Validation

BAR_AFTER_S = 1.0
"""A phase that is over before shows no bar."""


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
        beat: called between stretches of steps, once `rank_zero.BEAT_S` have passed.
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
        self.mixup = phase.mixup
        self.is_random = self.mixup > 0 or any(isinstance(m, nn.Dropout) for m in module.network.head.modules())
        self.beat, self._beaten = beat, time.monotonic()
        self._losses: list[Tensor] = []  # [copies] of each step since they were last looked at
        self._last_losses: list[float] = []
        steps.saves_epochs = False
        self._bar = tqdm(
            total=steps.plan.max_steps - steps.step,
            unit="step",
            desc=f"phase {phase.name}",
            delay=BAR_AFTER_S,
            disable=not steps.config.trainer.progress,
        )

    def run(self) -> None:
        """Train to the end of the phase."""
        steps, phase = self.steps, self.steps.plan.phase
        steps.start(self.train.device)
        with self._bar:
            for stretch in stretches(
                self.train,
                steps.config.data.order,
                seed=steps.config.seed,
                global_batch=phase.global_batch,
                steps=range(steps.step, steps.plan.max_steps),
                parts=phase.accumulate,
                first_epoch=steps.recorder.first_epoch,
            ):
                self._stretch(stretch)
                if steps.reason:
                    return

    def _stretch(self, stretch: Stretch) -> None:
        self.steps.recorder.batch_came()
        for place in range(len(stretch.damaged)):
            self._step(stretch, place)
            if self.steps.reason:
                return
        if self.beat and time.monotonic() - self._beaten > rank_zero.BEAT_S:
            self.beat()
            self._beaten = time.monotonic()

    def _step(self, stretch: Stretch, place: int) -> None:
        steps, parts = self.steps, self.steps.plan.phase.accumulate
        set_lr(self.optimizer, steps.plan, steps.step, steps.drops)
        if stretch.damaged[place]:
            samples = len(self.train.samples.rows)
            self.module.quarantine.count("train", stretch.epoch, stretch.damaged[place], samples)
        losses = [self._part(stretch.parts[place * parts + part], part) for part in range(parts)]
        read_share = stretch.read_share[place]
        self._losses.append(losses[0] if parts == read_share == 1 else sum(losses[1:], losses[0]) / read_share)
        self.learner.update(read_share)
        self._bar.update()
        agreed = steps.requests()
        if steps.step_done(self.optimizer, self._loss, time_is_up=agreed[1]):
            self._validate()
        if steps.reason:
            self._bar.close()  # or what is printed would stand in its line
            self.learner.finish()
        if steps.saves(agreed):
            self._check_losses()
        steps.end_step(self.module, agreed, {}, is_writer=True)

    def _part(self, part: Part, index: int) -> Tensor:
        """Add the gradient of a part of a step; its part of the step's loss [copies]."""
        if self.is_random:
            seed_step(self.steps.config.seed, self.steps.run_step, index, rank=0)
        if self.mixup == 0:
            values = self._rows(self.learner.logits(part.features), part.targets)
            return self._backward([values], [part.gradient])
        features, own = mix(part.features, self.mixup, 0.0)
        logits = self.learner.logits(features)
        values, others = self._rows(logits, part.targets), self._rows(logits, part.targets.roll(1, 0))
        gradients = [part.share * own * part.weights, part.share * (1 - own) * part.weights.roll(1, 0)]
        return self._backward([values, others], gradients)

    def _rows(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of each row and head [B * copies]."""
        module, copies = self.module, self.learner.copies
        target = target if copies == 1 else target.repeat_interleave(copies, 0)
        return loss_rows(module.task, logits, target, module.objective, self.class_weights)[0]

    def _backward(self, values: list[Tensor], gradients: list[Tensor]) -> Tensor:
        """Add the gradient of losses of rows [B * copies], each weighted by its gradient [B]; their sum [copies]."""
        copies = self.learner.copies
        if copies == 1:
            torch.autograd.backward(values, gradients)
            losses = [torch.dot(each.detach(), weights) for each, weights in zip(values, gradients, strict=True)]
        else:
            torch.autograd.backward(values, [weights.repeat_interleave(copies) for weights in gradients])
            losses = [weights @ each.detach().view(-1, copies) for each, weights in zip(values, gradients, strict=True)]
        return losses[0] if len(losses) == 1 else losses[0] + losses[1]

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
        losses = torch.stack(self._losses).view(-1, self.learner.copies)
        self._losses.clear()
        self._last_losses = losses[-1].tolist()
        self._bar.set_postfix_str(f"loss={self._last_losses[self.learner.leader]:.3f}", refresh=False)
        bad = ~losses.isfinite().any(1)  # heads train apart: one may fail, all may not
        if bad.any():
            first = int(bad.nonzero()[0])
            raise LossNotFinite(
                f"train/loss is {float(losses[first, 0])} at step {self.steps.run_step - len(losses) + first}; lower "
                "the phase's learning rates."
            )
