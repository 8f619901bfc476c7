"""What a manifest of 10^4, 10^6 and 10^7 samples costs: seconds and memory to open it and to make an epoch's order.

    .venv/bin/python benchmarks/manifest.py [--samples 10000 1000000 10000000]

The manifests are synthetic (1,000 samples a shard, 1,000 classes; shards are empty files of the right length) and are
written to a temporary folder. Each is read in a fresh process: open, the rows of `train`, the targets, the class
histograms of all shards, and the order of an epoch, uniform and in blocks. Memory is the peak of the process after each
(VmHWM, mapped pages included), in 10^6 bytes. The result goes to benchmarks/manifest.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lit_transfer.config import Order
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.order import Rows, epoch_rows
from lit_transfer.data.packing import record
from lit_transfer.data.schema import FILE_NAME, SAMPLE_COLUMNS, Label, Shard
from lit_transfer.files import write_json

SHARD_SAMPLES, CLASSES, SAMPLE_BYTES = 1000, 1000, 100_000
ORDERS = {"uniform_order": Order(), "block_order": Order(block_shards=16, partitions=8)}


def make(folder: Path, samples: int) -> None:
    """Write a synthetic dataset: nine tenths `train`, the rest `val`."""
    folder.mkdir(parents=True)
    numbers = np.arange(samples)
    shard = (numbers // SHARD_SAMPLES).astype(np.int32)
    shards = [_shard(folder, i, samples) for i in range(shard[-1] + 1)]
    key = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 8, "0")
    rng = np.random.default_rng(0)
    columns = {
        "key": key,
        "split": pa.array([one.split for one in shards]).take(pa.array(shard)),
        "group": pa.nulls(samples, pa.string()),
        "weight": np.ones(samples, np.float32),
        "source": pc.binary_join_element_wise("pictures/", key, ".jpg", ""),
        "shard": shard,
        "offset": numbers % SHARD_SAMPLES * SAMPLE_BYTES,
        "size": np.full(samples, SAMPLE_BYTES - 512),
        "hash": pa.Array.from_buffers(pa.binary(32), samples, [None, pa.py_buffer(rng.bytes(32 * samples))]),
        "width": np.full(samples, 500, np.int32),
        "height": np.full(samples, 375, np.int32),
    }
    table = pa.table(
        {name: pa.array(column, SAMPLE_COLUMNS[name]) for name, column in columns.items()}
        | {"label.label": pa.array(rng.integers(0, CLASSES, samples), pa.int32())}
    )
    names = tuple(f"class {i}" for i in range(CLASSES))
    label = Label(name="label", classes=names, display=names)
    record.compute_digest = lambda *_: "00" * 32  # what is measured never computes it
    record.write_manifest(folder, task="multiclass", labels=[label], shards=shards, table=table, pack={})


def _shard(folder: Path, number: int, samples: int) -> Shard:
    held = min(SHARD_SAMPLES, samples - number * SHARD_SAMPLES)
    split = "val" if number % 10 == 9 else "train"
    name = f"{split}-{number:06d}.tar"
    with (folder / name).open("wb") as file:
        file.truncate(held * SAMPLE_BYTES)
    return Shard(name=name, split=split, sha256=f"{number:064x}", bytes=held * SAMPLE_BYTES, samples=held)


def measure(folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of each use, in this process."""
    figures: dict[str, Any] = {"start_mb": peak_mb()}

    def timed(name: str, use: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = use()
        figures[f"{name}_s"] = round(time.perf_counter() - start, 4)
        figures[f"{name}_mb"] = peak_mb()
        return result

    manifest = timed("open", lambda: Manifest.open(folder))
    rows = timed("rows", lambda: manifest.rows("train"))
    timed("targets", manifest.targets)
    timed("histograms", manifest.class_counts)
    for name, order in ORDERS.items():
        timed(name, functools.partial(_epoch, manifest, rows, order))
    return figures


def _epoch(manifest: Manifest, rows: Rows, order: Order) -> Rows:
    shards = manifest.table["shard"].to_numpy()
    return epoch_rows(
        rows, order, shards=shards, weights=None, global_batch=256, digest=manifest.digest, seed=0, epoch=1
    )


def peak_mb() -> float:
    """Most memory that this process has held so far, in 10^6 bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def measured(samples: int, folder: Path) -> dict[str, Any]:
    """The figures of a dataset of so many samples, made and read in processes of their own."""
    for step in ("--make", "--measure"):
        command = [sys.executable, __file__, step, str(folder), "--samples", str(samples)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return {"samples": samples, "manifest_mb": (folder / FILE_NAME).stat().st_size / 1e6} | figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**4, 10**6, 10**7])
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.samples[0])
    elif options.measure:
        print(json.dumps(measure(options.measure)))
    else:
        results = []
        for samples in options.samples:
            with tempfile.TemporaryDirectory() as folder:
                results.append(measured(samples, Path(folder) / "data"))
            print(json.dumps(results[-1]))
        write_json(Path(__file__).with_suffix(".json"), {"results": results})


if __name__ == "__main__":
    main()
