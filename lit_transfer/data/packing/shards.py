"""WebDataset tar shards: written reproducibly, then read back, hashed and indexed."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from lit_transfer.data.packing.pictures import Picture
from lit_transfer.data.schema import Shard

# Everything that tar would else take from the clock or the account.
_FIXED = {"mtime": 0, "user": "lit_transfer", "group": "lit_transfer", "mode": 0o644, "encoder": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample as a shard stores it: its key, its picture and the small files beside it."""

    row: int
    key: str
    picture: Picture
    beside: dict[str, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a picture's bytes lie: shard number, offset and length in bytes, beside what is known of it."""

    row: int
    key: str
    shard: int
    offset: int
    size: int
    hash: bytes
    width: int
    height: int


def write_shards(
    folder: Path, split: str, samples: Iterator[Sample], shard_bytes: int, first: int
) -> Iterator[tuple[Shard, list[Place]]]:
    """Write `<split>-<number>.tar` files, each until it holds `shard_bytes`.

    Gives every finished shard with the places of its pictures; `first` is the dataset's number of the first.
    """
    number = 0
    while (sample := next(samples, None)) is not None:
        path = folder / f"{split}-{number:06d}.tar"
        held = _write_tar(path, sample, samples, shard_bytes)
        yield _index(path, split, held, first + number)
        number += 1


def _write_tar(path: Path, sample: Sample | None, more: Iterator[Sample], shard_bytes: int) -> list[Sample]:
    """Write samples until the shard is full; gives them back without their bytes."""
    held: list[Sample] = []
    written = 0
    with path.open("wb") as file:
        with TarWriter(file, **_FIXED) as tar:
            while sample is not None:
                written += tar.write(_members(sample))
                held.append(_without_bytes(sample))
                sample = next(more, None) if written < shard_bytes else None
        file.flush()
        os.fsync(file.fileno())
    return held


def _members(sample: Sample) -> dict[str, Any]:
    return {"__key__": sample.key, sample.picture.extension: sample.picture.data, **sample.beside}


def _without_bytes(sample: Sample) -> Sample:
    known = sample.picture
    bare = Picture(data=b"", extension=known.extension, hash=known.hash, width=known.width, height=known.height)
    return Sample(row=sample.row, key=sample.key, picture=bare, beside={})


def _index(path: Path, split: str, held: Sequence[Sample], number: int) -> tuple[Shard, list[Place]]:
    """Read a finished shard back: its hash, and the place of every picture, whose bytes are checked."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        for block in _blocks(file):
            sha.update(block)
    places: list[Place] = []
    with tarfile.open(path, "r:") as tar, path.open("rb") as raw:
        members = {member.name: member for member in tar}
        for sample in held:
            member = members[f"{sample.key}.{sample.picture.extension}"]
            raw.seek(member.offset_data)
            if hashlib.sha256(raw.read(member.size)).digest() != sample.picture.hash:
                raise OSError(f"'{path}' did not read back as it was written; the disk may be failing")
            places.append(
                Place(
                    row=sample.row,
                    key=sample.key,
                    shard=number,
                    offset=member.offset_data,
                    size=member.size,
                    hash=sample.picture.hash,
                    width=sample.picture.width,
                    height=sample.picture.height,
                )
            )
    shard = Shard(name=path.name, split=split, sha256=sha.hexdigest(), bytes=path.stat().st_size, samples=len(held))
    return shard, places


def _blocks(file: Any) -> Iterable[bytes]:
    while block := file.read(1 << 20):
        yield block


def to_json(value: Any) -> bytes:
    """JSON bytes that do not depend on the order in which keys were set."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
