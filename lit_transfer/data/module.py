"""Streams as one phase reads them: the LightningDataModule."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from lit_transfer.config import Order
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.loading import SampleDataset, loader
from lit_transfer.data.samplers import EvalSampler, TrainSampler
from lit_transfer.data.streams import Samples


class ImageData(pl.LightningDataModule):
    """The streams of a run as one phase reads them.

    Args:
        streams: by name; `train` and `val` are read.
        preprocessing: picture to canvas.
        seed: of the order and of augmentation.
        global_batch: samples of a step, over all ranks.
        workers: loader processes per rank.
        steps: of the phase that are still to come.
        parts: in which a step is computed.
        first_epoch: epochs of earlier phases.
        order: of an epoch of training.
    """

    def __init__(  # noqa: PLR0913 - it is handed all that it uses, by name
        self,
        streams: dict[str, Samples],
        preprocessing: Preprocessing,
        *,
        seed: int,
        global_batch: int,
        workers: int,
        steps: range = range(0),
        parts: int = 1,
        first_epoch: int = 0,
        order: Order | None = None,
    ) -> None:
        super().__init__()
        self.streams = streams
        self.preprocessing = preprocessing
        self.seed = seed
        self.global_batch = global_batch
        self.workers = workers
        self.steps = steps
        self.parts = parts
        self.first_epoch = first_epoch
        self.order = order or Order()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Shuffled batches of `train`; every rank must call it."""
        dataset = self._dataset("train", self.seed, self.order.balance)
        rank, ranks = self._place()
        sampler = TrainSampler(
            self.streams["train"],
            seed=self.seed,
            global_batch=self.global_batch,
            steps=self.steps,
            order=self.order,
            parts=self.parts,
            first_epoch=self.first_epoch,
            rank=rank,
            ranks=ranks,
        )
        return loader(dataset, sampler, self._workers("train"))

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[DataLoader[dict[str, Any]]]:
        """Batches of `val` in the order of the manifest, or none; every rank must call it."""
        return self.eval_dataloader("val") if "val" in self.streams else []

    def eval_dataloader(self, stream: str) -> DataLoader[dict[str, Any]]:
        """Every sample of a stream once, in the order of the manifest; every rank must call it."""
        dataset = self._dataset(stream)
        rank, ranks = self._place()
        rows = math.ceil(self.global_batch / self.parts)
        sampler = EvalSampler(self.streams[stream], global_batch=rows, rank=rank, ranks=ranks)
        return loader(dataset, sampler, self._workers(stream))

    def _workers(self, stream: str) -> int:
        return self.workers

    def _dataset(self, stream: str, augment_seed: int | None = None, balance: str = "none") -> SampleDataset:
        return SampleDataset(self.streams[stream], self.preprocessing, augment_seed, balance)

    def _place(self) -> tuple[int, int]:
        """This rank, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
