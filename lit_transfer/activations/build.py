"""Fills shelves of the activation store: one pass over the pictures, by all processes that want the same together."""

from __future__ import annotations

import errno
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from lit_transfer.activations.prefix import Prefix, Recipe
from lit_transfer.activations.shelf import ROWS_PER_PART, Shelf
from lit_transfer.activations.views import View
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.loading import SampleDataset, loader
from lit_transfer.data.plan import PADDING, Batch, Rows
from lit_transfer.data.streams import Samples
from lit_transfer.errors import require

_POLL_S = 0.2


@dataclass(frozen=True)
class Wanted:
    """A shelf that shall be whole: its records are the rows of a stream, in order.

    Args:
        shelf: of the store.
        view: of each picture.
        cut: stages before it.
    """

    shelf: Shelf
    view: View
    cut: int


@dataclass(frozen=True)
class Source:
    """Where the records come from.

    Args:
        samples: the stream.
        preprocessing: of its pictures.
        device: where the prefix is.
        workers: processes that decode.
    """

    samples: Samples
    preprocessing: Preprocessing
    device: torch.device
    workers: int


def build(wanted: Sequence[Wanted], source: Source, prefix: Prefix, *, share: tuple[int, int], progress: bool) -> None:
    """Compute what is missing of some shelves of a stream; returns when all of it is there, whoever computed it.

    Args:
        wanted: of the stream.
        source: of the pictures.
        prefix: gives all their cuts.
        share: this process and how many there are: it begins at another part than the others.
        progress: show a bar.

    Raises:
        OSError: the disk is full, or a value is too large for the stored type.
    """
    bar = None
    dataset = SampleDataset(source.samples, source.preprocessing, None)
    while any(want.shelf.missing() for want in wanted):
        claims = _Claims(wanted, source.samples, share, prefix.recipe.batch)
        if claims.first is None:  # others have claimed the rest
            time.sleep(_POLL_S)
            continue
        try:
            for item in loader(dataset, claims, source.workers):
                claim = claims.pending[0]
                if progress and bar is None:
                    left = {part for want in wanted for part in want.shelf.missing()}
                    bar = tqdm(total=_rows(left, wanted[0].shelf.records), unit="img", desc="storing activations")
                claim.add(item, source.device, prefix)
                if bar is not None:
                    bar.update(int((item["row"] != PADDING).sum()) + len(item["damaged"]))
                if claim.is_full:
                    claims.pending.popleft()
                    claim.write()
        finally:
            for claim in claims.pending:
                claim.leases.close()
    if bar is not None:
        bar.close()


class _Claim:
    """A part that this process computes: what of it is missing on which shelves, and what was computed so far."""

    def __init__(self, part: int, wanted: Sequence[Wanted], leases: ExitStack, rows: Rows) -> None:
        self.part, self.wanted, self.leases, self.rows = part, wanted, leases, rows
        self.values: list[list[Tensor]] = [[] for _ in wanted]
        self.damaged: dict[int, str] = {}
        self.done = 0

    @property
    def is_full(self) -> bool:
        return self.done == len(self.rows)

    def add(self, item: dict[str, object], device: torch.device, prefix: Prefix) -> None:
        """Compute the records of the next rows."""
        rows = self.rows[self.done : self.done + prefix.recipe.batch]
        given, valid, damages = item["image"], item["valid"], item["damaged"]
        assert isinstance(given, Tensor) and isinstance(valid, Tensor) and isinstance(damages, list)
        canvas = given.to(device)
        bad = np.flatnonzero(~valid.numpy()[: len(rows)]).tolist()
        assert len(bad) == len(damages), "a place that is not valid is damaged"
        self.damaged |= {self.done + i: damage["reason"] for i, damage in zip(bad, damages, strict=True)}
        padded = np.concatenate([rows, np.full(len(canvas) - len(rows), rows[0])])
        for view in {want.view.name: want.view for want in self.wanted}.values():
            outputs = prefix(view.input(canvas, padded))
            for place, want in enumerate(self.wanted):
                if want.view.name == view.name:
                    self.values[place].append(_records(outputs[want.cut][: len(rows)], want.shelf, bad))
        self.done += len(rows)

    def write(self) -> None:
        """Put the part on its shelves, and let go of it."""
        with self.leases:
            for want, values in zip(self.wanted, self.values, strict=True):
                want.shelf.write(self.part, torch.cat(values), self.damaged)


class _Claims(Sampler[Batch]):
    """Batches of the parts that this process could claim. The first is claimed at once, if there is one; others when
    a loader asks for their rows.
    """

    def __init__(self, wanted: Sequence[Wanted], samples: Samples, share: tuple[int, int], batch: int) -> None:
        self.wanted, self.samples, self.share, self.batch = wanted, samples, share, batch
        self.pending: deque[_Claim] = deque()
        self._claimed = self._claims()
        self.first = next(self._claimed, None)

    def __iter__(self) -> Iterator[Batch]:
        for claim in chain([self.first] if self.first else [], self._claimed):
            for first in range(0, len(claim.rows), self.batch):
                rows = claim.rows[first : first + self.batch]
                yield Batch(0, np.concatenate([rows, np.full(self.batch - len(rows), PADDING, np.int64)]))

    def _claims(self) -> Iterator[_Claim]:
        parts = sorted({part for want in self.wanted for part in want.shelf.missing()})
        start = len(parts) * self.share[0] // self.share[1]
        for part in parts[start:] + parts[:start]:
            claim = self._claim(part)
            if claim is not None:
                self.pending.append(claim)
                yield claim

    def _claim(self, part: int) -> _Claim | None:
        mine = []
        with ExitStack() as leases:  # which lets go of all of them where one cannot be made
            for want in self.wanted:
                lease = want.shelf.claim(part)
                if lease is not None:
                    leases.enter_context(lease)
                    mine.append(want)
            rows = self.samples.rows[part * ROWS_PER_PART : (part + 1) * ROWS_PER_PART]
            return _Claim(part, mine, leases.pop_all(), rows) if mine else None


def check_records(wanted: Sequence[Wanted], source: Source, prefix: Prefix, count: int) -> None:
    """Compute `count` random records of a stream's shelves again, and compare, where there are values.

    Raises:
        UserError: a record is not what its picture gives.
    """
    rows = source.samples.rows
    each = min(len(rows), -(-count // len(wanted)))
    places = np.sort(np.random.default_rng().choice(len(rows), each, replace=False))
    dataset = SampleDataset(source.samples, source.preprocessing, None)
    for first in range(0, each, prefix.recipe.batch):
        some = places[first : first + prefix.recipe.batch]
        item = dataset[Batch(0, rows[some])]
        canvas, sound = item["image"].to(source.device), item["valid"]
        for want in wanted:
            output = prefix(want.view.input(canvas, rows[some]))[want.cut]
            _compare(output, want.shelf, some, sound, _tolerance(prefix.recipe, want.shelf))


def _compare(output: Tensor, shelf: Shelf, places: NDArray[np.int64], sound: Tensor, tolerance: float) -> None:
    """Refuse a shelf whose records at some places are not the output [n, ...], as far as that is sound."""
    given = _channels_last(output).float().cpu().flatten(1)
    kept = shelf.read(places).float().flatten(1)
    apart = (given - kept).norm(dim=1) / given.norm(dim=1).clamp(min=1e-6)
    without = [*shelf.damaged({int(place) // ROWS_PER_PART for place in places})]
    apart = torch.where(sound & ~torch.from_numpy(np.isin(places, without)), apart, 0.0)
    require(
        float(apart.max()) <= tolerance,
        f"{shelf.folder}: record {int(places[int(apart.argmax())])} differs by {float(apart.max()):.2g} of its norm "
        f"from what its picture gives, and {int((apart > tolerance).sum())} of {len(places)} do; remove that "
        "folder, or set activations.store off.",
    )


def _tolerance(recipe: Recipe, shelf: Shelf) -> float:
    """Largest difference of two computations of a record, as a share of its norm."""
    stored = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[shelf.dtype]
    return stored + (5e-2 if recipe.bf16_from else 0.0)  # other machines round otherwise in bf16


def record_shape(output: Tensor) -> tuple[int, ...]:
    """The shape of one record of activations [B, ...]: maps have their channels last, as the network computes them."""
    return tuple(_channels_last(output).shape[1:])


def _channels_last(output: Tensor) -> Tensor:
    return output.permute(0, 2, 3, 1) if output.ndim == 4 else output


def _records(output: Tensor, shelf: Shelf, bad: list[int]) -> Tensor:
    """Activations [n, ...] as they are stored, on the CPU.

    Raises:
        OSError: a value is too large for the stored type; a run may compute what cannot be stored.
    """
    records = _channels_last(output).to(shelf.dtype).contiguous().cpu()
    records[bad] = 0
    if not records.isfinite().all():
        cut, dtype = shelf.description["content"]["cut"], str(shelf.dtype).removeprefix("torch.")
        largest = float(output.abs().max())
        told = f"those at {cut} reach {largest:.3g}, which activations.dtype {dtype} cannot hold"
        raise OSError(errno.ERANGE, f"{told} and bfloat16 can" if math.isfinite(largest) else told)
    return records


def _rows(parts: set[int], records: int) -> int:
    return sum(min(ROWS_PER_PART, records - part * ROWS_PER_PART) for part in parts)
