"""Batches in the order of the plan, decoded by workers; damaged samples replaced or left out.

Workers import this file and what it needs: nothing slow may stand here that they do without, such as Lightning.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_transfer.data import plan
from lit_transfer.data.decode import DecodeError, Preprocessing, decode
from lit_transfer.data.quarantine import DamagedSample
from lit_transfer.data.store import ShardReader
from lit_transfer.data.streams import Samples
from lit_transfer.errors import UserError

DRAWS = 16
"""Random numbers per sample and epoch that a training batch carries for augmentation."""

Value = TypeVar("Value")
Values = dict[str, torch.Tensor]

SUBSTITUTES = 10
"""Samples that are tried in the place of a damaged one, itself included."""


class SampleDataset(Dataset[dict[str, Any]]):
    """Decodes one `plan.Batch` at a time.

    An item has `image` uint8 [B, 3, canvas, canvas] in channels-last memory, `target`, `weight` [B], `row` [B], `valid`
    [B] (False where padded), `entries` (labelled ones of the whole step), `damaged` (what is known of each damaged
    sample), and for training `epoch` and `uniform` [B, DRAWS] for augmentation. A damaged sample is replaced by another
    of the stream in training, the same one wherever it is met in an epoch; elsewhere its place is padded.
    """

    def __init__(
        self,
        samples: Samples,
        preprocessing: Preprocessing,
        augment_seed: int | None,
        balance: str = "none",
    ) -> None:
        self.samples = samples
        self.preprocessing = preprocessing
        self.augment_seed = augment_seed
        self.balance = balance
        self.reader = ShardReader(samples.manifest)

    def __getitem__(self, batch: plan.Batch) -> dict[str, Any]:
        valid = batch.rows != plan.PADDING
        # A padded place repeats a picture: a black one would shift the statistics of `norm: batch`.
        rows = np.where(valid, batch.rows, (batch.rows[valid] if valid.any() else self.samples.rows)[0])
        damaged: dict[int, dict[str, Any]] = {}
        used, values = self._read(rows, batch.epoch, damaged)
        if self.augment_seed is None:
            valid &= ~np.isin(rows, list(damaged))
        item = {
            **values,
            "target": torch.from_numpy(self.samples.targets[used]),
            "weight": torch.from_numpy(self.samples.loss_weights(used, self.balance)),
            "row": torch.from_numpy(np.where(valid, rows, plan.PADDING)),
            "valid": torch.from_numpy(valid),
            "entries": torch.tensor(batch.entries),
            "damaged": [damaged[row] for row in batch.rows.tolist() if row in damaged],
        }
        if self.augment_seed is not None:
            item["epoch"] = torch.tensor(batch.epoch)
            item["uniform"] = torch.from_numpy(plan.uniforms(self.augment_seed, batch.epoch, rows, DRAWS))
        return item

    def _read(self, rows: plan.Rows, epoch: int, damaged: dict[int, dict[str, Any]]) -> tuple[plan.Rows, Values]:
        """The rows [B] that were read, and what of them; what is damaged is added to `damaged`."""
        side = self.preprocessing.canvas
        # Colours last in memory, as pictures are decoded and as the network takes them.
        images = np.empty((len(rows), side, side, 3), np.uint8).transpose(0, 3, 1, 2)
        used = np.empty_like(rows)
        for place, row in enumerate(rows.tolist()):
            used[place], images[place] = self._try(row, epoch, damaged, self._canvas)
        return used, {"image": torch.from_numpy(images)}

    def _canvas(self, row: int) -> NDArray[np.uint8]:
        return decode(self.reader.read(row), self.preprocessing)

    def _try(
        self, row: int, epoch: int, damaged: dict[int, dict[str, Any]], read: Callable[[int], Value]
    ) -> tuple[int, Value]:
        """What is read of a row, or of the one that replaces it, and which it was."""
        for attempt in range(SUBSTITUTES):
            used = row if attempt == 0 else self._substitute(row, epoch, attempt)
            try:
                return used, read(used)
            except (DamagedSample, DecodeError) as error:
                if attempt == 0:
                    damaged[row] = self._damage(row, error)
        raise UserError(
            f"{damaged[row]['address']}: sample {damaged[row]['key']} and {SUBSTITUTES - 1} others that could stand in "
            "for it are damaged; run `lit-transfer prepare --verify` on the dataset."
        )

    def _substitute(self, row: int, epoch: int, attempt: int) -> int:
        return self.samples.stand_in(row, self.balance, self.augment_seed or 0, epoch, attempt)

    def _damage(self, row: int, error: Exception) -> dict[str, Any]:
        address, offset = self.reader.place(row)
        reason = error.reason if isinstance(error, DamagedSample) else str(error)
        key = self.samples.manifest.table["key"][row].as_py()
        return {"key": key, "address": address, "offset": offset, "reason": reason}


def loader(dataset: SampleDataset, sampler: Sampler[plan.Batch], workers: int) -> DataLoader[dict[str, Any]]:
    """A loader of whole batches, in the sampler's order; `workers` processes, 0 decodes here."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_init_worker,
        multiprocessing_context=_forkserver() if workers else None,
    )


def _forkserver() -> ForkServerContext:
    """Workers start from a clean process: forked from here they can hang, on locks that threads of DDP held."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    if threading.current_thread() is threading.main_thread():
        # The server must outlive a signal to the process group, as its workers do; what is ignored is inherited.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        forkserver.ensure_running()
        signal.signal(signal.SIGTERM, before)
    return context


def _init_worker(_: int) -> None:
    torch.set_num_threads(1)
    # A terminal and SLURM signal the whole process group; the ranks decide when to stop, and then end their workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
