"""Which sample, when, on which rank: pure functions of (dataset digest, seed, epoch).

Nothing here knows of workers, and ranks only take slices, so placement never changes what is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_transfer.data.order import words

PADDING = -1
"""Row number of a padded place in a batch: it has no sample, and counts in no loss and no metric."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One rank's slice of one step, or of a part of it.

    Args:
        epoch: of the run, counted from 0.
        rows: manifest rows [B], `PADDING` where the slice is filled up.
        entries: labelled entries of the whole step, over all ranks and parts: what its loss is divided by.
    """

    epoch: int
    rows: Rows
    entries: int = 0


def shuffled(rows: Rows, digest: str, seed: int, epoch: int | str) -> Rows:
    """The rows in random order: a pure function of the dataset's digest, the seed and the epoch."""
    return rows[np.argsort(words(digest, seed, epoch, "", len(rows)), kind="stable")]


def substitute(rows: Rows, row: int, digest: str, seed: int, epoch: int, attempt: int) -> int:
    """The one of `rows` that stands in for a damaged row in an epoch: a pure function, so the same on every rank."""
    return int(rows[words(digest, seed, epoch, f"substitute|{row}|{attempt}", 1)[0] % len(rows)])


def share(samples: int, fraction: float) -> int:
    """How many of a split's labelled samples a stream's `fraction` keeps: rounded, at least one."""
    return max(1, round(fraction * samples))


def steps_per_epoch(samples: int, global_batch: int, last_batch: str = "keep") -> int:
    """Steps of one epoch; a last batch that is not full is kept or dropped."""
    return samples // global_batch if last_batch == "drop" else math.ceil(samples / global_batch)


def step_rows(order: Rows, step: int, global_batch: int) -> Rows:
    """The rows of all ranks at a step of an epoch."""
    return order[step * global_batch : (step + 1) * global_batch]


def slice_of(rows: Rows, index: int, count: int) -> Rows:
    """The rows [ceil(rows / count)] of a rank, or of a part of a step; all are as long, the last ones padded."""
    size = max(1, math.ceil(len(rows) / count))
    mine = rows[index * size : (index + 1) * size]
    return np.concatenate([mine, np.full(size - len(mine), PADDING, np.int64)])


def uniforms(seed: int, epoch: int, rows: Rows, draws: int) -> NDArray[np.float32]:
    """Random numbers in [0, 1) for each row, [B, draws]: a function of (seed, epoch, row) alone.

    A counter hashed by the finaliser of SplitMix64 (Steele et al. 2014): NumPy's own counter-based generators
    would need one object a sample.
    """
    with np.errstate(over="ignore"):
        stream = _mix(_mix(np.uint64(seed) + _GOLDEN) + np.uint64(epoch) * _GOLDEN)
        sample = _mix(stream + rows.astype(np.uint64) * _GOLDEN)
        words = _mix(sample[:, None] + (np.arange(draws, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    return ((words >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    x = np.asarray(x, np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
