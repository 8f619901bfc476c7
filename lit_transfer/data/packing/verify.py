"""Every byte of a dataset held to its manifest: shards, members, pictures, counts, digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from lit_transfer.data import reach
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.index import INDEXED
from lit_transfer.data.packing.pictures import ordered
from lit_transfer.data.packing.record import compute_digest
from lit_transfer.data.packing.scan import ascii_name
from lit_transfer.data.packing.tars import Forward, TarDamage, members, split_name, ticker
from lit_transfer.data.schema import FILE_NAME
from lit_transfer.errors import UserError, require

MOST_FAULTS = 10
"""Members of a shard that are named; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """What to check.

    Args:
        verify: folder or address of a dataset.
        workers: threads that read shards.
    """

    verify: str
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"workers {self.workers} is under 1.")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a shard, or the manifest, and with which member of it."""

    shard: str
    member: str
    wrong: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What a check found.

    Args:
        manifest: of the dataset.
        faults: what is wrong; none if all is well.
        bytes: that were read.
    """

    manifest: Manifest
    faults: list[Fault]
    bytes: int


@dataclass(frozen=True)
class _Row:
    """A sample as the manifest has it."""

    key: str
    offset: int
    size: int
    hash: bytes


def verify(settings: Verify, progress: bool = False) -> Verified:
    """Read a dataset again and compare all of it with its manifest.

    Raises:
        UserError: there is no manifest that can be read.
    """
    manifest = Manifest.read(settings.verify)
    total = sum(shard.bytes for shard in manifest.shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=not progress) as bar:
        check = _checker(manifest, ticker(bar))
        found = list(ordered(check, range(len(manifest.shards)), settings.workers))
    of_content = {shard.sha256: shard.name for shard in manifest.shards}
    faults = [*_manifest_faults(manifest), *_extra_shards(manifest)]
    for shard, (wrong, sha256, _) in zip(manifest.shards, found, strict=True):
        swapped = of_content.get(sha256)
        if wrong and swapped is not None and swapped != shard.name:
            wrong = [Fault(shard.name, "", f"holds what '{swapped}' should hold; give the files their own names")]
        faults += wrong
    return Verified(manifest=manifest, faults=faults, bytes=sum(length for _, _, length in found))


def _manifest_faults(manifest: Manifest) -> Iterator[Fault]:
    """What the manifest says of itself that is not so."""
    table, shards = manifest.table, manifest.shards
    digest = compute_digest(table, manifest.task, manifest.labels, shards)
    if digest != manifest.digest:
        yield Fault(FILE_NAME, "", f"its digest is {manifest.digest[:12]}, that of its rows {digest[:12]}")
    numbers = np.repeat(np.arange(len(shards)), [shard.samples for shard in shards])
    if not np.array_equal(table["shard"].to_numpy(), numbers):
        yield Fault(FILE_NAME, "", "its rows do not stand in the order of the shards, or not as many in each")
    splits: dict[str, int] = {}
    for shard in shards:
        splits[shard.split] = splits.get(shard.split, 0) + shard.samples
    counted = {pair["values"]: pair["counts"] for pair in pc.value_counts(table["split"]).to_pylist()}
    if splits != manifest.splits or {split: count for split, count in splits.items() if count} != counted:
        yield Fault(FILE_NAME, "", f"splits are {manifest.splits}, those of its rows {counted}")


def _extra_shards(manifest: Manifest) -> Iterator[Fault]:
    """Shards beside those that were packed; a folder of others' shards may hold more."""
    place = manifest.places[0]
    if INDEXED in manifest.pack or place.startswith(("http:", "https:")):  # a web server lists nothing
        return
    known = {manifest.shard_address(i) for i in range(len(manifest.shards))}
    for address in reach.list_files(place, ".tar"):
        if address not in known:
            yield Fault(address.rpartition("/")[2], "", "is not in the manifest")


def _checker(manifest: Manifest, tick: Callable[[int], None]) -> Callable[[int], tuple[list[Fault], str, int]]:
    """A check of one shard: what is wrong, its sha256 (empty if it could not be read), and the bytes that were read."""
    ends = np.cumsum([0, *(shard.samples for shard in manifest.shards)])

    def check(index: int) -> tuple[list[Fault], str, int]:
        shard, address = manifest.shards[index], manifest.shard_address(index)
        part = manifest.table.slice(ends[index], shard.samples).select(["key", "offset", "size", "hash"])
        rows = [_Row(**row) for row in part.to_pylist()]
        try:
            file = Forward(address, tick)
            wrong = [Fault(shard.name, member, why) for member, why in _member_faults(file, rows)]
            file.finish()
        except UserError as error:
            return [Fault(shard.name, "", str(error))], "", 0
        if len(wrong) > MOST_FAULTS:
            wrong[MOST_FAULTS:] = [Fault(shard.name, "", f"and {len(wrong) - MOST_FAULTS} more like these")]
        sha256 = file.sha256.hexdigest()
        if file.place != shard.bytes:
            wrong.insert(0, Fault(shard.name, "", f"has {file.place} bytes, not {shard.bytes}"))
        elif sha256 != shard.sha256:
            wrong.insert(0, Fault(shard.name, "", f"its sha256 is {sha256[:12]}, not {shard.sha256[:12]}"))
        return wrong, sha256, file.place

    return check


def _member_faults(file: Forward, rows: list[_Row]) -> Iterator[tuple[str, str]]:
    """(member, fault): of the tar's headers, then of the pictures whose headers were not reached."""
    expected = {row.offset: row for row in rows}
    try:
        for member in members(file):
            row = expected.pop(member.offset_data, None)
            if row is None:
                continue
            name = ascii_name(member.name)
            if (split_name(member.name) or ("",))[0] != row.key:
                yield name, f"its key is not '{row.key}', which the manifest has at byte {row.offset}"
            if member.size != row.size:
                yield name, f"has {member.size} bytes, not {row.size}"
            else:
                yield from _picture_faults(file, row, name)
    except TarDamage as damage:
        yield "", str(damage)
    for row in sorted(expected.values(), key=lambda row: row.offset):
        if row.offset < file.place:
            yield row.key, f"no member begins at byte {row.offset}"
        else:
            file.seek(row.offset)
            yield from _picture_faults(file, row, row.key)


def _picture_faults(file: Forward, row: _Row, name: str) -> Iterator[tuple[str, str]]:
    data = file.read(row.size)
    if len(data) < row.size:
        yield name, f"is cut off: {len(data)} of {row.size} bytes from byte {row.offset} are there"
    elif hashlib.sha256(data).digest() != row.hash:
        yield name, f"the {row.size} bytes at {row.offset} are not those that were recorded"
