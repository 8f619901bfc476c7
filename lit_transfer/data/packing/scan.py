"""One shard of any origin: its samples, what is wrong with the rest, and its hash, in one pass."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from lit_transfer.data.decode import EXTENSIONS
from lit_transfer.data.packing.pictures import header_sides
from lit_transfer.data.packing.tars import Forward, TarDamage, members, split_name
from lit_transfer.data.schema import SAMPLE_COLUMNS

Texts = tuple[str | None, ...]
TextsOf = Callable[[str, Mapping[str, bytes]], Texts]
"""The label texts of a key, given the members that were read beside its picture; `ValueError` is why there are none."""

_PLACE = ("key", "offset", "size", "hash", "width", "height")
_SCATTERED = (
    "its key stands in the shard again, behind members of another key; "
    "webdataset makes several samples of it: write the members of a sample one after another, under a key of its own"
)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a shard holds.

    Args:
        rows: a row per sound sample: `key`, `offset`, `size`, `hash`, `width`, `height`, `member` and `text.<label>`.
        rejected: (member, reason) of what is no sound sample.
        damage: what is wrong with the tar itself, or None.
        sha256: of the whole, hex.
        bytes: length of the whole.
    """

    rows: pa.Table
    rejected: list[tuple[str, str]]
    damage: str | None
    sha256: str
    bytes: int


@dataclass(kw_only=True)
class _Sample:
    """The members of one key that stand together."""

    key: str
    pictures: list[tuple[tarfile.TarInfo, bytes]] = field(default_factory=list)
    beside: dict[str, bytes] = field(default_factory=dict)
    first: str = ""
    doubled: str = ""


def scan(address: str, labels: Sequence[str], kind: str | None, texts_of: TextsOf, tick: Callable[[int], None]) -> Scan:
    """Read a shard once; pictures are hashed, and decoded no further than their headers.

    Args:
        address: of the shard.
        labels: label columns.
        kind: extension of the members beside pictures that `texts_of` reads; None for none.
        texts_of: gives the label texts, one for each column.
        tick: is told how many bytes arrived.

    Raises:
        UserError: the address cannot be read.
    """
    file = Forward(address, tick)
    rejected: list[tuple[str, str]] = []
    outcomes: list[tuple[str, str, list[object] | str]] = []
    damage = None
    try:
        for sample in _samples(file, kind, rejected):
            outcomes.append((sample.key, sample.first, _row(sample, texts_of)))
    except TarDamage as reason:
        damage = str(reason)
    file.finish()
    times = Counter(key for key, _, _ in outcomes)
    rows = []
    for key, member, outcome in outcomes:
        if isinstance(outcome, str) or times[key] > 1:
            rejected.append((member, _SCATTERED if times[key] > 1 else str(outcome)))
        else:
            rows.append(outcome)
    types = {name: SAMPLE_COLUMNS[name] for name in _PLACE} | {"member": pa.string()}
    types |= {f"text.{name}": pa.string() for name in labels}
    columns = list(zip(*rows, strict=True)) or [()] * len(types)
    table = pa.table([pa.array(values, of) for values, of in zip(columns, types.values(), strict=True)], list(types))
    return Scan(rows=table, rejected=rejected, damage=damage, sha256=file.sha256.hexdigest(), bytes=file.place)


def _samples(file: Forward, kind: str | None, rejected: list[tuple[str, str]]) -> Iterator[_Sample]:
    """Members that follow one another under one key, as samples."""
    sample: _Sample | None = None
    for member in members(file):
        if member.isdir() or re.match(r"__[^/]*__($|/)", member.name):  # webdataset's own metadata
            continue
        if is_of_macos(member.name):
            continue
        parts = split_name(member.name)
        if parts is None or not member.isreg() or member.issparse() or not _is_utf8(member.name):
            rejected.append((ascii_name(member.name), _why_not(member)))
            continue
        key, extension = parts
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key=key, first=member.name)
        _add(sample, member, extension.rpartition(".")[2].lower(), file, kind)
    if sample is not None:
        yield sample


def _add(sample: _Sample, member: tarfile.TarInfo, last: str, file: Forward, kind: str | None) -> None:
    if f".{last}" not in EXTENSIONS and last != kind:
        return
    data = file.read(member.size)
    if f".{last}" in EXTENSIONS:
        sample.pictures.append((member, data))
    elif last in sample.beside:
        sample.doubled = member.name
    else:
        sample.beside[last] = data


def _row(sample: _Sample, texts_of: TextsOf) -> list[object] | str:
    """The sample's row, or the reason why it has none."""
    if len(sample.pictures) != 1:
        return _wrong_count(sample)
    if sample.doubled:
        return f"the label stands twice: in '{sample.doubled}' again"
    member, data = sample.pictures[0]
    sides = header_sides(data)
    if isinstance(sides, str):
        return sides
    try:
        texts = texts_of(sample.key, sample.beside)
    except ValueError as error:
        return " ".join(str(error).split())
    place = [member.offset_data, member.size, hashlib.sha256(data).digest()]
    return [sample.key, *place, *sides, member.name, *texts]


def _wrong_count(sample: _Sample) -> str:
    names = [member.name for member, _ in sample.pictures]
    if not names:
        return f"key '{sample.key}' has no picture"
    told = ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
    if len(set(names)) < len(names):
        return f"key '{sample.key}' has {len(names)} pictures ({told}), some of one name"
    dotted = any("." in (split_name(name) or ("", ""))[1] for name in names)
    why = "; they merge because a key ends at the first dot of the name" if dotted else ""
    return f"key '{sample.key}' has {len(names)} pictures ({told}){why}"


def _why_not(member: tarfile.TarInfo) -> str:
    if not _is_utf8(member.name):
        return "its name is not UTF-8"
    if not member.isreg() or member.issparse():
        return "it is a link, a device or a sparse file, not a plain one"
    return "its name has no key before a dot; webdataset passes over it"


def is_of_macos(name: str) -> bool:
    """Whether macOS made a file or member beside those of its user: resource forks, folder views."""
    *folders, file = name.split("/")
    return file.startswith("._") or file == ".DS_Store" or "__MACOSX" in folders


def ascii_name(name: str) -> str:
    """A member's name as it can be printed and stored."""
    return name if _is_utf8(name) else name.encode("utf-8", "surrogateescape").decode("ascii", "backslashreplace")


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)
