"""Shards as others write them, with or without faults, for the tests of indexing and verifying."""

from __future__ import annotations

import csv
import gc
import io
import struct
import tarfile
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.index import Index, index


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


def by_shard_writer(folder: Path) -> list[Path]:
    """25 samples by webdataset's own ShardWriter, 10 a shard."""
    with webdataset.ShardWriter(str(folder / "train-%03d.tar"), maxcount=10, verbose=0) as writer:
        for i in range(25):
            fields = {"kind": "xy"[i % 2], "deep": {"value": i / 2}, "flag": i % 4 == 0, "empty": None}
            picture_of = picture(i, (12 + i, 10))
            writer.write({"__key__": f"dir/s{i:04d}", "png": picture_of, "cls": i % 3, "json": fields, "txt": f"n {i}"})
    return sorted(folder.glob("*.tar"))


def indexed(*shards: Path | str, **options: Any) -> Manifest:
    """The dataset that `prepare --index` makes of shards."""
    return index(Index(index=[str(path) for path in shards], **{"workers": 1} | options)).manifest


def rejected(folder: Path) -> list[tuple[str, str, str]]:
    """Shard, member and reason of what is in no dataset."""
    with (folder / "rejected.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["shard", "member", "reason"]
    return [(row[0], row[1], row[2]) for row in rows]


def read_by_webdataset(*paths: Path) -> list[dict[str, Any]]:
    """The samples as webdataset itself reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the tars to the collector to close
        read = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
        gc.collect()
    return read
