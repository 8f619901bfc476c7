"""Streams as one phase reads them, stored ones among them: the LightningDataModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_transfer.activations.data import StoredDataset, StoredStream
from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.module import ImageData


class StoredData(ImageData):
    """`ImageData` that reads stored activations for the streams that have them.

    Args:
        stored: by name.
        settings: of `ImageData`.
    """

    def __init__(self, stored: Mapping[str, StoredStream], *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.stored = stored

    def _workers(self, stream: str) -> int:
        """0 for stored streams on a CPU: there a worker takes the time that it reads from the threads that compute."""
        assert self.trainer, "only a fit reads"
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        return 0 if stream in self.stored and on_cpu else super()._workers(stream)

    def _dataset(self, stream: str, augment_seed: int | None = None, balance: str = "none") -> SampleDataset:
        if stream in self.stored:
            return StoredDataset(self.stored[stream], self.preprocessing, augment_seed, balance)
        return super()._dataset(stream, augment_seed, balance)
