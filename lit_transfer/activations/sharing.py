"""A folder that processes of one or several hosts fill, use and evict at the same time.

    *.lease          what a live process does here: `user-*` uses the folder, `eviction` takes all of it away,
                     others compute what they are named after, as in `part-00003.lease`
    .part-00003.*    being written, by whoever has the lease of that name
    log-HOST.jsonl   what was done, a line each; a file a host, for only its own kernel appends whole lines

A user takes its lease, then looks for an eviction; who evicts takes that lease, then looks for users. So one of the two
always sees the other.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lit_transfer.activations import lease
from lit_transfer.activations.lease import Lease
from lit_transfer.activations.permissions import grant, make_folder
from lit_transfer.files import write_json

ABOUT = "shelf.json"
"""What the folder is for; the time of this file is that of the last use."""
EVICTED = ".evicted-"
"""How the name of a folder begins that is being removed."""
EVENTS = ("built", "wasted", "corrupted")
_EVICTION = "eviction"
_POLL_S = 0.05
_ATTEMPTS = 100  # to make a folder that others evict meanwhile: some other thing of its name never goes away


@dataclass(frozen=True)
class SharedFolder:
    """Leases, log and end of a folder.

    Args:
        path: of the folder.
        about: plain values that say what it is for.
        group_writable: let the group write what is made here.
        timeout_s: of leases.
    """

    path: Path
    about: dict[str, Any]
    group_writable: bool
    timeout_s: float

    def make(self) -> None:
        """Make the folder and say in it what it is for, unless that is done.

        Raises:
            OSError: the folder cannot be made.
        """
        for attempts_left in reversed(range(_ATTEMPTS)):
            if (self.path / ABOUT).exists():
                return
            try:
                make_folder(self.path, self.group_writable)
                write_json(self.path / ABOUT, self.about)
                grant(self.path / ABOUT, self.group_writable)
            # Evicted just now, if need be before mkdir could look at what is there, or tidied by one who was faster.
            except (FileNotFoundError, FileExistsError):
                if not attempts_left:
                    raise

    def names(self) -> list[str]:
        """Of all files; none if the folder is not there."""
        with suppress(FileNotFoundError):
            return os.listdir(self.path)  # noqa: PTH208  names are all that is asked for, of many files
        return []

    def hold(self, name: str) -> Lease | None:
        """The lease `name.lease`, in a folder that is not being evicted; None if a live process has it.

        Raises:
            OSError: the folder cannot be written.
        """
        while True:
            self.make()
            with suppress(FileNotFoundError):  # evicted just now
                held = self._acquire(name)
                if held is None:
                    return None
                # In this order: once the folder has lost its name, its eviction can no longer be seen.
                if self._standing(_EVICTION) == "dead" and held.is_held():
                    self._remove_unfinished(f".{name}.")
                    return held
                held.release()
            time.sleep(_POLL_S)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Nothing here is evicted in this block.

        Raises:
            OSError: as `hold`.
        """
        use = self.hold(f"user-{secrets.token_hex(8)}")
        assert use is not None, "its name is new"
        with use:
            self._tidy()
            try:
                yield
            finally:
                self._tidy()

    def leases(self) -> list[Path]:
        """Of users and builders, dead ones too."""
        return [
            self.path / n for n in self.names() if n.endswith(".lease") and n[0] != "." and n != f"{_EVICTION}.lease"
        ]

    def is_in_use(self) -> bool:
        """Whether a process may live that uses or fills it."""
        return any(lease.standing(path, self.timeout_s) != "dead" for path in self.leases())

    def last_used_s(self) -> float:
        """When a use last began or ended, in seconds of the clock that files have; 0 if it is gone."""
        with suppress(FileNotFoundError):
            return (self.path / ABOUT).stat().st_mtime
        return 0.0

    def stored_bytes(self) -> int:
        """Bytes of all files here."""
        return folder_bytes(self.path)

    def evict(self) -> bool:
        """Remove the folder; False if a process uses or fills it, or it is not ours to remove."""
        aside = self.path.with_name(f"{EVICTED}{secrets.token_hex(8)}")
        try:
            claim = self._acquire(_EVICTION)
            if claim is None:
                return False
            with claim:
                if self.is_in_use():
                    return False
                self.path.rename(aside)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS, *lease.DISK_FULL}:
                raise
            return False
        shutil.rmtree(aside, ignore_errors=True)
        return True

    def log(self, event: str, part: int, records: int) -> None:
        """Add a line: one of EVENTS, and to which part and how many records."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"event": event, "part": part, "records": records, "at": at, "pid": os.getpid()})
        path = self.path / f"log-{socket.gethostname()}.jsonl"
        with suppress(FileNotFoundError), path.open("a") as file:
            file.write(f"{line}\n")
            grant(path, self.group_writable)

    def counts(self) -> dict[str, int]:
        """Parts and records of each of EVENTS since the folder was made: `built`, `built_records`, and so on."""
        found = Counter({f"{event}{unit}": 0 for event in EVENTS for unit in ("", "_records")})
        for path in self.path.glob("log-*.jsonl"):
            with suppress(FileNotFoundError, PermissionError):  # evicted just now, or another user's own
                for line in path.read_text().splitlines():
                    with suppress(ValueError, TypeError, KeyError):  # a line that a full disk cut off
                        entry = json.loads(line)
                        found.update({entry["event"]: 1, f"{entry['event']}_records": entry["records"]})
        return dict(found)

    def _acquire(self, name: str) -> Lease | None:
        path = self.path / f"{name}.lease"
        return lease.acquire(path, timeout_s=self.timeout_s, group_writable=self.group_writable)

    def _standing(self, name: str) -> lease.Standing:
        return lease.standing(self.path / f"{name}.lease", self.timeout_s)

    def _tidy(self) -> None:
        """Note the time of use, and remove what the dead have left."""
        with suppress(FileNotFoundError, PermissionError):
            os.utime(self.path / ABOUT)
        for name in self.names():
            stem = name.removeprefix(".").partition(".")[0]
            if name.startswith(("user-", ".part-", ".shelf.")) and self._standing(stem) == "dead":
                (self.path / name).unlink(missing_ok=True)

    def _remove_unfinished(self, prefix: str) -> None:
        for name in self.names():
            if name.startswith(prefix):
                (self.path / name).unlink(missing_ok=True)


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder, as far as they are still there."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total
