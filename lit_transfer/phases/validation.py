"""What heads are worth on features in memory of the validation stream."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lit_transfer.model.module import TransferModule, measured
from lit_transfer.objectives.losses import loss_rows
from lit_transfer.phases.features import Features


class Validation:
    """Measures heads as a `TransferModule` is validated: on the CPU, damaged samples left out.

    Args:
        module: of the phase; task, objective and quarantine are its.
        features: of the stream.
        batch: rows at once, those of a Trainer's batch: the shape decides the last bits of a product.
    """

    def __init__(self, module: TransferModule, features: Features, batch: int) -> None:
        self.module, self.features, self.batch = module, features, batch
        samples = features.samples
        sound = np.array([place not in features.damaged for place in range(len(samples.rows))])
        self.sound = torch.from_numpy(sound)
        self.rows = samples.rows[sound]
        self.targets = torch.from_numpy(samples.targets[self.rows])
        self.weights = torch.from_numpy(samples.loss_weights(self.rows))

    @torch.no_grad()
    def logits(self, head: Callable[[Tensor], Tensor]) -> Tensor:
        """What a function of features [B, F] gives for every sound sample [V, ...], on the CPU."""
        parts = torch.split(self.features.views[0], self.batch)
        return torch.cat([head(part.to(self.features.device).float()) for part in parts]).cpu()[self.sound]

    def count_damaged(self, step: int) -> None:
        """Count the damaged samples, once at a step of the run.

        Raises:
            UserError: too many samples of the stream are damaged.
        """
        damaged, samples = len(self.features.damaged), len(self.features.samples.rows)
        self.module.quarantine.count(self.module.eval_stream, step, damaged, samples)

    def metrics(self, logits: Tensor) -> dict[str, float]:
        """`val/...` of logits [V, O]."""
        values, counts = self._rows(logits, copies=1)
        rows = {"row": torch.from_numpy(self.rows), "logits": logits, "target": self.targets}
        found = measured(self.module.task, rows | {"value": values[:, 0], "count": counts[:, 0]})[1]
        # Lightning keeps metrics in fp32, and what is a tie there must be one here.
        return {name: float(np.float32(value)) for name, value in found.items()}

    def losses(self, logits: Tensor) -> Tensor:
        """`val/loss` of heads with logits [V, n, O]: float32 [n]."""
        values, counts = self._rows(logits.flatten(0, 1), copies=logits.shape[1])
        return values.sum(0) / counts.sum(0).clamp(min=1)

    def _rows(self, logits: Tensor, copies: int) -> tuple[Tensor, Tensor]:
        """Weighted loss and labelled entries of each row, for heads that follow each other: [V, copies] each."""
        targets = self.targets.repeat_interleave(copies, 0)
        module = self.module
        values, counts = loss_rows(module.task, logits, targets, module.objective, module.class_weights)
        return values.view(-1, copies) * self.weights[:, None], counts.view(-1, copies)
