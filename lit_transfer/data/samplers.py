"""What a rank reads: the plan of training from any step on, and whole streams in the order of the manifest."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from lit_transfer.config import Order
from lit_transfer.data import plan
from lit_transfer.data.order import class_weights, epoch_rows
from lit_transfer.data.streams import Samples


class TrainSampler(Sampler[plan.Batch]):
    """One rank's batches of some steps of a phase: where it goes on is one counter, the same on every rank.

    Args:
        samples: what is trained on.
        seed: of the order.
        global_batch: samples of a step.
        steps: of the phase, counted from 0; an epoch ends whenever all its samples have been seen.
        order: of an epoch.
        parts: in which a step is computed, one batch each.
        first_epoch: epochs of earlier phases.
        rank: this one.
        ranks: of all nodes.
    """

    def __init__(  # noqa: PLR0913 - a pure function of all these
        self,
        samples: Samples,
        *,
        seed: int,
        global_batch: int,
        steps: range,
        order: Order | None = None,
        parts: int = 1,
        first_epoch: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.samples = samples
        self.seed = seed
        self.global_batch = global_batch
        self.steps = steps
        self.order = order or Order()
        self.parts = parts
        self.first_epoch = first_epoch
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return len(self.steps) * self.parts

    def __iter__(self) -> Iterator[plan.Batch]:
        per_epoch = plan.steps_per_epoch(len(self.samples.rows), self.global_batch, self.order.last_batch)
        order, order_epoch = self.samples.rows, None
        for phase_step in self.steps:
            phase_epoch, step = divmod(phase_step, per_epoch)
            epoch = self.first_epoch + phase_epoch
            if epoch != order_epoch:
                order, order_epoch = self.epoch_rows(epoch), epoch
            rows = plan.step_rows(order, step, self.global_batch)
            entries = self.samples.entries(rows)
            mine = plan.slice_of(rows, self.rank, self.ranks)  # first: a rank's slice stays in its partition
            for part in range(self.parts):
                yield plan.Batch(epoch, plan.slice_of(mine, part, self.parts), entries)

    def epoch_rows(self, epoch: int) -> plan.Rows:
        """The rows of an epoch of the run, in order: the plan, the same on every rank."""
        samples = self.samples
        weights = None
        if self.order.balance == "classes":
            weights = class_weights(samples.targets[samples.rows])
        elif self.order.balance == "weights":
            weights = samples.weights[samples.rows].astype(np.float64)
        return epoch_rows(
            samples.rows,
            self.order,
            shards=samples.manifest.table["shard"].to_numpy(),
            weights=weights,
            global_batch=self.global_batch,
            digest=samples.manifest.digest,
            seed=self.seed,
            epoch=epoch,
        )


class EvalSampler(Sampler[plan.Batch]):
    """One rank's batches of a whole stream, in the order of the manifest."""

    def __init__(self, samples: Samples, *, global_batch: int, rank: int = 0, ranks: int = 1) -> None:
        self.samples = samples
        self.global_batch = global_batch
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return plan.steps_per_epoch(len(self.samples.rows), self.global_batch)

    def __iter__(self) -> Iterator[plan.Batch]:
        for step in range(len(self)):
            rows = plan.step_rows(self.samples.rows, step, self.global_batch)
            yield plan.Batch(0, plan.slice_of(rows, self.rank, self.ranks), self.samples.entries(rows))
