"""A map-style dataset as a source: anything with `__len__` and `__getitem__`."""

from __future__ import annotations

import importlib
import math
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_transfer.data.packing.items import (
    Item,
    Listing,
    Pack,
    Source,
    check_splits,
    choose_labels,
    make_item,
)
from lit_transfer.errors import UserError, require


def open_dataset(spec: str, pack: Pack) -> Source:
    """The dataset that `module:callable` returns when called without arguments.

    A sample is `(image, label)` or a mapping with `image` and columns as in a CSV (and `source`, a unique
    name); an image is a PIL image, the bytes or path of a file, or uint8 `[H, W]` or `[H, W, 3]`. An
    attribute `classes` gives the order of classes, and integer labels count in it. Every sample is fetched
    twice: once for its columns, once for its picture.

    Raises:
        UserError: no such callable, or samples of another shape.
    """
    dataset = _call(spec)
    require(
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"),
        f"source '{spec}' returned a {type(dataset).__name__}, not a map-style dataset with a length.",
    )
    require(len(dataset) > 0, f"source '{spec}' is empty.")
    return Source(fingerprint=f"{len(dataset)} samples", listing=lambda: _list(dataset, spec, pack))


def _call(spec: str) -> Any:
    name, _, attribute = spec.partition(":")
    if str(Path.cwd()) not in sys.path:  # an installed command does not look into the current folder
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"source '{spec}' cannot be imported: {error}.") from None
    return function()


def _list(dataset: Any, spec: str, pack: Pack) -> Listing:
    lock = threading.Lock()  # a dataset need not be safe to use from several threads
    classes = tuple(str(name) for name in getattr(dataset, "classes", None) or ()) or None
    items: list[Item] = []
    labels: tuple[str, ...] = ()
    columns: list[str] = []
    seen: set[str] = set()
    for i in range(len(dataset)):
        where = f"sample {i} of '{spec}'"
        sample = _sample(dataset[i], where)
        if i == 0:
            columns = list(sample)
            labels = choose_labels(pack, columns, f"'{spec}'")
        require(list(sample) == columns, f"{where} has columns {list(sample)}, the first one {columns}.")
        row = {
            name: _text(value, f"{where}, column '{name}'", classes if name in labels else None)
            for name, value in sample.items()
            if name != "image"
        }
        source = row.get("source") or str(i)
        require(source not in seen, f"{where}: source '{source}' stands in another sample; make it unique.")
        seen.add(source)
        items.append(make_item(row, source, labels, _reader(dataset, i, lock, where), where))
    check_splits(items, f"'{spec}'")
    return Listing(items=items, labels=labels, classes=classes if len(labels) == 1 else None, ignored=0)


def _sample(sample: Any, where: str) -> Mapping[str, Any]:
    if isinstance(sample, Mapping):
        require("image" in sample, f"{where} has no 'image'; its columns are {', '.join(map(str, sample))}.")
        return sample
    require(
        isinstance(sample, tuple) and len(sample) == 2,
        f"{where} is a {type(sample).__name__}; give (image, label) or a mapping with 'image' and columns.",
    )
    return {"image": sample[0], "label": sample[1]}


def _reader(dataset: Any, i: int, lock: threading.Lock, where: str) -> Callable[[], bytes | Image.Image]:
    def read() -> bytes | Image.Image:
        with lock:
            image = _sample(dataset[i], where)["image"]
        if isinstance(image, bytes | Image.Image):
            return image
        if isinstance(image, str | Path):
            return Path(image).read_bytes()
        require(
            isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] in ((), (3,)),
            f"{where}: 'image' is {_describe(image)}; give a PIL image, bytes, a path or uint8 [H, W] or [H, W, 3].",
        )
        return Image.fromarray(image)

    return read


def _describe(value: Any) -> str:
    shape = f" {value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else ""
    return f"a {type(value).__name__}{shape}"


def _text(value: Any, where: str, classes: tuple[str, ...] | None) -> str | None:
    """A column's value as the text that a CSV cell would hold; None, NaN and blanks are missing."""
    if hasattr(value, "item") and getattr(value, "size", None) != 0 and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    require(
        isinstance(value, str | int | float),
        f"{where} is {_describe(value)}; give text or a number, and several labels as several columns.",
    )
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int) and classes is not None:
        require(
            0 <= value < len(classes),
            f"{where}: {value} is no index of the {len(classes)} classes; give None for a missing label.",
        )
        return classes[value]
    return str(value) if str(value).strip() else None
