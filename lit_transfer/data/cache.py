"""Remote shards on the local disk: fetched once a node, verified while they arrive, the least recently used evicted.

A file of the cache is named by its address and content, so two addresses, or two contents of one, never share a file.
Locks (`flock`) say what is in use, and end with their process however that ends:

- the folder's `.lock`, held for moments: who makes room, claims a download or gives a file its final name
- exclusive on `NAME.BYTES.partial`: the one process that downloads it; what it leaves behind is gone on from
- shared on `NAME`: a reader; no one evicts it
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lit_transfer.data import reach, transfer
from lit_transfer.data.transfer import Version
from lit_transfer.errors import UserError, require

_POLL_S = 0.1
_PIECE_BYTES = 1 << 20
_PARTIAL = ".partial"
_NAME = re.compile(rf"[0-9a-f]{{16}}-.*?(\.(?P<planned>\d+){re.escape(_PARTIAL)})?")
# The disk is full, the folder is not ours to write, or its file system has no locks.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
_CANNOT_HOLD = {*_FULL, *_NOT_OURS, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_warned: set[Path] = set()


@dataclass(frozen=True)
class _Entry:
    """A file of the cache: when it was used, in seconds, its bytes now and once it is whole."""

    path: Path
    used: float
    bytes: int
    planned_bytes: int


class WrongContent(UserError):
    """A file was downloaded twice, and both times is not what its manifest says."""


class _NoRoom(Exception):
    """The cache cannot hold the file, and why; it is read through."""


class OpenFile:
    """A file that was opened to be read, by any thread; no one evicts it while this object lives."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), fewer where the file ends before."""
        return os.pread(self.descriptor, stop - start, start)

    def __del__(self) -> None:
        os.close(self.descriptor)


def default_folder() -> Path:
    """`lit_transfer` in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_transfer"


@dataclass(frozen=True)
class ShardCache:
    """Copies of remote files in a folder that processes, runs and users of a group may share.

    Args:
        folder: on a disk of this machine; made with the user's umask.
        limit_bytes: all files together, what is being downloaded included.
        timeout_s: seconds without a byte after which a connection is given up and tried again.
    """

    folder: Path
    limit_bytes: int
    timeout_s: float = reach.TIMEOUT_S

    def fetch(self, address: str, *, sha256: str | None, bytes: int | None) -> Path | None:
        """As `open`, but the path: it can be evicted once nobody has the file open, so open it at once."""
        file = self.open(address, sha256=sha256, bytes=bytes)
        return None if file is None else file.path

    def open(self, address: str, *, sha256: str | None, bytes: int | None) -> OpenFile | None:
        """The content of a remote address, downloaded first if need be.

        A download is checked by hash, or by length where no hash is known. What is there already is checked by
        length: whoever reads parts of it checks those, and calls `discard` where they are wrong.

        Args:
            address: remote.
            sha256: hex, of the content; None asks the server each time whether the content is still the same.
            bytes: its length.

        Returns:
            None where the cache cannot hold it, with one warning a process: read it from its address.

        Raises:
            UserError: it cannot be read, or is not what was expected.
        """
        expected = Version(bytes) if sha256 and bytes is not None else self._described(address, bytes)
        name = _name(address, sha256 or expected.tag or secrets.token_hex(8), expected.size or 0)
        try:
            return self._open(address, name, expected, sha256)
        except _NoRoom as reason:
            self._warn(str(reason))
        except OSError as error:
            if error.errno not in _CANNOT_HOLD:
                raise
            self._warn(os.strerror(error.errno))
        return None

    def discard(self, file: OpenFile) -> None:
        """Remove a file whose content is wrong, unless another one has its name already."""
        with self._locked():
            if _is_at(file.descriptor, file.path):
                file.path.unlink()

    def _described(self, address: str, bytes: int | None) -> Version:
        found = reach.describe(address, timeout_s=self.timeout_s)
        require(found.size is not None, f"{reach.shown(address)}: the server does not say how long it is; use another.")
        require(
            bytes in (None, found.size),
            f"{reach.shown(address)} has {found.size} bytes, not {bytes}; copy or prepare it again.",
        )
        return found

    def _open(self, address: str, name: str, expected: Version, sha256: str | None) -> OpenFile:
        path, size = self.folder / name, expected.size or 0
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            if (ready := self._ready(path, size)) is not None:
                return ready
            if (claim := self._claim(path, size)) is not None:
                self._download(address, claim, expected, sha256)
                with self._locked():
                    claim.path.rename(path)
                fcntl.flock(claim.descriptor, fcntl.LOCK_SH)
                claim.path = path
                return claim
            time.sleep(_POLL_S)

    def _ready(self, path: Path, size: int) -> OpenFile | None:
        """The file, if it is there, whole and not being evicted."""
        try:
            file = OpenFile(path, os.open(path, os.O_RDONLY))
        except FileNotFoundError:
            return None
        fcntl.flock(file.descriptor, fcntl.LOCK_SH)
        if not _is_at(file.descriptor, path):
            return None
        if os.fstat(file.descriptor).st_size != size:
            self.discard(file)
            return None
        with suppress(PermissionError):  # another user's: its own reads count
            os.utime(path)
        return file

    def _claim(self, path: Path, size: int) -> OpenFile | None:
        """The partial file, locked by this process alone; None if another one downloads or has just done so."""
        partial = path.with_name(f"{path.name}.{size}{_PARTIAL}")
        with self._locked():
            if path.exists():
                return None
            if not partial.exists():
                self._make_room(size)
            claim = OpenFile(partial, os.open(partial, os.O_RDWR | os.O_CREAT, 0o666))
            if _lock_now(claim.descriptor):
                return claim
        idle_s = time.time() - os.fstat(claim.descriptor).st_mtime
        if idle_s > transfer.longest_wait_s(self.timeout_s):
            raise _NoRoom(f"the process that downloads {path.name} has not moved for {idle_s:.0f} s")
        return None

    def _make_room(self, size: int) -> None:
        """Evict what was used longest ago until `size` bytes more fit below the limit and on the disk."""
        entries = sorted(self._entries(), key=lambda entry: entry.used)
        held = sum(entry.planned_bytes for entry in entries)
        disk = os.statvfs(self.folder)
        on_disk = disk.f_bavail * disk.f_frsize + sum(entry.bytes for entry in entries)
        limit = min(self.limit_bytes, on_disk)
        if size > limit:
            raise _NoRoom(f"a file of {size} bytes is above the {limit} bytes that it may hold")
        for entry in entries:
            if held + size <= limit:
                return
            if _evict(entry.path):
                held -= entry.planned_bytes
        if held + size > limit:
            raise _NoRoom(f"all of its {held} bytes are in use, and {size} more are above the limit of {limit}")

    def _entries(self) -> Iterator[_Entry]:
        for path in self.folder.iterdir():
            if found := _NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    planned = int(found["planned"]) if found["planned"] else status.st_size
                    yield _Entry(path, status.st_mtime, status.st_size, planned)

    def _download(self, address: str, claim: OpenFile, expected: Version, sha256: str | None) -> None:
        """Fill the partial file; on failure what arrived stays, unless it is wrong or the disk is full."""
        for is_last in (False, True):
            try:
                found = self._fill(address, claim.descriptor, expected)
            except transfer.Changed:
                os.ftruncate(claim.descriptor, 0)
                if is_last:
                    claim.path.unlink()
                    raise
                continue
            except OSError as error:
                if error.errno in _CANNOT_HOLD:
                    claim.path.unlink(missing_ok=True)
                raise
            if sha256 in (None, found):
                os.fsync(claim.descriptor)
                return
            os.ftruncate(claim.descriptor, 0)
        claim.path.unlink()
        raise WrongContent(
            f"{reach.shown(address)} has the sha256 {found}, not {sha256} as in its manifest, twice; it was changed "
            "or damaged: copy or prepare it again."
        )

    def _fill(self, address: str, descriptor: int, expected: Version) -> str:
        """Add what is missing; returns the sha256 of all of it."""
        sha, at = hashlib.sha256(), 0
        while piece := os.pread(descriptor, _PIECE_BYTES, at):
            sha.update(piece)
            at += len(piece)
        if at < (expected.size or 0):
            for piece in reach.stream(address, at, expected=expected, timeout_s=self.timeout_s):
                view = memoryview(piece)
                while view:
                    written = os.pwrite(descriptor, view, at)
                    view, at = view[written:], at + written
                sha.update(piece)
        return sha.hexdigest()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.folder / ".lock"
        try:
            descriptor = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _warn(self, reason: str) -> None:
        if self.folder not in _warned:
            _warned.add(self.folder)
            warnings.warn(
                f"the shard cache '{self.folder}' cannot be used: {reason}; shards are read through, which is slower: "
                "give it room with data.cache.limit_gb, or another folder with data.cache.folder.",
                stacklevel=3,
            )


def _name(address: str, identity: str, size: int) -> str:
    shown = reach.shown(address)
    key = hashlib.sha256(f"{shown}\n{identity}\n{size}".encode()).hexdigest()[:16]
    return f"{key}-{re.sub(r'[^A-Za-z0-9._-]', '_', shown.rpartition('/')[2])[-80:]}"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still names the file that was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock_now(descriptor: int) -> bool:
    """Take the exclusive lock if nobody has the file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _evict(path: Path) -> bool:
    """Remove a file that nobody has open."""
    try:
        file = OpenFile(path, os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY))
        if not _lock_now(file.descriptor):
            return False
        path.unlink()
    except OSError:  # gone, another user's, or on a file system that cannot tell whether it is in use
        return False
    return True
