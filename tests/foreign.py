"""Shards as others write them, with or without faults, for the tests of indexing and verifying."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (12, 10), kind: str = "PNG", turn: int = 1) -> bytes:
    """A small picture file of noise; `turn` is its EXIF orientation."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(values).save(file, kind, exif=exif)
    return file.getvalue()


def bomb() -> bytes:
    """A small PNG whose header says 65,536 x 65,536 pixels."""
    header = b"IHDR" + struct.pack(">II", 2**16, 2**16) + b"\x08\x02\0\0\0"
    return picture(1)[:12] + header + struct.pack(">I", zlib.crc32(header)) + picture(1)[33:]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A plain tar of named members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, seed: int, label: str | None = None) -> list[tuple[str, bytes]]:
    """A picture and, if given, its label."""
    beside = [] if label is None else [(f"{key}.cls", label.encode())]
    return [(f"{key}.png", picture(seed)), *beside]


def shard(path: Path, keys: Sequence[str], labels: str = "ab") -> Path:
    """A sound shard of labelled samples."""
    members = [part for i, key in enumerate(keys) for part in sample(key, i + 100 * len(key), labels[i % len(labels)])]
    return write_tar(path, members)


def headers(path: Path) -> dict[str, int]:
    """Where the header of each member begins."""
    with tarfile.open(path) as tar:
        return {member.name: member.offset for member in tar}


def flip(path: Path, place: int) -> None:
    """Turn one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    """Keep the beginning of a file."""
    path.write_bytes(path.read_bytes()[:length])
