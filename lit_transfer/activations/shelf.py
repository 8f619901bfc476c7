"""A shelf: the records of one stream, seen one way and computed up to one cut, in a folder that many share.

    shelf.json              what the records are; the folder's name is its hash
    part-00003.safetensors  whole, and checked when it is read

and the leases and the log of `sharing`.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_transfer.activations.contents import Contents
from lit_transfer.activations.lease import TIMEOUT_S, Lease
from lit_transfer.activations.part import CorruptRecord, Part, as_bytes, open_part, record_bytes, write_part
from lit_transfer.activations.permissions import grant
from lit_transfer.activations.sharing import SharedFolder

ROWS_PER_PART = 256
"""Records of a part, on every shelf: so the parts of several cuts of a stream hold the same samples."""


@dataclass(frozen=True)
class Shelf:
    """Records under one key. It can be handed to other processes; each opens its own files.

    Args:
        store: the folder of all shelves.
        contents: what the records are.
        group_writable: let the group write what is made here.
        timeout_s: of leases.
    """

    store: Path
    contents: Contents
    group_writable: bool = False
    timeout_s: float = TIMEOUT_S

    @cached_property
    def key(self) -> str:
        """sha256 of what the records are."""
        return self.contents.key

    @cached_property
    def folder(self) -> Path:
        """Where they are."""
        return self.store / self.key

    @cached_property
    def shared(self) -> SharedFolder:
        """The folder as something that others use, too."""
        return SharedFolder(self.folder, self.contents.to_plain(), self.group_writable, self.timeout_s)

    @property
    def description(self) -> dict[str, Any]:
        """All that decides their values."""
        return self.contents.description

    @property
    def records(self) -> int:
        """How many there are when the shelf is complete."""
        return self.contents.records

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one record."""
        return self.contents.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the records."""
        return self.contents.dtype

    @property
    def parts(self) -> int:
        """Files of a complete shelf."""
        return -(-self.records // ROWS_PER_PART)

    @property
    def full_bytes(self) -> int:
        """Bytes of a complete shelf, but for headers and logs."""
        return self.records * (record_bytes(self.shape, self.dtype) + 8)

    def missing(self) -> list[int]:
        """The parts that are not there."""
        there = set(self.shared.names())
        return [part for part in range(self.parts) if self._name(part) not in there]

    def missing_records(self) -> int:
        """Records that are not there."""
        return sum(map(self._rows, self.missing()))

    def claim(self, part: int) -> Lease | None:
        """The right to compute a part; None if it is there already, or a live process has it.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._path(part).exists():
            return None
        claim = self.shared.hold(f"part-{part:05d}")
        if claim is not None and self._path(part).exists():  # its builder was done between the two looks
            claim.release()
            return None
        return claim

    def write(self, part: int, values: Tensor, damaged: Mapping[int, str]) -> None:
        """Add a part, whole or not at all; if it is there by now, this one is counted as wasted.

        Args:
            part: its number.
            values: [n, *shape], on the CPU.
            damaged: place in the part -> why the values there are zeros.

        Raises:
            OSError: the disk is full; nothing is left behind.
        """
        rows = self._rows(part)
        assert values.shape == (rows, *self.shape) and values.dtype == self.dtype, f"{values.shape} {values.dtype}"
        self.shared.make()
        path = self._path(part)
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
        is_new = False
        try:
            write_part(temporary, self.key, part * ROWS_PER_PART, values, damaged)
            grant(temporary, self.group_writable)
            is_new = not path.exists()
            if is_new:
                temporary.replace(path)
        except FileNotFoundError:  # this process was taken for dead, and its unfinished file was removed
            is_new = False
        finally:
            temporary.unlink(missing_ok=True)
        self.shared.log("built" if is_new else "wasted", part, rows)

    def read(self, places: Sequence[int] | NDArray[np.integer[Any]]) -> Tensor:
        """Records [len(places), *shape] in the order asked, each checked.

        Raises:
            CorruptRecord: one is not what was written, or not there.
        """
        values = torch.empty((len(places), *self.shape), dtype=self.dtype)
        rows = as_bytes(values)
        for i, place in enumerate(map(int, places)):
            assert 0 <= place < self.records, f"place {place} of {self.records}"
            number, row = divmod(place, ROWS_PER_PART)
            self._read(number, row, rows[i : i + 1])
        return values

    def load(self) -> Tensor:
        """All records [records, *shape], each checked.

        Raises:
            CorruptRecord: one is not what was written, or not there.
        """
        values = torch.empty((self.records, *self.shape), dtype=self.dtype)
        rows = as_bytes(values)
        for number in range(self.parts):
            first = number * ROWS_PER_PART
            self._read(number, 0, rows[first : first + ROWS_PER_PART])
        return values

    def damaged(self, parts: Iterable[int] | None = None) -> dict[int, str]:
        """Why some records of some parts, or of all, have no values, by their places.

        Raises:
            CorruptRecord: a part cannot be read.
        """
        return {
            part * ROWS_PER_PART + row: reason
            for part in (range(self.parts) if parts is None else parts)
            for row, reason in self._part(part).damaged.items()
        }

    def verify(self, part: int, sound: Collection[int] = ()) -> list[int]:
        """Places in the shelf of a part's wrong records: all if the file cannot be read, none if there is none.

        `sound`: places of records that have values if they are right.
        """
        first, rows = part * ROWS_PER_PART, self._rows(part)
        open_part.cache_clear()
        record = np.empty((1, record_bytes(self.shape, self.dtype)), np.uint8)
        try:
            opened = self._open(part)
            wrong = {place for row in range(rows) for place in opened.read(row, record)}
            return sorted(wrong.union(place for place in sound if place - first in opened.damaged))
        except FileNotFoundError:
            return []
        except ValueError:
            return [*range(first, first + rows)]
        except OSError as error:
            if error.errno != errno.EIO:  # such as too many open files, which says nothing of this one
                raise
            return [*range(first, first + rows)]

    def discard(self, part: int, sound: Collection[int] = ()) -> None:
        """Remove a part if `verify` finds some of it wrong, so that it is built again, and count it as corrupted."""
        claim = self.shared.hold(f"part-{part:05d}")
        if claim is None:  # somebody builds it anew
            return
        with claim:
            wrong = self.verify(part, sound)  # again: another process may have rebuilt it since
            if wrong:
                self._path(part).unlink(missing_ok=True)
                self.shared.log("corrupted", part, len(wrong))
        open_part.cache_clear()

    def in_use(self) -> AbstractContextManager[None]:
        """A block in which nothing of the shelf is evicted; look at `missing()` inside it.

        Raises:
            OSError: the folder cannot be written.
        """
        return self.shared.in_use()

    def counts(self) -> dict[str, int]:
        """Parts `built`, `wasted` and `corrupted` since the shelf was made; records are `built_records` and so on."""
        return self.shared.counts()

    def _name(self, part: int) -> str:
        return f"part-{part:05d}.safetensors"

    def _path(self, part: int) -> Path:
        return self.folder / self._name(part)

    def _rows(self, part: int) -> int:
        return min(ROWS_PER_PART, self.records - part * ROWS_PER_PART)

    def _open(self, part: int) -> Part:
        path, first = f"{self.folder}/{self._name(part)}", part * ROWS_PER_PART
        return open_part(path, self.key, first, self._rows(part), self.shape, self.dtype)

    def _part(self, part: int) -> Part:
        try:
            return self._open(part)
        except FileNotFoundError:
            raise self._corrupt(part, "it is not there") from None
        except ValueError as error:
            raise self._corrupt(part, str(error)) from None

    def _read(self, part: int, row: int, into: NDArray[np.uint8]) -> None:
        wrong = self._part(part).read(row, into)
        if wrong:
            open_part.cache_clear()  # another process may have put it right since it was opened
            wrong = self._part(part).read(row, into)
        if wrong:
            places = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
            raise self._corrupt(part, f"records {places} are not those that were written")

    def _corrupt(self, part: int, reason: str) -> CorruptRecord:
        return CorruptRecord(
            f"{self._path(part)} is damaged: {reason}; remove what is wrong with lit-transfer store verify --remove "
            f"--folder {self.store}, and it is computed again."
        )
