"""A tar shard read once, from front to back, wherever it lies: hashed, and checked to its end.

`tarfile` takes a damaged header, and a file that was cut off between two members, for the end of the archive.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from lit_transfer.data import reach
from lit_transfer.errors import UserError

_END_BYTES = 1024  # two blocks of zeros end an archive
_PIECE_BYTES = 1 << 20


class TarDamage(Exception):
    """What is wrong with a tar, on one line; its members up to there are sound."""


class Forward:
    """The bytes at an address as a file that is only read forward, and hashed on the way.

    Args:
        address: path or address.
        tick: is told the length of each piece that arrived.
    """

    def __init__(self, address: str, tick: Callable[[int], None]) -> None:
        self.sha256 = hashlib.sha256()
        self.place = 0
        self.last = b""
        self._tick = tick
        self._pieces = reach.stream(address)
        self._left = memoryview(b"")

    def read(self, size: int) -> bytes:
        """The next bytes; fewer only at the end."""
        parts = []
        while size > 0 and (self._left or self._next()):
            parts.append(self._left[:size])
            self._left = self._left[len(parts[-1]) :]
            size -= len(parts[-1])
        self.last = b"".join(parts)
        self.place += len(self.last)
        return self.last

    def tell(self) -> int:
        """Bytes read so far."""
        return self.place

    def seek(self, place: int) -> int:
        """Read on to a place, or to the end if that comes first."""
        if place < self.place:  # only a negative size leads back
            raise tarfile.ReadError("a member with a negative size")
        while self.place < place and self.read(min(_PIECE_BYTES, place - self.place)):
            pass
        return self.place

    def finish(self) -> None:
        """Read to the end, so that hash and place are those of the whole."""
        while self.read(_PIECE_BYTES):
            pass

    def _next(self) -> bool:
        piece = next(self._pieces, b"")
        self.sha256.update(piece)
        self._tick(len(piece))
        self._left = memoryview(piece)
        return bool(piece)


def members(file: Forward) -> Iterator[tarfile.TarInfo]:
    """The members of a tar in order; the caller may read the bytes of each before it asks for the next.

    Raises:
        TarDamage: no plain tar, a damaged header, an end inside a member or before the end-of-archive mark, or bytes
            behind that mark.
    """
    try:
        with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would hold them all
                yield member
            end = tar.offset
    except UserError:  # of the address
        raise
    except (tarfile.TarError, ValueError) as error:  # ValueError: a number that its reader cannot take
        if file.place <= tarfile.BLOCKSIZE:
            raise TarDamage(f"no plain tar archive ({error}); a compressed one must be unpacked to .tar") from None
        raise TarDamage(f"damaged or cut off at byte {file.place} ({error})") from None
    _check_end(file, end)


def _check_end(file: Forward, end: int) -> None:
    """What follows the last member that was found must be zeros, and enough of them."""
    block = file.last if file.place > end else b""
    zeros = len(block)
    if block.strip(b"\0"):
        raise TarDamage(f"damaged or cut off: there is no sound header at byte {end}")
    while block := file.read(_PIECE_BYTES):
        zeros += len(block)
        if block.strip(b"\0"):
            raise TarDamage(f"bytes follow the end-of-archive mark at byte {end}, which readers pass over silently")
    if zeros < _END_BYTES:
        raise TarDamage(f"cut off at byte {file.place}: there is no end-of-archive mark")


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member as webdataset has them: they part at the first dot of the file name."""
    found = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name, flags=re.DOTALL)
    return (found[1], found[2]) if found else None


def ticker(bar: Any) -> Callable[[int], None]:
    """Advances a progress bar, from any thread."""
    lock = threading.Lock()

    def tick(count: int) -> None:
        with lock:
            bar.update(count)

    return tick
