"""The format of `manifest.arrow`: its columns, its header, and reading one back.

One Arrow IPC file beside the tar shards. The schema's metadata key `lit_transfer` holds the header as JSON; the table
has one row per sample, in the order of the shards. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lit_transfer.errors import UserError, require

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
HEADER_KEY = b"lit_transfer"


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
    """A tar file of the dataset.

    Args:
        name: relative to the manifest's folder, or a whole path or address.
        split: of all its samples.
        sha256: of its content, hex.
        bytes: its length.
        samples: rows of the table that lie in it.
    """

    name: str
    split: str
    sha256: str
    bytes: int
    samples: int


def read_file(source: Path | bytes, file: str) -> tuple[dict[str, Any], pa.Table]:
    """The header, with its labels and shards as objects, and the table, of which no row is read.

    Args:
        source: path, which is memory-mapped, or content.
        file: its name, for people.

    Raises:
        UserError: a foreign or damaged file, or one of another format.
    """
    table = _read_table(source, file)
    header = _read_header(file, table)
    _check_columns(file, header, table)
    held = sum(shard.samples for shard in header["shards"])
    require(
        held == table.num_rows,
        f"'{file}' has {table.num_rows} rows, but its shards hold {held} samples; pack the dataset anew.",
    )
    return header, table.replace_schema_metadata(None)


def _check_columns(file: str, header: dict[str, Any], table: pa.Table) -> None:
    labels = {f"label.{label.name}": LABEL_TYPES[header["task"]] for label in header["labels"]}
    expected = SAMPLE_COLUMNS | labels
    found = {field.name: field.type for field in table.schema}
    for name, kind in expected.items():
        require(
            found.get(name) == kind,
            f"'{file}': column '{name}' "
            + (f"is {found[name]}, not {kind}" if name in found else "is missing")
            + "; pack the dataset anew.",
        )
    extra = [name for name in found if name not in expected and not name.startswith("meta.")]
    require(not extra, f"'{file}': unknown column {', '.join(extra)}; pack the dataset anew.")


def _read_table(source: Path | bytes, file: str) -> pa.Table:
    try:
        with pa.memory_map(str(source)) if isinstance(source, Path) else pa.BufferReader(source) as opened:
            return pa.ipc.open_file(opened).read_all()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{file}' is not a readable Arrow file ({reason}); pack the dataset anew.") from None


def _read_header(file: str, table: pa.Table) -> dict[str, Any]:
    text = (table.schema.metadata or {}).get(HEADER_KEY)
    if text is None:
        raise UserError(f"'{file}' was not written by lit_transfer; give a folder that `lit-transfer prepare` wrote.")
    try:
        header = json.loads(text)
        require(
            header.get("format") == FORMAT,
            f"'{file}' has format {header.get('format')}, this version reads {FORMAT}; pack the dataset anew.",
        )
        return _parsed(header)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{file}' has a damaged header ({error!r}); copy the dataset again.") from None


def _parsed(header: dict[str, Any]) -> dict[str, Any]:
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
