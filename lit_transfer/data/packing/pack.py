"""From pictures to a dataset: WebDataset shards and a manifest, written beside and renamed when whole."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.datasets import open_dataset
from lit_transfer.data.packing.items import Item, Listing, Pack, Source
from lit_transfer.data.packing.labels import Value, encode_labels, strata
from lit_transfer.data.packing.pictures import ordered, to_picture
from lit_transfer.data.packing.record import write_manifest, write_rejected
from lit_transfer.data.packing.shards import Place, Sample, to_json, write_shards
from lit_transfer.data.packing.sources import open_folder, open_table
from lit_transfer.data.packing.splits import assign_splits, seeded_hash
from lit_transfer.data.packing.whole import whole_folder
from lit_transfer.data.schema import CLASS_TASKS, FILE_NAME, LABEL_TYPES, SAMPLE_COLUMNS, Label, Shard
from lit_transfer.errors import UserError, nearest, require
from lit_transfer.reading import to_plain

REJECTED = "rejected.csv"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What `pack` did: the dataset, and whether it was there already."""

    manifest: Manifest
    reused: bool = False

    @property
    def rejected(self) -> int:
        """Pictures that could not be decoded; `rejected.csv` lists them."""
        return int(self.manifest.pack["rejected"])

    @property
    def ignored(self) -> int:
        """Files of the source that are no pictures."""
        return int(self.manifest.pack["ignored"])


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that is known before the first picture is decoded."""

    listing: Listing
    task: str
    labels: list[Label]
    values: list[list[Value]]
    splits: list[str]


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What the shards hold."""

    shards: list[Shard] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)


def pack(settings: Pack, progress: bool = False) -> Packed:
    """Pack a source into `settings.out`, or find it packed there with the same settings.

    The folder appears whole or not at all. The same source and settings give the same bytes, at any number of
    workers and any place of the source and of `out`.

    Raises:
        UserError: a fault of the source, too many undecodable pictures, a full disk, other things at `out`.
    """
    source = _open(settings)
    out = Path(settings.out)
    require(out.name not in ("", ".."), f"out '{out}' is not a folder that can be made; give its name.")
    recorded = _recorded(settings, source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return reuse(out, recorded)
    plan = _plan(settings, source.listing())
    with whole_folder(out) as folder:
        written = _write(folder, settings, plan, progress)
        write_manifest(
            folder,
            task=plan.task,
            labels=plan.labels,
            shards=written.shards,
            table=_table(plan, written.places),
            pack={**recorded, "rejected": len(written.rejected), "ignored": plan.listing.ignored},
        )
    return Packed(manifest=Manifest.open(out))


def _open(settings: Pack) -> Source:
    path = Path(settings.source)
    if path.is_dir():
        return open_folder(path, settings)
    if path.is_file():
        return open_table(path, settings)
    require(
        bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", settings.source)),
        f"source '{settings.source}' does not exist; give an image folder, a CSV or TSV, or module:callable.",
    )
    return open_dataset(settings.source, settings)


def _recorded(settings: Pack, source: Source) -> dict[str, Any]:
    """The settings that shape the dataset. Where it lies and how many threads pack it do not."""
    plain = {name: value for name, value in to_plain(settings).items() if name not in ("out", "workers")}
    plain["source"] = Path(settings.source).resolve().name if Path(settings.source).exists() else settings.source
    if settings.display_names is not None:
        names = Path(settings.display_names)
        require(names.is_file(), f"display_names '{names}' does not exist.")
        plain["display_names"] = hashlib.sha256(names.read_bytes()).hexdigest()
    return {**plain, "fingerprint": source.fingerprint}


def reuse(out: Path, recorded: dict[str, Any]) -> Packed:
    """The dataset at `out`, if it was packed from the same source with the same settings."""
    require(
        (out / FILE_NAME).is_file(),
        f"out '{out}' exists and holds no dataset; remove it or choose another --out.",
    )
    manifest = Manifest.open(out)
    differing = [name for name, value in recorded.items() if manifest.pack.get(name) != value]
    changes = "; ".join(
        "the source has changed"
        if name == "fingerprint"
        else f"{name} was {manifest.pack.get(name)!r}, now {recorded[name]!r}"
        for name in differing
    )
    require(not differing, f"out '{out}' was packed otherwise ({changes}); remove it or choose another --out.")
    return Packed(manifest=manifest, reused=True)


def _plan(settings: Pack, listing: Listing) -> _Plan:
    task, labels, values = encode_labels(settings, listing)
    items = listing.items
    if items[0].split is not None:
        splits = [item.split or "" for item in items]
    else:
        further = [_column(items, name) for name in settings.stratify]
        tags = strata(task, values, further, len(items))
        splits = assign_splits(
            [item.source for item in items],
            tags,
            [item.group for item in items],
            settings.splits,
            settings.split_seed,
        )
        empty = sorted(set(settings.splits) - set(splits))
        require(
            not empty,
            f"split '{', '.join(empty)}' gets none of the {len(items)} samples; give it a larger share,"
            " leave it out, or use smaller groups.",
        )
    return _Plan(listing=listing, task=task, labels=labels, values=values, splits=splits)


def _column(items: Sequence[Item], name: str) -> list[str | None]:
    names = list(items[0].meta)
    require(
        name in names,
        f"stratify: there is no column '{name}' beside the labels; there are: {', '.join(names) or 'none'}."
        + nearest(name, names),
    )
    return [item.meta[name] for item in items]


def _write(folder: Path, settings: Pack, plan: _Plan, progress: bool) -> _Written:
    """Write all shards and `rejected.csv`; `UserError` if too many pictures were rejected."""
    written = _Written()
    with tqdm(total=len(plan.splits), unit=" pictures", desc="packing", disable=not progress) as bar:
        for split in sorted(set(plan.splits), key=_split_order):
            with closing(_samples(split, settings, plan, written.rejected, bar)) as samples:
                for shard, places in write_shards(folder, split, samples, settings.shard_bytes, len(written.shards)):
                    written.shards.append(shard)
                    written.places.extend(places)
    written.rejected.sort()
    write_rejected(folder / REJECTED, ("source", "reason"), written.rejected)
    share = len(written.rejected) / len(plan.splits)
    if share > settings.max_rejected_fraction or not written.places:
        kept = Path(f"{settings.out}.{REJECTED}")
        shutil.copyfile(folder / REJECTED, kept)
        reasons = "; ".join(f"{source}: {reason}" for source, reason in written.rejected[:3])
        raise UserError(
            f"{len(written.rejected)} of {len(plan.splits)} pictures ({share:.1%}) were rejected, above"
            f" max_rejected_fraction {settings.max_rejected_fraction:g}; mend or remove what '{kept}' lists,"
            f" or allow more. The first: {reasons}."
        )
    return written


def _split_order(split: str) -> tuple[int, str]:
    usual = ("train", "val", "test")
    return usual.index(split) if split in usual else len(usual), split


def _samples(
    split: str, settings: Pack, plan: _Plan, rejected: list[tuple[str, str]], bar: tqdm[Any]
) -> Generator[Sample]:
    """The samples of a split in a seeded order, so that every stretch of a shard holds a mix of classes."""
    items = plan.listing.items
    rows = [row for row, name in enumerate(plan.splits) if name == split]
    rows.sort(key=lambda row: seeded_hash(settings.split_seed, f"order\0{items[row].source}"))
    pictures = ordered(lambda row: to_picture(items[row], settings), rows, settings.workers)
    for row, picture in zip(rows, pictures, strict=True):
        bar.update()
        if isinstance(picture, str):
            rejected.append((items[row].source, picture))
        else:
            yield Sample(row=row, key=f"{row:08d}", picture=picture, beside=_beside(plan, row))


def _beside(plan: _Plan, row: int) -> dict[str, bytes]:
    """What stands beside the picture: all columns as JSON, and a single class's index as `cls`."""
    item = plan.listing.items[row]
    values = [column[row] for column in plan.values]
    named = {
        label.name: label.classes[value] if label.classes and isinstance(value, int) else value
        for label, value in zip(plan.labels, values, strict=True)
    }
    columns = {
        "source": item.source,
        "labels": named,
        "split": plan.splits[row],
        "group": item.group,
        "weight": item.weight,
        "meta": item.meta,
    }
    beside = {"json": to_json(columns)}
    if plan.task in CLASS_TASKS and len(values) == 1 and values[0] is not None:
        beside["cls"] = str(values[0]).encode()
    return beside


def _table(plan: _Plan, places: Sequence[Place]) -> pa.Table:
    """The manifest's rows, in the order of the shards."""
    items = [plan.listing.items[place.row] for place in places]
    columns: dict[str, pa.Array] = {}
    for name, kind in SAMPLE_COLUMNS.items():
        if name == "split":
            values: list[Any] = [plan.splits[place.row] for place in places]
        elif name in ("group", "weight", "source"):
            values = [getattr(item, name) for item in items]
        else:
            values = [getattr(place, name) for place in places]
        columns[name] = pa.array(values, kind)
    for label, column in zip(plan.labels, plan.values, strict=True):
        columns[f"label.{label.name}"] = pa.array([column[place.row] for place in places], LABEL_TYPES[plan.task])
    for name in plan.listing.items[0].meta:
        columns[f"meta.{name}"] = pa.array([item.meta[name] for item in items], pa.string())
    return pa.table(columns)
