"""Streams whose activations are stored, a batch at a time.

Workers import this file, so nothing slow may stand here that they do without, such as Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_transfer.activations.shelf import Shelf
from lit_transfer.activations.views import Views
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.plan import Rows
from lit_transfer.data.quarantine import DamagedSample
from lit_transfer.data.streams import Samples


@dataclass(frozen=True)
class StoredStream:
    """A stream whose activations are all on shelves.

    Args:
        samples: the stream; its rows are the records of each shelf, in order.
        views: of each sample.
        shelves: one for each view.
    """

    samples: Samples
    views: Views
    shelves: tuple[Shelf, ...]

    @cached_property
    def damaged(self) -> dict[int, str]:
        """Why samples have no values in at least one view, by their places: views may be stored in different passes.

        Raises:
            CorruptRecord: a part cannot be read.
        """
        return {place: reason for shelf in self.shelves for place, reason in shelf.damaged().items()}

    def places(self, rows: Rows) -> Rows:
        """Where manifest rows stand on a shelf."""
        return np.searchsorted(self.samples.rows, rows)

    def read(self, rows: Rows, epoch: int, planned: Rows | None = None) -> Tensor:
        """The activations of manifest rows [B] in an epoch of the run, as the next stage takes them: [B, ...].

        `planned`: the rows that drew their views, where others stand in for some of them.
        """
        places, which = self.places(rows), self.views.which(epoch, rows if planned is None else planned)
        shape, dtype = self.shelves[0].contents.shape, self.shelves[0].contents.dtype
        records = torch.empty((len(rows), *shape), dtype=dtype)
        for view in np.unique(which):
            mine = np.flatnonzero(which == view)
            records[torch.from_numpy(mine)] = self.shelves[view].read(places[mine])
        return _from_records(records)


class StoredDataset(SampleDataset):
    """As `SampleDataset`, but an item has `activations` [B, ...] of the stored type in the place of `image`."""

    def __init__(
        self, stored: StoredStream, preprocessing: Preprocessing, augment_seed: int | None, balance: str = "none"
    ) -> None:
        super().__init__(stored.samples, preprocessing, augment_seed, balance)
        self.stored = stored
        self._damaged = stored.damaged

    def _read(self, rows: Rows, epoch: int, damaged: dict[int, dict[str, Any]]) -> tuple[Rows, dict[str, Tensor]]:
        used = np.array([self._try(int(row), epoch, damaged, self._check)[0] for row in rows])
        return used, {"activations": self.stored.read(used, epoch, rows)}

    def damages(self, places: Iterable[int]) -> list[dict[str, Any]]:
        """What is known of damaged samples, by their places in the stream, as `Quarantine.add` takes it."""
        damaged: dict[int, dict[str, Any]] = {}
        for row in (int(self.samples.rows[place]) for place in places):
            try:
                self._check(row)
            except DamagedSample as error:
                damaged[row] = self._damage(row, error)
        return list(damaged.values())

    def _check(self, row: int) -> None:
        """Raise what was found wrong with a row's picture when its activations were computed."""
        reason = self._damaged.get(int(self.stored.places(np.array([row]))[0]))
        if reason is not None:
            raise DamagedSample(*self.reader.place(row), reason)


def _from_records(records: Tensor) -> Tensor:
    """Records [B, ...] as the network takes them: the inverse of how they are stored."""
    return records.permute(0, 3, 1, 2) if records.ndim == 4 else records
