"""Features in memory: the output of the whole backbone for a stream, and what the steps of an epoch take of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_transfer.activations.data import StoredStream
from lit_transfer.config import Order
from lit_transfer.data.loading import SUBSTITUTES
from lit_transfer.data.plan import PADDING, Batch, Rows, steps_per_epoch
from lit_transfer.data.samplers import TrainSampler
from lit_transfer.data.streams import Samples
from lit_transfer.errors import UserError
from lit_transfer.model.memory import free_bytes

CPU = torch.device("cpu")
MEMORY_SHARE = 0.25
"""Of the memory that is free, for features."""

STRETCH_BYTES = 2**28
"""Of features that are gathered at once: an epoch's, or a part of it."""


@dataclass(frozen=True)
class Features:
    """What the backbone gives for a stream, in memory.

    Args:
        samples: the stream.
        views: [N, F] each, in the order of `samples.rows`, on the device or on the CPU; heads take them in float32.
        damaged: places of samples without values, in any view.
        view_of: (epoch of the run, manifest rows [B]) -> place in `views` that each row takes [B].
        device: where heads train.
    """

    samples: Samples
    views: tuple[Tensor, ...]
    damaged: frozenset[int]
    view_of: Callable[[int, Rows], NDArray[np.int64]]
    device: torch.device = CPU

    def places(self, rows: Rows) -> Rows:
        """Where manifest rows [B] stand in the views."""
        return np.searchsorted(self.samples.rows, rows)

    def gather(self, rows: Rows, which: NDArray[np.int64]) -> Tensor:
        """Features [B, F] of manifest rows [B], each in its view, on the device."""
        kept_on = self.views[0].device
        places = torch.from_numpy(self.places(rows)).to(kept_on)
        if len(self.views) == 1:
            return self.views[0].index_select(0, places).to(self.device).float()
        gathered = torch.empty(len(rows), self.views[0].shape[1], device=kept_on)
        for view, values in enumerate(self.views):
            mine = torch.from_numpy(np.flatnonzero(which == view)).to(kept_on)
            gathered[mine] = values.index_select(0, places[mine]).float()
        return gathered.to(self.device)


def in_memory(streams: Mapping[str, StoredStream], device: torch.device) -> dict[str, Features] | None:
    """Stored features of each stream, checked, for heads on a device: in its own memory, where they take at most
    `MEMORY_SHARE` of what is free, else in that of the CPU; None where they do not fit there, either.
    """
    needed = sum(shelf.full_bytes for stream in streams.values() for shelf in stream.shelves)
    kept_on = next((place for place in (device, CPU) if needed <= MEMORY_SHARE * free_bytes(place)), None)
    if kept_on is None:
        return None
    return {
        name: Features(
            samples=stream.samples,
            views=tuple(shelf.load().to(kept_on) for shelf in stream.shelves),
            damaged=frozenset(stream.damaged),
            view_of=stream.views.which,
            device=device,
        )
        for name, stream in streams.items()
    }


class Part(NamedTuple):
    """What a part of a step reads.

    Args:
        features: [B, F].
        targets: [B] or [B, K].
        weights: in the loss [B].
        share: gradient of the step's loss by the weighted loss of each row [B]: 1 over the planned entries, or zero
            where padded.
        gradient: of the step's loss by the loss of each row [B]: `share` times `weights`.
    """

    features: Tensor
    targets: Tensor
    weights: Tensor
    share: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Stretch:
    """Steps of one epoch, gathered.

    Args:
        epoch: of the run.
        parts: of all steps, one after the other.
        read_share: of each step, labelled entries that were read / planned; 1 where nothing is damaged.
        damaged: samples of each step that others stand in for.
    """

    epoch: int
    parts: list[Part]
    read_share: list[float]
    damaged: list[int]


def stretches(
    features: Features, order: Order, *, seed: int, global_batch: int, steps: range, parts: int, first_epoch: int
) -> Iterator[Stretch]:
    """The steps of a phase on one rank, gathered an epoch at a time, or less where that is much.

    Args:
        features: of the training stream.
        order: of an epoch.
        seed: of the order.
        global_batch: samples of a step.
        steps: of the phase, that are still to come.
        parts: in which a step is computed.
        first_epoch: epochs of earlier phases.

    Raises:
        UserError: no sound sample was found in the place of a damaged one.
    """
    sampler = TrainSampler(
        features.samples,
        seed=seed,
        global_batch=global_batch,
        steps=steps,
        order=order,
        parts=parts,
        first_epoch=first_epoch,
    )
    per_epoch = steps_per_epoch(len(features.samples.rows), global_batch, order.last_batch)
    batches, step = iter(sampler), steps.start
    most = max(1, STRETCH_BYTES // (4 * global_batch * features.views[0].shape[1]))
    while step < steps.stop:
        count = min(most, steps.stop - step, per_epoch - step % per_epoch)
        yield _gather(features, list(islice(batches, count * parts)), parts, seed, order.balance)
        step += count


def _gather(features: Features, batches: Sequence[Batch], parts: int, seed: int, balance: str) -> Stretch:
    """What the parts of some steps of an epoch read."""
    samples, device, epoch = features.samples, features.device, batches[0].epoch
    sizes = np.array([len(batch.rows) for batch in batches], np.int64)
    planned = np.concatenate([batch.rows for batch in batches])
    valid = planned != PADDING
    rows = planned if valid.all() else np.concatenate([_filled(batch.rows, samples.rows) for batch in batches])
    used, damaged = _sound(features, rows, epoch, seed, balance)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    replaced = np.add.reduceat((damaged & valid).astype(np.int64), starts[::parts])
    entries = np.array([max(1, batch.entries) for batch in batches[::parts]])
    read = entries.copy()
    for step in np.flatnonzero(replaced):
        mine = slice(starts[step * parts], ends[(step + 1) * parts - 1])
        read[step] = samples.entries(used[mine][valid[mine]])
    of_rows = np.repeat(np.arange(len(batches)) // parts, sizes)
    # In fp32 and in this order, as Lightning divides by the parts, and the module by the entries.
    share = (torch.ones(len(entries)) / parts / torch.from_numpy(entries).float() * parts)[of_rows]
    share = (share * torch.from_numpy(valid)).to(device)
    weights = torch.from_numpy(samples.loss_weights(used, balance)).to(device)
    targets = torch.from_numpy(samples.targets[used]).to(device)
    tensors = (features.gather(used, features.view_of(epoch, rows)), targets, weights, share, share * weights)
    return Stretch(
        epoch=epoch,
        parts=[Part(*each) for each in zip(*(torch.split(t, sizes.tolist()) for t in tensors), strict=True)],
        read_share=(read / entries).tolist(),
        damaged=replaced.tolist(),
    )


def _filled(rows: Rows, stream: Rows) -> Rows:
    """A part's rows with another in the padded places, as `SampleDataset` fills them: mixup sees those, too."""
    valid = rows != PADDING
    return np.where(valid, rows, (rows[valid] if valid.any() else stream)[0])


def _sound(features: Features, rows: Rows, epoch: int, seed: int, balance: str) -> tuple[Rows, NDArray[np.bool_]]:
    """The rows that are read where some are damaged, and which of them are, both [R]."""
    damaged = np.isin(features.places(rows), list(features.damaged))
    used = rows.copy()
    for place in np.flatnonzero(damaged):
        used[place] = _stand_in(features, int(rows[place]), epoch, seed, balance)
    return used, damaged


def _stand_in(features: Features, row: int, epoch: int, seed: int, balance: str) -> int:
    samples = features.samples
    for attempt in range(1, SUBSTITUTES):
        used = samples.stand_in(row, balance, seed, epoch, attempt)
        if int(np.searchsorted(samples.rows, used)) not in features.damaged:
            return used
    raise UserError(
        f"sample {samples.manifest.table['key'][row].as_py()} of {samples.manifest.name} and {SUBSTITUTES - 1} others "
        "that could stand in for it are damaged; run `lit-transfer prepare --verify` on the dataset."
    )
