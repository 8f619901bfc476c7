"""How well the orders of an epoch mix, and what each node reads: figures of the plan alone, without pictures or clocks.

    .venv/bin/python benchmarks/shuffle.py

The set has 100 classes in 200 shards of 500 samples, taken in two ways: `sorted` by class (two shards a class, the
worst that shards of others can be) and `mixed` (classes at random, as `lit-transfer prepare` packs). For each order:

- shards, classes: mean number of distinct ones in a global batch of 256 (whole batches).
- share_std: standard deviation of the class shares of a batch, over that of independent draws, sqrt(p (1 - p) / 256).
- displacement: mean distance of a sample from its place in the manifest, over N / 3, that of a uniform shuffle.
- read: of 1, 2 and 4 nodes, the mean share of the epoch's bytes whose shards a node opens; shards are equally long.

All are means of five epochs. The result goes to benchmarks/shuffle.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_transfer.config import Order
from lit_transfer.data import plan
from lit_transfer.data.order import Rows, epoch_rows
from lit_transfer.files import write_json

CLASSES, SHARDS, SHARD_SAMPLES = 100, 200, 500
SAMPLES = SHARDS * SHARD_SAMPLES
BATCH, EPOCHS = 256, 5
BLOCKS, PARTITIONS, NODES = (1, 2, 4, 8, 16, None), (1, 2, 4), (1, 2, 4)
SHARD_OF = np.repeat(np.arange(SHARDS), SHARD_SAMPLES)
SORTED = np.repeat(np.arange(CLASSES), SAMPLES // CLASSES)


def figures(order: Order) -> dict[str, Any]:
    """The figures of an order, means over epochs."""
    mixed = np.random.default_rng(0).permutation(SORTED)
    found: list[dict[str, float]] = []
    for epoch in range(EPOCHS):
        rows = epoch_rows(
            np.arange(SAMPLES),
            order,
            shards=SHARD_OF,
            weights=None,
            global_batch=BATCH,
            digest="shuffle",
            seed=0,
            epoch=epoch,
        )
        batches = rows[: SAMPLES // BATCH * BATCH].reshape(-1, BATCH)
        found.append(
            {"shards": distinct(SHARD_OF[batches])}
            | {f"classes_{name}": distinct(of[batches]) for name, of in (("sorted", SORTED), ("mixed", mixed))}
            | {f"share_std_{name}": share_std(of[batches]) for name, of in (("sorted", SORTED), ("mixed", mixed))}
            | {"displacement": float(np.abs(rows - np.arange(SAMPLES)).mean() / (SAMPLES / 3))}
            | {f"read_{nodes}": read(rows, nodes) for nodes in NODES}
        )
    means = {name: round(float(np.mean([one[name] for one in found])), 3) for name in found[0]}
    return {"block_shards": order.block_shards, "partitions": order.partitions} | means


def distinct(batches: NDArray[np.int64]) -> float:
    """Mean number of distinct values in a row of [batches, BATCH]."""
    return float(np.mean([len(np.unique(batch)) for batch in batches]))


def share_std(classes: NDArray[np.int64]) -> float:
    """Standard deviation of class shares in batches [batches, BATCH], over that of independent draws."""
    shares = np.stack([np.bincount(batch, minlength=CLASSES) for batch in classes]) / BATCH
    share = 1 / CLASSES
    return float(np.sqrt(np.mean((shares - share) ** 2) / (share * (1 - share) / BATCH)))


def read(rows: Rows, nodes: int) -> float:
    """Mean share of all shards that a node opens in an epoch."""
    steps = [plan.step_rows(rows, step, BATCH) for step in range(plan.steps_per_epoch(SAMPLES, BATCH))]
    opened = [np.concatenate([plan.slice_of(step, node, nodes) for step in steps]) for node in range(nodes)]
    return float(np.mean([len(np.unique(SHARD_OF[mine[mine != plan.PADDING]])) for mine in opened]) / SHARDS)


def main() -> None:
    results = []
    for block_shards in BLOCKS:
        for partitions in PARTITIONS:
            results.append(figures(Order(block_shards=block_shards, partitions=partitions)))
            print(results[-1])
    dataset = {"classes": CLASSES, "shards": SHARDS, "shard_samples": SHARD_SAMPLES, "global_batch": BATCH}
    write_json(Path(__file__).with_suffix(".json"), {"dataset": dataset, "results": results})


if __name__ == "__main__":
    main()
