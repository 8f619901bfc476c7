"""A manifest as a file: written whole, with the dataset's digest; and the list of what is not in it."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lit_transfer.data.schema import FILE_NAME, FORMAT, HEADER_KEY, Label, Shard
from lit_transfer.files import replacing

_DIGESTED = ("key", "hash", "split", "group", "weight")


def write_manifest(
    folder: Path,
    *,
    task: str,
    labels: Sequence[Label],
    shards: Sequence[Shard],
    table: pa.Table,
    pack: Mapping[str, Any],
) -> None:
    """Write `manifest.arrow` into a folder, whole or not at all, and flush it to the disk.

    The rows stand in the order of the shards, as many for each as it has samples.
    """
    splits: dict[str, int] = {}
    for shard in shards:
        splits[shard.split] = splits.get(shard.split, 0) + shard.samples
    header = {
        "format": FORMAT,
        "task": task,
        "labels": [dataclasses.asdict(label) for label in labels],
        "splits": splits,
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "digest": compute_digest(table, task, labels, shards),
        "pack": dict(pack),
    }
    metadata = {HEADER_KEY: json.dumps(header, ensure_ascii=False).encode()}
    # One batch: the columns of a mapped file then are arrays without a copy.
    table = table.combine_chunks().replace_schema_metadata(metadata)
    with replacing(folder / FILE_NAME) as path, path.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def compute_digest(table: pa.Table, task: str, labels: Sequence[Label], shards: Sequence[Shard]) -> str:
    """The dataset's identity: sha256, hex, over one JSON line each for header, labels, shards and samples.

    It covers the format version, task, label names and classes, shard hashes, and every sample's key, picture
    hash, split, group, weight and labels. Display names, metadata and sources are left out.
    """
    sha = hashlib.sha256()
    for line in _canonical_lines(table, task, labels, shards):
        sha.update(json.dumps(line, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
    return sha.hexdigest()


def write_rejected(path: Path, header: Sequence[str], rejected: Sequence[Sequence[str]]) -> None:
    """Write the CSV of what is not in a dataset, and why; whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rejected)


def _canonical_lines(
    table: pa.Table, task: str, labels: Sequence[Label], shards: Sequence[Shard]
) -> Iterator[list[Any]]:
    yield ["lit_transfer", FORMAT, task]
    for label in labels:
        yield ["label", label.name, *label.classes]
    for shard in shards:
        yield ["shard", shard.sha256]
    columns = [*_DIGESTED, *(f"label.{label.name}" for label in labels)]
    for batch in table.select(columns).to_batches(max_chunksize=8192):
        for row in batch.to_pylist():
            yield ["sample", *(value.hex() if isinstance(value, bytes) else value for value in row.values())]
