"""What is packed: the settings, one sample, and the rules that all sources share."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from lit_transfer.errors import nearest, require

RESERVED = ("path", "image", "source", "split", "group", "weight")


@dataclass(frozen=True, kw_only=True)
class Pack:
    """What to pack, and how.

    Args:
        source: image folder (a folder a class, below train/ val/ test/ if there are such), CSV or TSV with a
            column `path`, or `module:callable` that returns a map-style dataset.
        out: folder of the dataset to write.
        task: `auto` is multiclass where there are labels and none elsewhere.
        labels: label columns; by default the column `label`.
        classes: class names in order; by default sorted, numbers by value.
        display_names: CSV with the columns class and display: how people read the names.
        splits: share per split, where the source gives no split.
        split_seed: of the splits and of the order inside the shards.
        stratify: further columns to balance across splits, beside the labels.
        image_format: `keep` stores plain 8-bit JPEG, PNG and WebP files as they are and all else as PNG; a
            file that already has the format asked for is stored as it is, too.
        quality: of JPEG and WebP that are written, 1 to 100.
        short_side: pictures with a longer short side are shrunk to it, in pixels.
        shard_bytes: a shard is closed once it holds this many bytes.
        max_rejected_fraction: share of pictures that may be undecodable.
        workers: threads that decode and encode; the result does not depend on them.
    """

    source: str
    out: str
    task: Literal["auto", "multiclass", "multilabel", "ordinal", "regression", "none"] = "auto"
    labels: list[str] | None = None
    classes: list[str] | None = None
    display_names: str | None = None
    splits: dict[str, float] = field(default_factory=lambda: {"train": 0.7, "val": 0.15, "test": 0.15})
    split_seed: int = 0
    stratify: list[str] = field(default_factory=list)
    image_format: Literal["keep", "jpg", "png", "webp"] = "keep"
    quality: int = 95
    short_side: int | None = None
    shard_bytes: int = 256 * 2**20
    max_rejected_fraction: float = 0.01
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        total = math.fsum(self.splits.values())
        require(bool(self.splits), "splits is empty; give a share per split, such as {train: 0.8, test: 0.2}.")
        require(abs(total - 1) < 1e-6, f"splits {self.splits} sum to {total:g}; the shares must sum to 1.")
        for name, share in self.splits.items():
            require_split_name(name, "splits")
            require(share > 0, f"splits.{name} {share} is not positive; leave the split out instead.")
        require(1 <= self.quality <= 100, f"quality {self.quality} is outside 1 to 100.")
        require(self.short_side is None or self.short_side >= 1, f"short_side {self.short_side} is under 1 pixel.")
        require(self.shard_bytes >= 1, f"shard_bytes {self.shard_bytes} is under 1.")
        require(self.workers >= 1, f"workers {self.workers} is under 1.")
        require(
            0 <= self.max_rejected_fraction <= 1,
            f"max_rejected_fraction {self.max_rejected_fraction} is outside [0, 1].",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One sample before it is packed.

    Args:
        source: its unique name: path or index.
        labels: text per label column; None is missing.
        split: None where the source gives no splits.
        group: samples of a group stay in one split.
        weight: of the sample in the loss.
        meta: further columns, as text.
        read: gives the picture or the bytes of its file; raises `OSError` where that cannot be.
    """

    source: str
    labels: tuple[str | None, ...]
    split: str | None
    group: str | None
    weight: float
    meta: dict[str, str | None]
    read: Callable[[], bytes | Image.Image]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All samples of a source, in a stable order.

    Args:
        items: the samples.
        labels: names of the label columns.
        classes: the source's own order of classes, if it has one.
        ignored: files that are no pictures.
    """

    items: list[Item]
    labels: tuple[str, ...]
    classes: tuple[str, ...] | None
    ignored: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source that was opened: a fingerprint that costs little, and the listing that may cost more."""

    fingerprint: str
    listing: Callable[[], Listing]


def choose_labels(pack: Pack, columns: Sequence[str], where: str) -> tuple[str, ...]:
    """The label columns: those asked for, else `label`; none for task `none` or without candidates."""
    if pack.labels is not None:
        for name in pack.labels:
            require(
                name in columns and name not in RESERVED,
                f"{where} has no label column '{name}'; its columns are {', '.join(columns)}."
                + nearest(name, [column for column in columns if column not in RESERVED]),
            )
        require(len(set(pack.labels)) == len(pack.labels), f"labels {pack.labels}: a column is named twice.")
        return tuple(pack.labels)
    if pack.task == "none":
        return ()
    if "label" in columns:
        return ("label",)
    candidates = [column for column in columns if column not in RESERVED]
    require(
        not candidates and pack.task == "auto",
        f"{where} has no column 'label'; name the label columns,"
        f" as in --labels '[{', '.join(candidates) or 'NAME'}]', or give --task none.",
    )
    return ()


def make_item(
    row: Mapping[str, str | None],
    source: str,
    labels: Sequence[str],
    read: Callable[[], bytes | Image.Image],
    where: str,
) -> Item:
    """An `Item` from a row of texts; `UserError` for a weight or split that breaks its rule."""
    split = row.get("split")
    if split is not None:
        require_split_name(split, where)
    return Item(
        source=utf8(source),
        labels=tuple(row[name] for name in labels),
        split=split,
        group=row.get("group"),
        weight=_weight(row.get("weight"), where),
        meta={name: value for name, value in row.items() if name not in RESERVED and name not in labels},
        read=read,
    )


def check_splits(items: Sequence[Item], where: str) -> None:
    """Either every sample has a split or none has."""
    lacking = [item.source for item in items if item.split is None]
    require(
        len(lacking) in (0, len(items)),
        f"{where}: {len(lacking)} of {len(items)} samples have no split, such as"
        f" '{lacking[0] if lacking else ''}'; fill the column or remove it.",
    )


def require_split_name(name: str, where: str) -> None:
    """Split names become file names."""
    require(
        bool(re.fullmatch(r"[A-Za-z0-9_]+", name)),
        f"{where}: split '{name}' must be letters, digits and _, such as train.",
    )


def _weight(text: str | None, where: str) -> float:
    try:
        weight = 1.0 if text is None else float(text)
    except ValueError:
        weight = math.nan
    require(math.isfinite(weight) and weight >= 0, f"{where}: weight '{text}' is not a number of 0 or more.")
    return weight


def utf8(name: str) -> str:
    require(
        not any("\ud800" <= letter <= "\udfff" for letter in name),
        f"the name {name.encode('utf-8', 'surrogateescape')!r} is not UTF-8; rename the file.",
    )
    return name
