"""The one LightningModule: forward and steps. It is handed its optimizer and knows no policy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import SyncBatchNorm

from lit_transfer.config import Augment
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.plan import PADDING
from lit_transfer.data.quarantine import Quarantine
from lit_transfer.errors import UserError, require
from lit_transfer.model.augment import eval_input, mix, train_input
from lit_transfer.model.network import Network, batch_norms
from lit_transfer.objectives.decisions import probabilities
from lit_transfer.objectives.losses import loss_rows
from lit_transfer.objectives.metrics import metrics
from lit_transfer.recipe import Objective

Batch = dict[str, Any]


class LossNotFinite(UserError):
    """The training loss became infinite or not a number."""


class Stopped(Exception):
    """A signal asked the run to stop, and all ranks agreed at the same step."""


@dataclass(frozen=True)
class Predictions:
    """What the network said of every sample of a stream, in the order of the manifest, on every rank.

    Args:
        rows: manifest rows [N].
        probabilities: [N, K] (see `objectives/decisions.py`).
        targets: [N] or [N, K], as the manifest gives them.
        loss: weighted mean over labelled entries.
    """

    rows: NDArray[np.int64]
    probabilities: Tensor
    targets: Tensor
    loss: float


def measured(task: str, rows: dict[str, Tensor]) -> tuple[Predictions, dict[str, float]]:
    """What was said of a stream, and its metrics as `val/...`.

    Args:
        task: of the dataset.
        rows: in the order of the manifest: `row`, `value` (weighted loss) and `count` (labelled entries), each [N],
            `logits` [N, O] and `target` [N] or [N, K].
    """
    predictions = Predictions(
        rows=rows["row"].numpy(),
        probabilities=probabilities(task, rows["logits"]),
        targets=rows["target"],
        loss=float(rows["value"].sum() / rows["count"].sum().clamp(min=1)),
    )
    values = metrics(task, predictions.probabilities, predictions.targets, None)
    return predictions, {"val/loss": predictions.loss} | {f"val/{name}": value for name, value in values.items()}


def seed_step(seed: int, step: int, part: int, rank: int) -> None:
    """Seed what is random in a part of a step of the run, so that a resumed run draws what a whole one would."""
    key = hashlib.sha256(f"{seed}|{step}|{part}|{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(key[:8], "little"))


class TransferModule(pl.LightningModule):
    """Trains a network on batches of `data/loading.py: SampleDataset`.

    Args:
        network: backbone and head, its cut already set.
        task: of the dataset; chooses loss and metrics.
        preprocessing: canvas to network input.
        augment: random changes of training pictures.
        objective: settings of the loss.
        class_weights: per class, or None (see `objectives/losses.py`).
        optimizer: over the trained parameters of the network; None to evaluate only.
        mixup: alpha of mixup; 0 is none.
        cutmix: alpha of CutMix; 0 is none.
        parts: batches of an optimizer step.
        seed: of dropout, mixup and CutMix.
        first_step: optimizer steps of the run before this fit.
        requests: what this rank asks of all, such as a stop; `agreed` then says whether any rank did.
        quarantine: where damaged samples are listed and counted.
        eval_stream: name of the stream that is validated.
        stored_cut: frozen stages that are not run, for batches have `activations` in the place of pictures.
    """

    class_weights: Tensor | None

    def __init__(  # noqa: PLR0913 - it is handed all that it uses, by name
        self,
        network: Network,
        *,
        task: str,
        preprocessing: Preprocessing,
        augment: Augment | None = None,
        objective: Objective | None = None,
        class_weights: Tensor | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        parts: int = 1,
        seed: int = 0,
        first_step: int = 0,
        requests: Callable[[], Sequence[bool]] = tuple,
        quarantine: Quarantine | None = None,
        eval_stream: str = "val",
        stored_cut: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.task = task
        self.preprocessing = preprocessing
        self.augment = augment or Augment()
        self.objective = objective or Objective()
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.optimizer = optimizer
        self.mixup, self.cutmix = mixup, cutmix
        self.parts = parts
        self.seed = seed
        self.first_step = first_step
        self.requests = requests
        self.quarantine = quarantine or Quarantine()
        self.eval_stream = eval_stream
        self.stored_cut = stored_cut
        self.agreed: list[bool] = []
        self.train_loss = float("nan")
        self._step_sums = np.zeros(3)  # over the parts of a step: loss, labelled entries, damaged samples
        self._entries_share = 1.0
        self.predictions: Predictions | None = None
        self._eval_rows: list[dict[str, Tensor]] = []
        self._eval_damaged = 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S], or activations at the stored cut -> logits [B, outputs]."""
        return self.network(x, self.stored_cut)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer it was handed."""
        assert self.optimizer is not None, "this module was made to evaluate only"
        return self.optimizer

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout and mixup."""
        seed_step(self.seed, self.first_step + self.global_step, batch_idx % self.parts, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss whose gradient, summed over the parts of a step and averaged by DDP, is that of the global mean."""
        with torch.autocast(self.device.type, enabled=False):
            if self.stored_cut:
                given = batch["activations"].float()
            else:
                given = train_input(batch["image"], batch["uniform"], self.augment, self.preprocessing)
            own = 1.0
            if self.mixup or self.cutmix:
                given, own = mix(given, self.mixup, self.cutmix)
        try:
            logits = self(given)
        except ValueError as error:  # torch's words where a channel has one value, whose variance is undefined
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"norm batch has {len(given)} sample(s) on a rank at step {self.first_step + self.global_step}, too "
                "few for statistics; choose a global_batch that leaves more in an epoch's last step, or norm "
                "pretrained."
            ) from error
        total, entries = (rows.sum() for rows in self._loss_of(logits, batch, own))
        self._agree(total, entries, batch, part=batch_idx % self.parts)
        # Lightning divides by the parts of a step, DDP by the ranks.
        loss: Tensor = total * (self.parts * self.trainer.world_size) / batch["entries"].clamp(min=1).to(total)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradient, before it is clipped, that of the mean over the entries that were read; mutates it.

        The loss of a part is divided by those planned: what stands in for damaged samples of later parts is not known.
        """
        if self._entries_share != 1:
            for parameter in self.network.parameters():
                if parameter.grad is not None:
                    parameter.grad /= self._entries_share

    def share_running_statistics(self) -> None:
        """Make the running statistics of `norm: batch` the same on every rank; every rank must call it."""
        norms = [
            norm
            for norm in batch_norms(self.network)
            if norm.training and norm.running_mean is not None and not isinstance(norm, SyncBatchNorm)
        ]
        if self.network.norm != "batch" or self.trainer.world_size == 1 or not norms:
            return
        means, variances = (
            torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var")
        )
        mean = self._all_reduce(means.clone()) / self.trainer.world_size
        # The variance of the ranks' union: the mean of theirs, and that of their means about the common one.
        variance = self._all_reduce(variances + (means - mean) ** 2) / self.trainer.world_size
        sizes = [norm.num_features for norm in norms]
        for norm, own_mean, own_variance in zip(
            norms, torch.split(mean, sizes), torch.split(variance, sizes), strict=True
        ):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(own_mean)
            norm.running_var.copy_(own_variance)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep this rank's rows; padded ones are told apart by their row number."""
        with torch.autocast(self.device.type, enabled=False):
            given = batch["activations"].float() if self.stored_cut else eval_input(batch["image"], self.preprocessing)
        logits = self(given).float()
        values, counts = self._rows(logits, batch)
        kept = {
            "row": batch["row"],
            "logits": logits,
            "target": batch["target"],
            "value": values,
            "count": counts,
        }
        self._eval_rows.append({name: tensor.detach().cpu() for name, tensor in kept.items()})
        self.quarantine.add(self.eval_stream, batch["damaged"])
        self._eval_damaged += len(batch["damaged"])

    def on_validation_epoch_start(self) -> None:
        """Forget the rows of the last validation."""
        self._eval_rows, self._eval_damaged = [], 0

    def on_validation_epoch_end(self) -> None:
        """Gather all ranks' rows, set `predictions` and log `val/...`; every rank must call it."""
        rows = {name: self._gather(torch.cat([r[name] for r in self._eval_rows])) for name in self._eval_rows[0]}
        order = torch.argsort(rows["row"])
        order = order[rows["row"][order] != PADDING]
        rows = {name: tensor[order] for name, tensor in rows.items()}
        self._eval_rows = []
        damaged = int(self._all_reduce(torch.tensor(float(self._eval_damaged), device=self.device)))
        samples = self._samples("val")
        self._check_measured_once(rows["row"], damaged, samples)
        self.quarantine.count(self.eval_stream, self.first_step + self.trainer.global_step, damaged, samples)
        self.predictions, values = measured(self.task, rows)
        self.log_dict(values, logger=False, rank_zero_only=False, batch_size=1)

    def _check_measured_once(self, rows: Tensor, damaged: int, samples: int) -> None:
        """Compare the rows of all ranks with what the stream has; raises on every rank."""
        different = len(set(rows.tolist()))
        require(
            different == len(rows) == samples - damaged,
            f"validation measured {len(rows)} valid samples, {different} of them different, and left out {damaged} "
            f"damaged, but data.{self.eval_stream} has {samples} in the manifest, each to be met once; do not use its "
            "figures, and report this as a fault of lit_transfer.",
        )

    def _loss_of(self, logits: Tensor, batch: Batch, own: float) -> tuple[Tensor, Tensor]:
        """Loss of each row, `own` of it due to its own target, and labelled entries, both [B]; zero where padded."""
        values, counts = self._rows(logits, batch)
        if own < 1:
            others = {name: batch[name].roll(1, 0) for name in ("target", "weight")}
            values = own * values + (1 - own) * self._rows(logits, others)[0]
        return torch.where(batch["valid"], values, torch.zeros_like(values)), counts * batch["valid"]

    def _rows(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weighted loss and count of labelled entries of each row, both [B], also where padded."""
        values, counts = loss_rows(self.task, logits, batch["target"], self.objective, self.class_weights)
        return values * batch["weight"], counts

    def _agree(self, total: Tensor, entries: Tensor, batch: Batch, part: int) -> None:
        """Set `agreed` and, at the last part of a step, what `_end_step` does; the same on every rank."""
        self.quarantine.add("train", batch["damaged"])
        told = [float(len(batch["damaged"])), *(float(asks) for asks in self.requests())]
        shared = self._all_reduce(torch.cat([total.detach()[None], entries[None], total.new_tensor(told)]))
        loss, read, damaged, *asks = shared.tolist()
        self.quarantine.count("train", int(batch["epoch"]), int(damaged), self._samples("train"))
        self.agreed = [value > 0 for value in asks]
        self._step_sums = np.array([loss, read, damaged]) + (self._step_sums if part else 0.0)
        if part == self.parts - 1:
            self._end_step(planned=max(1, int(batch["entries"])))
        if not np.isfinite(loss):
            raise LossNotFinite(
                f"train/loss is {loss} at step {self.first_step + self.global_step}; lower the "
                "phase's learning rates, or use trainer.precision 32."
            )

    def _end_step(self, planned: int) -> None:
        """Set `train_loss` and the share of the planned entries that was read."""
        loss, read, damaged = self._step_sums.tolist()
        entries = read if damaged else planned  # a sum in fp32 may round what the plan counts
        self.train_loss = loss / entries
        self._entries_share = entries / planned

    def _samples(self, stream: str) -> int:
        """How many samples a stream of the data module has."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return len(data.streams[stream].rows)

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place where there are several."""
        if self.trainer.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def _gather(self, tensor: Tensor) -> Tensor:
        """Concatenate equal shapes of all ranks along rows, on the CPU."""
        if self.trainer.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor, device=self.device) for _ in range(self.trainer.world_size)]
        dist.all_gather(parts, tensor.to(self.device).contiguous())
        return torch.cat(parts).cpu()
