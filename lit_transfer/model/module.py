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
from lit_transfer.errors import UserError
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


class TransferModule(pl.LightningModule):
    """Trains a network on batches of `data/module.py: SampleDataset`.

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
        self.agreed: list[bool] = []
        self.train_loss = float("nan")
        self._loss_sum = 0.0
        self.predictions: Predictions | None = None
        self._eval_rows: list[dict[str, Tensor]] = []
        self._eval_damaged = 0

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> logits [B, outputs]."""
        return self.network(images)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer it was handed."""
        assert self.optimizer is not None, "this module was made to evaluate only"
        return self.optimizer

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed what is random from (seed, run step, part, rank), so a resumed run draws what a whole one would."""
        step = self.first_step + self.global_step
        key = hashlib.sha256(f"{self.seed}|{step}|{batch_idx % self.parts}|{self.global_rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(key[:8], "little"))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss whose gradient, summed over the parts of a step and averaged by DDP, is that of the global mean."""
        with torch.autocast(self.device.type, enabled=False):
            images = train_input(batch["image"], batch["uniform"], self.augment, self.preprocessing)
            own = 1.0
            if self.mixup or self.cutmix:
                images, own = mix(images, self.mixup, self.cutmix)
        try:
            logits = self(images)
        except ValueError as error:  # torch's words where a channel has one value, whose variance is undefined
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"norm batch has {len(images)} sample(s) on a rank at step {self.first_step + self.global_step}, too "
                "few for statistics; choose a global_batch that leaves more in an epoch's last step, or norm "
                "pretrained."
            ) from error
        total = self._loss_of(logits, batch, own).sum()
        self._agree(total, batch, part=batch_idx % self.parts)
        # Lightning divides by the parts of a step, DDP by the ranks.
        loss: Tensor = total * (self.parts * self.trainer.world_size) / batch["entries"].clamp(min=1).to(total)
        return loss

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
            images = eval_input(batch["image"], self.preprocessing)
        logits = self(images).float()
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
        assert len(set(rows["row"].tolist())) == len(rows["row"]) == samples - damaged, "each is measured once"
        self.quarantine.count(self.eval_stream, self.trainer.global_step, damaged, samples)
        self.predictions = Predictions(
            rows=rows["row"].numpy(),
            probabilities=probabilities(self.task, rows["logits"]),
            targets=rows["target"],
            loss=float(rows["value"].sum() / rows["count"].sum().clamp(min=1)),
        )
        values = metrics(self.task, self.predictions.probabilities, self.predictions.targets, None)
        named = {"val/loss": self.predictions.loss} | {f"val/{name}": value for name, value in values.items()}
        self.log_dict(named, logger=False, rank_zero_only=False, batch_size=1)

    def _loss_of(self, logits: Tensor, batch: Batch, own: float) -> Tensor:
        """Weighted loss of each row [B], where `own` of it is due to the row's own target; zero where padded."""
        values, _ = self._rows(logits, batch)
        if own < 1:
            others = {name: batch[name].roll(1, 0) for name in ("target", "weight")}
            values = own * values + (1 - own) * self._rows(logits, others)[0]
        return torch.where(batch["valid"], values, torch.zeros_like(values))

    def _rows(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weighted loss and count of labelled entries of each row, both [B], also where padded."""
        values, counts = loss_rows(self.task, logits, batch["target"], self.objective, self.class_weights)
        return values * batch["weight"], counts

    def _agree(self, total: Tensor, batch: Batch, part: int) -> None:
        """Set `agreed` and `train_loss`, the same on every rank."""
        self.quarantine.add("train", batch["damaged"])
        told = [float(len(batch["damaged"])), *(float(asks) for asks in self.requests())]
        shared = self._all_reduce(torch.cat([total.detach()[None], total.new_tensor(told)]))
        loss, damaged, *asks = shared.tolist()
        self.quarantine.count("train", int(batch["epoch"]), int(damaged), self._samples("train"))
        self.agreed = [value > 0 for value in asks]
        self._loss_sum = loss + (self._loss_sum if part else 0.0)
        if part == self.parts - 1:
            self.train_loss = self._loss_sum / max(1, int(batch["entries"]))
        if not np.isfinite(loss):
            raise LossNotFinite(
                f"train/loss is {loss} at step {self.first_step + self.global_step}; lower the "
                "phase's learning rates, or use trainer.precision 32."
            )

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
