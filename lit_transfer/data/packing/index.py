"""A manifest for shards that others wrote: streamed once, never unpacked to disk, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from lit_transfer.data import reach
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.addresses import expand
from lit_transfer.data.packing.foreign import LabelSource, encode_texts, label_source
from lit_transfer.data.packing.items import Pack, require_split_name
from lit_transfer.data.packing.pack import REJECTED, Packed, reuse
from lit_transfer.data.packing.pictures import ordered
from lit_transfer.data.packing.record import write_manifest, write_rejected
from lit_transfer.data.packing.scan import Scan, scan
from lit_transfer.data.packing.tars import ticker
from lit_transfer.data.schema import FILE_NAME, SAMPLE_COLUMNS, Shard
from lit_transfer.errors import UserError, require
from lit_transfer.reading import to_plain

INDEXED = "index"
"""Key of `Manifest.pack` that marks shards of others: their folder may hold more than the dataset."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Shards that others wrote, and what is to be learned of them.

    Args:
        index: shards: paths or addresses, with {000..012} and * expanded (* stops at a /, the folder ** does not); a
            folder, or an s3:// or gs:// prefix that ends in /, stands for all .tar files below it.
        out: folder of the manifest; by default the folder of the shards.
        task: `auto` is multiclass where there are labels and none elsewhere.
        member: the member beside a picture that holds its label, where neither `labels` nor `table` is given.
        labels: fields of the .json members to learn, `a.b` inside `a`; with `table` its columns.
        table: CSV or TSV with a column `key` and label columns; group, weight and further columns are kept as in
            `prepare --source`. A key is a member's name up to the first dot of its file name.
        classes: class names in order; by default sorted, numbers by value. Whole numbers in .cls members count in it.
        display_names: CSV with the columns class and display: how people read the names.
        splits: the shards of each split, as a pattern of their names, such as {train: "train-*", val: "val/*"}.
        max_rejected_fraction: share of samples that may be rejected.
        workers: threads that read shards; the result does not depend on them.
    """

    index: list[str]
    out: str | None = None
    task: Literal["auto", "multiclass", "multilabel", "ordinal", "regression", "none"] = "auto"
    member: Literal["cls", "txt"] = "cls"
    labels: list[str] | None = None
    table: str | None = None
    classes: list[str] | None = None
    display_names: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {"train": "*"})
    max_rejected_fraction: float = 0.01
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        require(bool(self.index), "index is empty; name shards, as in --index 'data/{000..012}.tar'.")
        require(bool(self.splits), "splits is empty; give a pattern per split, such as {train: 'train-*'}.")
        for name in self.splits:
            require_split_name(name, "splits")
        require(
            0 <= self.max_rejected_fraction <= 1,
            f"max_rejected_fraction {self.max_rejected_fraction} is outside [0, 1].",
        )
        require(self.workers >= 1, f"workers {self.workers} is under 1.")

    def as_pack(self) -> Pack:
        """The settings on task and labels, which shards and pictures share."""
        return Pack(
            source=", ".join(map(reach.shown, self.index)),
            out="",
            task=self.task,
            labels=self.labels,
            classes=self.classes,
            display_names=self.display_names,
        )


def index(settings: Index, progress: bool = False) -> Packed:
    """Write the manifest of shards, or find it there, made of the same shards with the same settings.

    Raises:
        UserError: no shards, a damaged one, too many faulty samples (`rejected.csv` lists them), labels that break a
            rule, or another dataset where the manifest belongs.
    """
    addresses = expand(settings.index)
    out = _out(settings, addresses)
    names = [_name(address, out) for address in addresses]
    splits = [_split(name, settings.splits) for name in names]
    labels = label_source(settings.as_pack(), settings.member, settings.table)
    sizes = list(ordered(reach.size, addresses, settings.workers))
    recorded = _recorded(settings, names, sizes)
    if (out / FILE_NAME).exists():
        packed = reuse(out, recorded)
        _refuse_changed(packed.manifest, list(ordered(_sha256, addresses, settings.workers)))
        return packed
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="indexing", disable=not progress) as bar:
        tick = ticker(bar)
        scans = list(
            ordered(lambda at: scan(at, labels.names, labels.kind, labels.texts, tick), addresses, settings.workers)
        )
    _refuse_damage(names, scans)
    rows, rejected = _rows(names, scans)
    out.mkdir(parents=True, exist_ok=True)
    write_rejected(out / REJECTED, ("shard", "member", "reason"), rejected)
    _refuse_rejected(settings, out, rows.num_rows, rejected)
    shards = _shards(names, splits, scans, rows)
    task, chosen, columns = encode_texts(settings.as_pack(), labels, rows)
    write_manifest(
        out,
        task=task,
        labels=chosen,
        shards=shards,
        table=_table(rows, splits, names, labels, columns),
        pack={**recorded, "rejected": len(rejected), "ignored": 0},
    )
    return Packed(manifest=Manifest.open(out))


def _out(settings: Index, addresses: Sequence[str]) -> Path:
    if settings.out is not None:
        return Path(settings.out)
    remote = next((address for address in addresses if reach.is_remote(address)), None)
    require(remote is None, f"shards such as '{remote}' lie elsewhere; say with --out where the manifest goes.")
    return Path(os.path.commonpath([Path(address).resolve().parent for address in addresses]))


def _name(address: str, out: Path) -> str:
    """A shard as the manifest names it: relative to its folder if it lies there."""
    if reach.is_remote(address):
        return address
    path, folder = Path(address).resolve(), out.resolve()
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
    reach.check(name)
    return name


def _split(name: str, patterns: dict[str, str]) -> str:
    """The one split whose pattern fits the end of the name, part by part."""
    parts = name.split("/")
    fitting = [
        split for split, pattern in patterns.items() if fnmatchcase("/".join(parts[-1 - pattern.count("/") :]), pattern)
    ]
    require(
        len(fitting) == 1,
        f"shard '{name}' fits the patterns of {len(fitting)} splits ({', '.join(fitting) or 'none'}); "
        "give --splits so that it fits one.",
    )
    return fitting[0]


def _recorded(settings: Index, names: Sequence[str], sizes: Sequence[int]) -> dict[str, Any]:
    """The settings that shape the dataset, and a fingerprint of the shards and files they name."""
    plain = {name: value for name, value in to_plain(settings).items() if name not in ("index", "out", "workers")}
    for name in ("table", "display_names"):
        if plain[name] is not None:
            require(Path(plain[name]).is_file(), f"{name} '{plain[name]}' does not exist.")
            plain[name] = hashlib.sha256(Path(plain[name]).read_bytes()).hexdigest()
    shards = json.dumps(list(zip(names, sizes, strict=True))).encode()
    return {INDEXED: len(names), **plain, "fingerprint": hashlib.sha256(shards).hexdigest()}


def _sha256(address: str) -> str:
    sha = hashlib.sha256()
    for piece in reach.stream(address):
        sha.update(piece)
    return sha.hexdigest()


def _refuse_changed(manifest: Manifest, found: Sequence[str]) -> None:
    """Names and lengths can stay where labels were changed: tars are padded."""
    changed = [shard.name for shard, sha256 in zip(manifest.shards, found, strict=True) if shard.sha256 != sha256]
    require(
        not changed,
        f"{manifest.name} was made of other shards: {', '.join(changed[:5])} changed since; remove its {FILE_NAME} to "
        "index them again.",
    )


def _refuse_damage(names: Sequence[str], scans: Sequence[Scan]) -> None:
    damaged = [f"'{name}' is {found.damage}" for name, found in zip(names, scans, strict=True) if found.damage]
    require(
        not damaged,
        f"{len(damaged)} of {len(names)} shards are damaged: {'; '.join(damaged[:5])}"
        f"{'; ...' if len(damaged) > 5 else ''}; copy them again, or leave them out.",
    )


def _rows(names: Sequence[str], scans: Sequence[Scan]) -> tuple[pa.Table, list[tuple[str, str, str]]]:
    """The samples of all shards in their order, and (shard, member, reason) of those that are none."""
    rejected = [(name, *fault) for name, found in zip(names, scans, strict=True) for fault in found.rejected]
    numbered = [
        found.rows.append_column("shard", pa.array(np.full(found.rows.num_rows, number, np.int32)))
        for number, found in enumerate(scans)
    ]
    rows = pa.concat_tables(numbered).combine_chunks()
    counted = rows["key"].value_counts()
    doubled = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
    if len(doubled) == 0:
        return rows, rejected
    is_doubled = pc.is_in(rows["key"], doubled)
    for row in rows.filter(is_doubled).select(["shard", "member", "key"]).to_pylist():
        reason = f"key '{row['key']}' stands in several shards; rename it, or index the shards apart as two datasets"
        rejected.append((names[row["shard"]], row["member"], reason))
    return rows.filter(pc.invert(is_doubled)), rejected


def _refuse_rejected(settings: Index, out: Path, samples: int, rejected: Sequence[tuple[str, str, str]]) -> None:
    share = len(rejected) / max(1, samples + len(rejected))
    if share > settings.max_rejected_fraction or samples == 0:
        told = "; ".join(f"{shard}: {member}: {reason}" for shard, member, reason in rejected[:3])
        raise UserError(
            f"{len(rejected)} of {samples + len(rejected)} samples ({share:.1%}) were rejected, above "
            f"max_rejected_fraction {settings.max_rejected_fraction:g}; mend what '{out / REJECTED}' lists, or allow "
            f"more. The first: {told or 'there are no samples'}."
        )


def _shards(names: Sequence[str], splits: Sequence[str], scans: Sequence[Scan], rows: pa.Table) -> list[Shard]:
    samples = np.bincount(rows["shard"].to_numpy(), minlength=len(names)).tolist()
    return [
        Shard(name=name, split=split, sha256=found.sha256, bytes=found.bytes, samples=count)
        for name, split, found, count in zip(names, splits, scans, samples, strict=True)
    ]


def _table(
    rows: pa.Table, splits: Sequence[str], names: Sequence[str], labels: LabelSource, columns: dict[str, pa.Array]
) -> pa.Table:
    """The manifest's rows."""
    count = rows.num_rows
    made = {
        "split": pa.array(splits, pa.string()).take(rows["shard"]),
        "source": pc.binary_join_element_wise(pa.array(names, pa.string()).take(rows["shard"]), rows["member"], "/"),
        "group": pa.nulls(count, pa.string()),
        "weight": pa.array(np.ones(count, np.float32)),
    }
    made |= labels.beside(rows["key"]) | columns
    known = {name: made.get(name, rows[name] if name in rows.column_names else None) for name in SAMPLE_COLUMNS}
    return pa.table(known | {name: column for name, column in made.items() if name not in known})
