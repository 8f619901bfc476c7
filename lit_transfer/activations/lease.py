"""Leases: files that say what a live process holds, on a disk that hosts may share. They are advice, not locks.

A holder touches its lease while it lives. It is dead as soon as its process is gone, if that ran on this host.
Elsewhere, and for a process that hangs, it is dead once nobody touched the file for `timeout_s` on this process's own
monotonic clock: the clocks of others are not trusted. There is no `flock`, which a shared file system may lack.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from lit_transfer.activations.permissions import grant

TIMEOUT_S = 60.0
"""Seconds without a touch after which a holder that cannot be looked at counts as dead."""
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_BEATS_PER_TIMEOUT = 10
_POLL_S = 0.05

Standing = Literal["live", "dead", "unknown"]


@dataclass(frozen=True)
class Holder:
    """A process: its host, what makes its number unique there, when it started, and a word for this one lease."""

    host: str
    system: str
    pid: int
    started: str
    token: str


class Lease:
    """A lease of this process, touched until it is released. A forked process does not inherit it."""

    def __init__(self, path: Path, descriptor: int, timeout_s: float) -> None:
        self.path = path
        self.descriptor = descriptor
        self.timeout_s = timeout_s
        _heart.add(self)

    def is_held(self) -> bool:
        """Whether the file still has its name: nobody took this process for dead, or the folder away."""
        with suppress(FileNotFoundError):
            return os.path.samestat(self.path.stat(), os.fstat(self.descriptor))
        return False

    def release(self) -> None:
        """Give it up; a second time, and in a forked process, nothing happens."""
        if _heart.remove(self):
            if self.is_held():
                self.path.unlink(missing_ok=True)
            os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class _Heart:
    """Touches all leases of this process, from one thread that lives as long as there are any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._leases: set[Lease] = set()
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        with self._changed:
            self._leases.add(lease)
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)
                self._thread.start()
            self._changed.notify()

    def remove(self, lease: Lease) -> bool:
        """Whether it was there: the thread touches nothing of it any more."""
        with self._changed:
            was_there = lease in self._leases
            self._leases.discard(lease)
            self._changed.notify()
            return was_there

    def forget(self) -> None:
        """In a forked process, which has neither the thread nor the leases."""
        for lease in self._leases:
            os.close(lease.descriptor)
        self.__init__()  # type: ignore[misc]

    def _beat(self) -> None:
        with self._changed:
            while self._leases:
                for lease in self._leases:
                    with suppress(OSError):  # a server that is away for a moment: the next one counts
                        os.utime(lease.descriptor)
                self._changed.wait(min(lease.timeout_s for lease in self._leases) / _BEATS_PER_TIMEOUT)
            self._thread = None


_heart = _Heart()
os.register_at_fork(after_in_child=_heart.forget)


def acquire(path: Path, *, timeout_s: float = TIMEOUT_S, group_writable: bool = False) -> Lease | None:
    """The lease of this name; None if a live process has it. A dead one's is taken over, by one of all who try.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: the file cannot be made.
    """
    with suppress(FileExistsError):
        return _create(path, timeout_s, group_writable)
    found, holder = _look(path, timeout_s)
    if found != "dead":
        return None
    _remove(path, holder)
    with suppress(FileExistsError):
        return _create(path, timeout_s, group_writable)
    return None


def standing(path: Path, timeout_s: float = TIMEOUT_S) -> Standing:
    """Whether the holder of a lease lives, as far as this process can know by now.

    `unknown` is a process of another host that this one has seen neither touch the file nor leave it alone for
    `timeout_s`. No file is `dead`.
    """
    return _look(path, timeout_s)[0]


def settle(paths: Iterable[Path], timeout_s: float = TIMEOUT_S) -> None:
    """Watch leases until it is known of each whether its holder lives; takes `timeout_s` at most."""
    while any([standing(path, timeout_s) == "unknown" for path in paths]):  # a list: each of them is looked at
        time.sleep(_POLL_S)


@dataclass(frozen=True)
class _Watched:
    """What was seen of a lease, since when it has not changed, and whether it did before."""

    seen: tuple[Holder | None, int]
    since_s: float
    was_touched: bool


_watched: dict[Path, _Watched] = {}


def _create(path: Path, timeout_s: float, group_writable: bool) -> Lease:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    pid = os.getpid()
    holder = Holder(socket.gethostname(), _system(), pid, _started(pid), secrets.token_hex(8))
    try:
        grant(path, group_writable)
        os.write(descriptor, json.dumps(asdict(holder)).encode())
    except OSError as error:
        if error.errno not in DISK_FULL:  # an empty one still holds by being touched, and room is made under a lease
            os.close(descriptor)
            path.unlink()
            raise
    return Lease(path, descriptor, timeout_s)


def _read(path: Path) -> tuple[Holder | None, int]:
    """The holder and the time of the last touch; no holder where the file is just being written."""
    with path.open("rb") as file:  # opened, for a file server says only then how old it really is
        touched_ns = os.fstat(file.fileno()).st_mtime_ns
        text = file.read()
    with suppress(ValueError, TypeError):
        return Holder(**json.loads(text)), touched_ns
    return None, touched_ns


def _look(path: Path, timeout_s: float) -> tuple[Standing, Holder | None]:
    try:
        holder, touched_ns = _read(path)
    except FileNotFoundError:
        _watched.pop(path, None)
        return "dead", None
    is_here = holder is not None and holder.system == _system() != ""
    if holder is not None and is_here and _started(holder.pid) != holder.started:
        return "dead", holder
    seen, now_s = (holder, touched_ns), time.monotonic()
    last = _watched.get(path)
    if last is None or last.seen != seen:
        last = _watched[path] = _Watched(seen, now_s, last is not None and last.seen[0] == holder)
    if now_s - last.since_s > timeout_s:
        return "dead", holder
    return ("live" if is_here or last.was_touched else "unknown"), holder


def _remove(path: Path, dead: Holder | None) -> None:
    """Remove the lease of a dead holder. Of several who try one gets it; who gets a later one puts that back."""
    aside = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if _read(aside)[0] != dead and not path.exists():
            aside.rename(path)
        aside.unlink()


@cache
def _system() -> str:
    """What the numbers of processes belong to: a boot of a kernel and a namespace; empty where nothing tells."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _started(pid: int) -> str:
    """When a process of this system started, in its own units; empty if it is gone, or nothing tells."""
    with suppress(OSError):
        # Behind the name, which may hold anything: the state, and 19 fields later the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""
