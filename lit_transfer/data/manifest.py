"""What a packed dataset is: task, labels, splits, shards, samples and one digest over all of it.

One Arrow IPC file, `manifest.arrow`, beside the tar shards. The schema's metadata key `lit_transfer` holds
the header as JSON; the table has one row per sample, in the order of the shards. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lit_transfer.errors import UserError, nearest, require

FORMAT = 1
FILE_NAME = "manifest.arrow"
TASKS = ("multiclass", "multilabel", "ordinal", "regression", "none")
CLASS_TASKS = ("multiclass", "ordinal")

SAMPLE_COLUMNS: dict[str, pa.DataType] = {
    "key": pa.string(),
    "split": pa.string(),
    "group": pa.string(),
    "weight": pa.float32(),
    "source": pa.string(),
    "shard": pa.int32(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "hash": pa.binary(32),
    "width": pa.int32(),
    "height": pa.int32(),
}
LABEL_TYPES: dict[str, pa.DataType] = {
    "multiclass": pa.int32(),
    "ordinal": pa.int32(),
    "multilabel": pa.int8(),
    "regression": pa.float32(),
}
_HEADER_KEY = b"lit_transfer"
_DIGESTED = ("key", "hash", "split", "group", "weight")


@dataclass(frozen=True, kw_only=True)
class Label:
    """A label column.

    Args:
        name: of the column.
        classes: class names by index; empty for multilabel and regression.
        display: how people read the classes; for multilabel and regression one name, of the column.
    """

    name: str
    classes: tuple[str, ...]
    display: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A tar file of the dataset: file name, split, content hash (hex), length in bytes, samples inside."""

    name: str
    split: str
    sha256: str
    bytes: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A packed dataset; `Manifest.open` reads one.

    Args:
        path: folder of the dataset.
        task: one of `TASKS`.
        labels: label columns; empty for task `none`.
        splits: samples per split.
        shards: the tar files; the table's `shard` counts them from 0.
        digest: identity of the content, hex.
        pack: the settings that it was packed with, and the counts of rejected and ignored files.
        table: a row per sample: `SAMPLE_COLUMNS`, `label.<name>` (null is missing), `meta.<name>` (text).
    """

    path: Path
    task: str
    labels: tuple[Label, ...]
    splits: dict[str, int]
    shards: tuple[Shard, ...]
    digest: str
    pack: dict[str, Any]
    table: pa.Table

    @classmethod
    def open(cls, path: str | Path) -> Manifest:
        """Memory-map the manifest of a dataset folder and check that its shards are there.

        Raises:
            UserError: no manifest, a foreign or damaged one, or a shard that is missing or has another size.
        """
        folder = Path(path)
        file = folder / FILE_NAME
        require(
            file.is_file(),
            f"'{folder}' holds no dataset ({FILE_NAME}); make one with `lit-transfer prepare`.",
        )
        table = _read_table(file)
        header = _read_header(file, table)
        manifest = cls(path=folder, table=table, **header)
        manifest._check_columns()
        for shard in manifest.shards:
            tar = folder / shard.name
            found = tar.stat().st_size if tar.is_file() else None
            require(
                found == shard.bytes,
                f"shard '{tar}' "
                + ("is missing" if found is None else f"has {found} bytes, not {shard.bytes}")
                + "; copy the dataset again, or pack it anew.",
            )
        return manifest

    def rows(self, split: str) -> NDArray[np.int64]:
        """Rows of a split, ascending; a `UserError` names the splits if there is none of that name."""
        require(
            split in self.splits,
            f"dataset '{self.path}' has no split '{split}'; its splits are {', '.join(self.splits)}."
            + nearest(split, list(self.splits)),
        )
        return np.flatnonzero(pc.equal(self.table["split"], split).to_numpy()).astype(np.int64)

    def targets(self, label: str | None = None) -> NDArray[Any]:
        """What there is to learn, for all N rows.

        Returns:
            multiclass and ordinal: int64 `[N]`, -1 where missing; multilabel: float32 `[N, L]` and
            regression: float32 `[N, R]`, NaN where missing, over all label columns or the one named.

        Raises:
            UserError: no such label, or none named where there are several.
        """
        if self.task in CLASS_TASKS:
            column = self.table[f"label.{self._one(label).name}"]
            return np.asarray(column.cast(pa.int64()).fill_null(-1).to_numpy())
        columns = [self.table[f"label.{chosen.name}"].cast(pa.float32()) for chosen in self._some(label)]
        return np.stack([column.fill_null(float("nan")).to_numpy() for column in columns], axis=1)

    def classes(self, label: str | None = None) -> tuple[str, ...]:
        """Class names by index; for multilabel and regression the names of the label columns."""
        if self.task in CLASS_TASKS:
            return self._one(label).classes
        return tuple(chosen.name for chosen in self._some(label))

    def display(self, label: str | None = None) -> tuple[str, ...]:
        """What `classes` gives, as people read it."""
        if self.task in CLASS_TASKS:
            return self._one(label).display
        return tuple(chosen.display[0] for chosen in self._some(label))

    def straddling(self, column: str) -> int:
        """How many values of a column, such as `group` or `hash`, stand in more than one split."""
        counted = self.table.group_by(column).aggregate([("split", "count_distinct")]).drop_null()
        return int(pc.sum(pc.greater(counted["split_count_distinct"], 1)).as_py() or 0)

    def _one(self, name: str | None) -> Label:
        names = ", ".join(label.name for label in self.labels)
        require(
            name is not None or len(self.labels) == 1,
            f"dataset '{self.path}' has several labels ({names}); name one with data.label.",
        )
        return self._some(name)[0]

    def _some(self, name: str | None) -> tuple[Label, ...]:
        require(
            bool(self.labels),
            f"dataset '{self.path}' has no labels; it can be predicted on, not learned from.",
        )
        names = [label.name for label in self.labels]
        require(
            name is None or name in names,
            f"dataset '{self.path}' has no label '{name}'; it has {', '.join(names)}." + nearest(name or "", names),
        )
        return tuple(label for label in self.labels if name in (None, label.name))

    def _check_columns(self) -> None:
        expected = {
            **SAMPLE_COLUMNS,
            **{f"label.{label.name}": LABEL_TYPES[self.task] for label in self.labels},
        }
        found = {field.name: field.type for field in self.table.schema}
        for name, kind in expected.items():
            require(
                found.get(name) == kind,
                f"'{self.path / FILE_NAME}': column '{name}' "
                + (f"is {found[name]}, not {kind}" if name in found else "is missing")
                + "; pack the dataset anew.",
            )
        extra = [name for name in found if name not in expected and not name.startswith("meta.")]
        require(not extra, f"'{self.path / FILE_NAME}': unknown column {', '.join(extra)}; pack the dataset anew.")


def compute_digest(table: pa.Table, task: str, labels: Sequence[Label], shards: Sequence[Shard]) -> str:
    """The dataset's identity: sha256, hex, over one JSON line each for header, labels, shards and samples.

    It covers the format version, task, label names and classes, shard hashes, and every sample's key, picture
    hash, split, group, weight and labels. Display names, metadata and sources are left out.
    """
    sha = hashlib.sha256()
    for line in _canonical_lines(table, task, labels, shards):
        sha.update(json.dumps(line, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
    return sha.hexdigest()


def write_manifest(
    folder: Path,
    *,
    task: str,
    labels: Sequence[Label],
    shards: Sequence[Shard],
    table: pa.Table,
    pack: Mapping[str, Any],
) -> None:
    """Write `manifest.arrow` into a folder that holds the shards, and flush it to the disk."""
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
    table = table.replace_schema_metadata({_HEADER_KEY: json.dumps(header, ensure_ascii=False).encode()})
    with (folder / FILE_NAME).open("wb") as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())


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


def _read_table(file: Path) -> pa.Table:
    try:
        with pa.memory_map(str(file)) as mapped:
            return pa.ipc.open_file(mapped).read_all()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{file}' is not a readable Arrow file ({reason}); pack the dataset anew.") from None


def _read_header(file: Path, table: pa.Table) -> dict[str, Any]:
    text = (table.schema.metadata or {}).get(_HEADER_KEY)
    if text is None:
        raise UserError(f"'{file}' was not written by lit_transfer; give a folder that `lit-transfer prepare` wrote.")
    header = json.loads(text)
    require(
        header.get("format") == FORMAT,
        f"'{file}' has format {header.get('format')}, this version reads {FORMAT}; pack the dataset anew.",
    )
    return {
        "task": header["task"],
        "labels": tuple(
            Label(name=label["name"], classes=tuple(label["classes"]), display=tuple(label["display"]))
            for label in header["labels"]
        ),
        "splits": header["splits"],
        "shards": tuple(Shard(**shard) for shard in header["shards"]),
        "digest": header["digest"],
        "pack": header["pack"],
    }
