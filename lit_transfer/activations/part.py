"""One part of a shelf: a safetensors file of records, each with a checksum.

Tensors: `checksum` [n], int64, is the CRC-32 of each record's bytes, begun with its place in the shelf, so that a
record in the place of another is wrong, too; `records` is [n, *shape]. Metadata: the shelf's `key`; `damaged`, JSON,
place in the part -> why there are only zeros; `crc32` of that text.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_transfer.data.cache import OpenFile
from lit_transfer.errors import UserError

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What records may be of, as safetensors calls it."""
OPEN_PARTS = 256
"""Files that a process holds open, those used last."""
_HEAD_BYTES = 4096


class CorruptRecord(UserError):
    """A record is not what was written, or cannot be read; made from its sentence alone, as a loader's worker does."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence.rpartition("CorruptRecord: ")[2])


@dataclass(frozen=True)
class Part:
    """An open part.

    Args:
        file: open as long as this object lives.
        start: its byte where the first record begins.
        first: place in the shelf of the first record.
        checksums: of the records.
        damaged: place in the part -> why its record is zeros.
    """

    file: OpenFile
    start: int
    first: int
    checksums: list[int]
    damaged: dict[int, str]

    def read(self, row: int, into: NDArray[np.uint8]) -> list[int]:
        """Fill [n, bytes of a record] with the records from `row` on; returns places in the shelf of wrong ones."""
        _fill(self.file.descriptor, into, self.start + row * into.shape[1])
        places = range(self.first + row, self.first + row + len(into))
        sums = self.checksums[row : row + len(into)]
        return [
            place for place, sum_, record in zip(places, sums, into, strict=True) if zlib.crc32(record, place) != sum_
        ]


def write_part(path: Path, key: str, first: int, values: Tensor, damaged: Mapping[int, str]) -> None:
    """Write a new file, and see that it is on the disk.

    Args:
        path: of the file, which must not be there.
        key: of the shelf.
        first: place in the shelf of the first record.
        values: [n, *shape], on the CPU.
        damaged: place in the part -> why its values are zeros.
    """
    rows = as_bytes(values)
    checksums = np.array([zlib.crc32(record, first + row) for row, record in enumerate(rows)], "<i8")
    head = json.dumps(_header(key, len(rows), tuple(values.shape[1:]), values.dtype, json.dumps(damaged))).encode()
    head += b" " * (-len(head) % 8)
    with path.open("xb") as file:
        for piece in (struct.pack("<Q", len(head)), head, checksums.data, rows.data):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


@lru_cache(maxsize=OPEN_PARTS)
def open_part(path: str, key: str, first: int, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> Part:
    """Open a part that must be of these records; stays open for later calls until `open_part.cache_clear()`.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is damaged, or of other records.
    """
    file = OpenFile(Path(path), os.open(path, os.O_RDONLY))
    size = os.fstat(file.descriptor).st_size
    head = file.read(0, _HEAD_BYTES)
    begin = 8 + int.from_bytes(head[:8], "little")
    start = begin + 8 * rows
    if start > size:
        raise ValueError("it is cut off")
    if start > len(head):
        head = file.read(0, start)
    try:
        found = json.loads(head[8:begin])
        damaged = found["__metadata__"]["damaged"]
        is_right = found == _header(key, rows, shape, dtype, damaged)
    except (ValueError, TypeError, KeyError, AttributeError):
        is_right = False
    if not is_right:
        raise ValueError("its header is not that of these records")
    if size != start + rows * record_bytes(shape, dtype):
        raise ValueError(f"it has {size} bytes, not {start + rows * record_bytes(shape, dtype)}")
    checksums = np.frombuffer(head, "<i8", rows, begin).tolist()
    return Part(file, start, first, checksums, {int(row): reason for row, reason in json.loads(damaged).items()})


def record_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one record."""
    return math.prod(shape) * dtype.itemsize


def as_bytes(values: Tensor) -> NDArray[np.uint8]:
    """Records [n, *shape] on the CPU as [n, bytes of a record]: the same memory if they are contiguous."""
    assert values.device.type == "cpu"
    flat = values.detach().contiguous().reshape(len(values), math.prod(values.shape[1:]))
    found: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return found


def _header(key: str, rows: int, shape: tuple[int, ...], dtype: torch.dtype, damaged: str) -> dict[str, Any]:
    start = 8 * rows
    stop = start + rows * record_bytes(shape, dtype)
    return {
        "__metadata__": {"key": key, "damaged": damaged, "crc32": str(zlib.crc32(damaged.encode()))},
        "checksum": {"dtype": "I64", "shape": [rows], "data_offsets": [0, start]},
        "records": {"dtype": DTYPES[dtype], "shape": [rows, *shape], "data_offsets": [start, stop]},
    }


def _fill(descriptor: int, into: NDArray[np.uint8], start: int) -> None:
    """Read into memory; zeros stand for what the file lacks, which shows in the checksums."""
    left = into.data.cast("B")
    while left and (count := os.preadv(descriptor, [left], start)):
        left, start = left[count:], start + count
    left[:] = bytes(len(left))
