"""The order of an epoch: which samples, how often, and near which others. Pure functions of what they are given.

An epoch is made in three steps: `drawn` says which rows it has (each once, or balanced), `partitioned` in which of the
canonical partitions each stands, and `interleaved` deals the partitions out to the global batches.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_transfer.config import Order

Rows = NDArray[np.int64]


def epoch_rows(
    rows: Rows,
    order: Order,
    *,
    shards: NDArray[Any],
    weights: NDArray[np.float64] | None,
    global_batch: int,
    digest: str,
    seed: int,
    epoch: int,
) -> Rows:
    """The rows [N] of an epoch in their order: a pure function of all that it is given.

    Args:
        rows: of the stream, [N], ascending.
        order: the settings.
        shards: of every row of the dataset, [M].
        weights: of the stream's rows, [N], where they are not drawn once each.
        global_batch: samples of a step.
        digest: of the dataset.
        seed: of the run.
        epoch: of the run.
    """
    if weights is not None:
        rows = drawn(rows, weights, float(words(digest, seed, epoch, "drawn", 1)[0]) / 2**64)
    row_words = words(digest, seed, epoch, "", len(rows))
    if order.block_shards is None and order.partitions == 1:
        return rows[np.argsort(row_words, kind="stable")]
    of_rows = shards[rows].astype(np.int64)
    count = int(of_rows.max()) + 1
    shard_words = words(digest, seed, epoch, "shards", count)
    rows = rows[partitioned(of_rows, shard_words, row_words, order.block_shards, order.partitions)]
    return interleaved(rows, order.partitions, global_batch)


def words(digest: str, seed: int, epoch: int | str, use: str, count: int) -> NDArray[np.uint64]:
    """Random 64-bit words: a function of (dataset digest, seed, epoch, use) alone."""
    key = hashlib.sha256(f"{digest}|{seed}|{epoch}{use and '|'}{use}".encode()).digest()
    # Raw Philox words are the same in every NumPy; Generator.permutation promises that for no two versions.
    return np.random.Philox(key=np.frombuffer(key[:16], np.uint64)).random_raw(count)


def drawn(rows: Rows, weights: NDArray[np.float64], start: float) -> Rows:
    """As many rows as there are, each about in proportion to its weight: its expected number, rounded down or up.

    Systematic resampling (Carpenter, Clifford & Fearnhead 1999): one random number for all, so that no row is left out
    or doubled by chance alone.

    Args:
        rows: [N], ascending.
        weights: [N], not negative, not all zero.
        start: in [0, 1).
    """
    ends = np.cumsum(weights) * (len(rows) / np.sum(weights))
    ends[-1] = len(rows)  # whatever the rounding of the sum
    reached = np.floor(ends + start).astype(np.int64)
    reached[-1] = len(rows)
    return np.repeat(rows, np.diff(reached, prepend=0))


def class_weights(targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights that give every class the same share of an epoch: 1 / count of the row's class."""
    return 1.0 / np.bincount(targets)[targets]


def partitioned(
    shards: NDArray[np.int64],
    shard_words: NDArray[np.uint64],
    row_words: NDArray[np.uint64],
    block_shards: int | None,
    partitions: int,
) -> NDArray[np.int64]:
    """A permutation of N rows: shards in random order, cut into equal parts, and rows at random within each block.

    A part shares at most one shard with the next, and no block reaches over its end. The rows that are left over where
    parts do not divide N come last.

    Args:
        shards: of each row, [N].
        shard_words: a random word for each shard of the dataset.
        row_words: a random word for each row, [N].
        block_shards: shards of a part that are mixed with each other; None mixes all of a part.
        partitions: how many parts.
    """
    present = np.unique(shards)
    place = np.empty(int(present[-1]) + 1, np.int64)
    place[present[np.argsort(shard_words[present], kind="stable")]] = np.arange(len(present))
    by_shard = np.argsort(place[shards], kind="stable")
    size = max(1, len(shards) // partitions)
    part = np.arange(len(shards)) // size
    places = place[shards[by_shard]]
    block = np.empty(len(shards), np.int64)
    block[by_shard] = part * len(present) + (places - places[part * size]) // (block_shards or len(present))
    return np.lexsort((row_words, block))


def interleaved(rows: Rows, partitions: int, global_batch: int) -> Rows:
    """Equal parts of the rows, dealt out so that each global batch has its share of every part, side by side.

    A rank's slice of a batch then comes from the same part all through the epoch, as far as ranks divide the
    partitions. The last steps, which have no full share of each, take what is left.

    Args:
        rows: [N], in the order of the partitions.
        partitions: how many parts; divides `global_batch`.
        global_batch: samples of a step.
    """
    assert global_batch % partitions == 0, (global_batch, partitions)
    share = global_batch // partitions
    size = len(rows) // partitions
    steps = size // share
    parts = rows[: partitions * size].reshape(partitions, size)
    whole = parts[:, : steps * share].reshape(partitions, steps, share).transpose(1, 0, 2)
    return np.concatenate([whole.reshape(-1), parts[:, steps * share :].reshape(-1), rows[partitions * size :]])
