"""What a rank's processes hold with a large dataset; the datasets repeat the samples that `loader.py` has packed.

Used by `loader.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from loader_pipelines import BATCH, SEED, WORKERS, preprocessing

from lit_transfer.config import Data, Order, Stream
from lit_transfer.data import plan
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.module import ImageData
from lit_transfer.data.order import epoch_rows
from lit_transfer.data.packing import record
from lit_transfer.data.plan import steps_per_epoch
from lit_transfer.data.streams import open_streams

STEPS = 20
NODES, PARTITIONS, SHARDS, SHARD_SAMPLES, GLOBAL_BATCH = (1, 2, 4), 4, 500, 2000, 256


def make(path: str, samples: int) -> None:
    """Write a dataset of so many samples: links to one shard, again and again."""
    whole, out = Manifest.open(Path(path) / "whole"), Path(path) / "large"
    copies = samples // whole.table.num_rows
    out.mkdir()
    shards = []
    for copy in range(copies):
        name = f"train-{copy:06d}.tar"
        (out / name).symlink_to(whole.path / whole.shards[0].name)
        shards.append(replace(whole.shards[0], name=name))
    table = pa.concat_tables([whole.table] * copies).combine_chunks()
    shard = np.repeat(np.arange(copies, dtype=np.int32), whole.table.num_rows)
    table = table.set_column(table.column_names.index("shard"), "shard", pa.array(shard))
    record.compute_digest = lambda *_: "00" * 32  # what is measured never computes it
    record.write_manifest(out, task=whole.task, labels=whole.labels, shards=shards, table=table, pack={})


def measure(path: str) -> None:
    """Open the dataset, plan an epoch and take some batches; then print what this process and its workers hold."""
    start = time.perf_counter()
    streams = open_streams(Data(train=Stream(manifest=f"{path}/large", split="train")), SEED)
    steps = steps_per_epoch(len(streams["train"].rows), BATCH)
    data = ImageData(streams, preprocessing(), seed=SEED, global_batch=BATCH, workers=WORKERS, steps=range(steps))
    batches = iter(data.train_dataloader())
    next(batches)
    first_batch_s = time.perf_counter() - start
    for _ in range(STEPS):
        next(batches)
    children = descendants(os.getpid())
    figures = {
        "samples": len(streams["train"].rows),
        "first_batch_s": first_batch_s,
        "training_process_peak_mb": held_mb(os.getpid(), "status", "VmHWM"),
        "largest_worker_peak_mb": max(held_mb(child, "status", "VmHWM") for child in children),
        "all_processes_mb": sum(held_mb(process, "smaps_rollup", "Pss") for process in [os.getpid(), *children]),
        "of_it_not_mapped_files_mb": sum(
            held_mb(process, "smaps_rollup", "Pss_Anon") for process in [os.getpid(), *children]
        ),
    }
    print(json.dumps(figures))


def held_mb(process: int, file: str, name: str) -> float:
    """A line of what the kernel says of a process, in 10^6 bytes."""
    text = Path(f"/proc/{process}/{file}").read_text()
    return int(text.partition(f"\n{name}:")[2].split()[0]) * 1024 / 1e6


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and that those have."""
    files = Path(f"/proc/{process}/task").glob("*/children")
    children = [int(number) for file in files for number in file.read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def measured(folder: Path, samples: int) -> dict[str, Any]:
    """`measure` of a dataset of so many samples, which is made first and removed last."""
    _call("make", str(folder), samples)
    figures: dict[str, Any] = json.loads(_call("measure", str(folder)).splitlines()[-1])
    for path in (folder / "large").iterdir():
        path.unlink()
    (folder / "large").rmdir()
    return figures


def _call(name: str, *arguments: str | int) -> str:
    """What a function of this file prints in a process of its own."""
    # Not as a script: workers import the script that they belong to, and would hold all that this one imports.
    code = f"import loader_memory; loader_memory.{name}(*{arguments})"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent).stdout


def node_shares() -> dict[str, float]:
    """By number of nodes, the mean share of a dataset's shards, all equally long, that a node opens in an epoch."""
    shard_of = np.repeat(np.arange(SHARDS), SHARD_SAMPLES)
    rows = epoch_rows(
        np.arange(len(shard_of)),
        Order(partitions=PARTITIONS),
        shards=shard_of,
        weights=None,
        global_batch=GLOBAL_BATCH,
        digest="nodes",
        seed=SEED,
        epoch=0,
    )
    steps = [plan.step_rows(rows, step, GLOBAL_BATCH) for step in range(steps_per_epoch(len(rows), GLOBAL_BATCH))]
    shares = {}
    for nodes in NODES:
        read = [np.concatenate([plan.slice_of(step, node, nodes) for step in steps]) for node in range(nodes)]
        opened = [len(np.unique(shard_of[mine[mine != plan.PADDING]])) for mine in read]
        shares[str(nodes)] = sum(opened) / nodes / SHARDS
    return shares
