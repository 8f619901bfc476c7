"""Labels of shards that others wrote: from members beside the pictures, or from a table by key."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lit_transfer.data.packing.items import Item, Listing, Pack, choose_labels, make_item
from lit_transfer.data.packing.labels import encode_labels
from lit_transfer.data.packing.scan import Texts, TextsOf
from lit_transfer.data.packing.sources import read_table
from lit_transfer.data.schema import LABEL_TYPES, SAMPLE_COLUMNS, Label
from lit_transfer.errors import require


@dataclass(frozen=True, kw_only=True)
class LabelSource:
    """Where labels come from.

    Args:
        names: label columns; none for task `none`.
        kind: extension of the members that hold them, or None.
        texts: the label texts of a key and the members of that kind.
        items: rows of a table by key, where there is one.
        told: the source, for people.
    """

    names: tuple[str, ...]
    kind: str | None
    texts: TextsOf
    items: Mapping[str, Item] = field(default_factory=dict)
    told: str

    def beside(self, keys: pa.ChunkedArray) -> dict[str, pa.Array]:
        """Group, weight and metadata of keys, where a table has them."""
        if not self.items:
            return {}
        empty = dataclasses.replace(next(iter(self.items.values())), group=None, weight=1.0)
        empty = dataclasses.replace(empty, meta=dict.fromkeys(empty.meta))
        rows = [self.items.get(key, empty) for key in keys.to_pylist()]
        columns = {name: [getattr(row, name) for row in rows] for name in ("group", "weight")}
        found = {name: pa.array(values, SAMPLE_COLUMNS[name]) for name, values in columns.items()}
        return found | {f"meta.{name}": pa.array([row.meta[name] for row in rows], pa.string()) for name in empty.meta}


def label_source(pack: Pack, member: str, table: str | None) -> LabelSource:
    """A table if there is one, else the named fields of `.json` members, else the text of `.cls` or `.txt` members."""
    if table is not None:
        return _from_table(Path(table), pack)
    if pack.task == "none":
        return LabelSource(names=(), kind=None, texts=lambda key, beside: (), told="task none")
    if pack.labels is not None:
        fields = [(name, name.split(".")) for name in pack.labels]
        require(len(set(pack.labels)) == len(fields), f"labels {pack.labels}: a field is named twice.")
        told = f"fields {', '.join(pack.labels)} of .json members"
        return LabelSource(
            names=tuple(pack.labels), kind="json", texts=lambda key, beside: _from_json(beside, fields), told=told
        )
    return LabelSource(
        names=("label",), kind=member, texts=lambda key, beside: (_text(beside.get(member)),), told=f".{member} members"
    )


def encode_texts(pack: Pack, labels: LabelSource, rows: pa.Table) -> tuple[str, list[Label], dict[str, pa.Array]]:
    """The task, the label columns, and their values as `label.<name>` in the order of the rows.

    Raises:
        UserError: a text that does not fit the task, labels asked for that no sample has, classes of one name.
    """
    columns = {name: rows[f"text.{name}"].combine_chunks() for name in labels.names}
    empty = [name for name, column in columns.items() if column.null_count == len(column)]
    asked = pack.labels is not None or labels.items or pack.task not in ("auto", "none")
    require(
        not (empty and asked),
        f"no sample has the label '{', '.join(empty)}' by {labels.told}; a key here is '{rows['key'][0]}'; name what "
        "holds the labels with --member, --labels or --table, or give --task none.",
    )
    if empty or not columns:
        return "none", [], {}
    require(
        pack.classes is None or len(columns) == 1,
        f"classes is given, but there are {len(columns)} label columns ({', '.join(columns)}); remove it.",
    )
    task, chosen, encoded = "", [], {}
    for name, column in columns.items():
        task, label, values = _encoded(pack, name, column, rows["member"])
        chosen.append(label)
        encoded[f"label.{name}"] = values
    return task, chosen, encoded


def _encoded(pack: Pack, name: str, texts: pa.Array, members: pa.ChunkedArray) -> tuple[str, Label, pa.Array]:
    """One label column; every text is looked at once, however many samples have it."""
    coded = texts.dictionary_encode()
    places = coded.indices.fill_null(-1).to_numpy()
    found, firsts = np.unique(places, return_index=True)
    sources = {int(place): members[int(first)].as_py() for place, first in zip(found, firsts, strict=True)}
    items = [
        Item(
            source=sources[i],
            labels=(_named(text, pack.classes),),
            split=None,
            group=None,
            weight=1.0,
            meta={},
            read=bytes,
        )
        for i, text in enumerate(coded.dictionary.to_pylist())
    ]
    task, labels, (values,) = encode_labels(pack, Listing(items=items, labels=(name,), classes=None, ignored=0))
    return task, labels[0], pa.array(values, LABEL_TYPES[task]).take(coded.indices)


def _named(text: str, classes: Sequence[str] | None) -> str:
    """A class by its place in `classes`, where it is given so, else the text itself."""
    if classes is None or text in classes or not re.fullmatch(r"[0-9]{1,9}", text) or int(text) >= len(classes):
        return text
    return classes[int(text)]


def _from_table(file: Path, pack: Pack) -> LabelSource:
    header, rows = read_table(file)
    require("key" in header, f"'{file}' has no column 'key'; its columns are {', '.join(header)}.")
    require("split" not in header, f"'{file}' has a column 'split', but a shard has one split; give --splits patterns.")
    columns = [name for name in header if name != "key"]
    names = choose_labels(pack, columns, f"'{file}'")
    items: dict[str, Item] = {}
    for line, row in rows:
        where = f"'{file}' line {line}"
        key = row.pop("key")
        require(bool(key), f"{where} has no key.")
        require(key not in items, f"{where}: key '{key}' stands in another line already; keep one of them.")
        items[key or ""] = make_item(row, key or "", names, bytes, where)
    require(bool(items), f"'{file}' has no rows.")

    def texts(key: str, _: Mapping[str, bytes]) -> Texts:
        return items[key].labels if key in items else (None,) * len(names)

    return LabelSource(names=names, kind=None, texts=texts, items=items, told=f"the keys of '{file}'")


def _from_json(beside: Mapping[str, bytes], fields: Sequence[tuple[str, Sequence[str]]]) -> Texts:
    if "json" not in beside:
        return (None,) * len(fields)
    try:
        held = json.loads(beside["json"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json member cannot be read: {error}") from None
    return tuple(_field(held, name, path) for name, path in fields)


def _field(held: Any, name: str, path: Sequence[str]) -> str | None:
    """A field's value as the text that a table's cell would hold."""
    value = held
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"field '{name}' of its .json member is a {type(value).__name__}, not text or a number")
    return str(int(value)) if isinstance(value, bool) else str(value)


def _text(data: bytes | None) -> str | None:
    try:
        return None if data is None else data.decode().strip() or None
    except UnicodeDecodeError:
        raise ValueError("its label is not UTF-8 text") from None
