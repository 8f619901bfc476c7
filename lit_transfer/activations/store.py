"""The activation store: a folder of shelves, of bounded size."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_transfer.activations import lease
from lit_transfer.activations.contents import Contents, read_contents
from lit_transfer.activations.sharing import EVICTED, folder_bytes
from lit_transfer.activations.shelf import Shelf
from lit_transfer.data import cache
from lit_transfer.errors import UserError

_KEY = re.compile(r"[0-9a-f]{64}")


def default_folder() -> Path:
    """`lit_transfer/activations` in $XDG_CACHE_HOME or ~/.cache."""
    return cache.default_folder() / "activations"


@dataclass(frozen=True)
class ActivationStore:
    """All shelves below a folder, which processes, runs, hosts and users of a group may share.

    Args:
        folder: on a disk of this machine or of a file server; made when the first shelf is.
        limit_bytes: most that all shelves together may hold.
        group_writable: let the group write what is made, whatever the umask.
        timeout_s: seconds after which a process of another host that shows no sign of life counts as dead.
    """

    folder: Path
    limit_bytes: int
    group_writable: bool = False
    timeout_s: float = lease.TIMEOUT_S

    def shelf(self, description: dict[str, Any], *, records: int, shape: tuple[int, ...], dtype: torch.dtype) -> Shelf:
        """The shelf of some records, made if it is not there; it may be half built.

        Args:
            description: all that decides their values, as JSON can hold it.
            records: how many.
            shape: of one.
            dtype: of them.

        Raises:
            UserError: a shelf of this name says that it is of other records.
            OSError: it cannot be made.
        """
        shelf = self._shelf(Contents(description, records, tuple(shape), dtype))
        read_contents(shelf.folder)
        shelf.shared.make()
        return shelf

    def find(
        self, description: dict[str, Any], *, records: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Shelf | None:
        """The shelf of some records if it is complete; nothing is made. It can be evicted until it is `in_use`.

        Raises:
            UserError: a shelf of this name says that it is of other records.
        """
        shelf = self._shelf(Contents(description, records, tuple(shape), dtype))
        return None if read_contents(shelf.folder) is None or shelf.missing() else shelf

    def shelves(self) -> list[Shelf]:
        """All shelves, those used longest ago first; what is damaged is left out."""
        found = []
        for folder in self._folders():
            with suppress(UserError):
                contents = read_contents(folder)
                found += [self._shelf(contents)] if contents else []
        return sorted(found, key=lambda shelf: shelf.shared.last_used_s())

    def strays(self) -> list[Path]:
        """Folders of the store whose `shelf.json` is missing, or is not what their name is the hash of."""
        valid = {shelf.folder for shelf in self.shelves()}
        return [folder for folder in self._folders() if folder not in valid]

    def remove_stray(self, folder: Path) -> None:
        """Remove one of `strays`."""
        assert folder.parent == self.folder
        shutil.rmtree(folder, ignore_errors=True)

    def free_bytes(self, wanted: Collection[Shelf] = ()) -> int:
        """Bytes that fit below the limit and on the disk with nothing evicted; negative above the limit.

        What live processes still add to the shelves that they build is taken off, but not for shelves in `wanted`.
        """
        keys = {shelf.key for shelf in wanted}
        built_by_others = [s for s in self.shelves() if s.key not in keys and s.missing() and s.shared.is_in_use()]
        promised = sum(max(0, shelf.full_bytes - shelf.shared.stored_bytes()) for shelf in built_by_others)
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        disk = os.statvfs(there)
        return min(self.limit_bytes - folder_bytes(self.folder), disk.f_bavail * disk.f_frsize) - promised

    def make_room(self, needed_bytes: int, wanted: Collection[Shelf] = ()) -> bool:
        """Evict what was used longest ago and no live process uses, until there is room.

        If evicting all of it would not do, nothing is. Where processes of other hosts stand in the way, they are
        watched for `timeout_s` at most.

        Args:
            needed_bytes: that are about to be added.
            wanted: shelves that they are added to, or that are about to be used: none of them is evicted.

        Returns:
            Whether there is room.
        """
        self._remove_evicted()
        lacking = needed_bytes - self.free_bytes(wanted)
        if lacking <= 0:
            return True
        keys = {shelf.key for shelf in wanted}
        others = [shelf for shelf in self.shelves() if shelf.key not in keys]
        self._settle(others)
        idle = [(shelf, shelf.shared.stored_bytes()) for shelf in others if not shelf.shared.is_in_use()]
        if sum(size for _, size in idle) < lacking:
            return False
        for shelf, size in idle:
            if lacking > 0 and shelf.shared.evict():
                lacking -= size
        return lacking <= 0

    def prune(self, *, limit_bytes: int | None = None, unused_s: float | None = None) -> list[tuple[Shelf, int]]:
        """Evict shelves that no live process uses, and return them with their bytes.

        Args:
            limit_bytes: those used longest ago, until all together hold no more than this.
            unused_s: those that were not used for so long; 0 is all.
        """
        self._remove_evicted()
        shelves = self.shelves()
        self._settle(shelves)
        above = 0 if limit_bytes is None else folder_bytes(self.folder) - limit_bytes
        before_s = 0.0 if unused_s is None else time.time() - unused_s
        removed: list[tuple[Shelf, int]] = []
        for shelf in shelves:
            size = shelf.shared.stored_bytes()
            is_old = unused_s == 0 or shelf.shared.last_used_s() < before_s
            if (is_old or above > 0) and shelf.shared.evict():
                removed.append((shelf, size))
                above -= size
        return removed

    def _shelf(self, contents: Contents) -> Shelf:
        return Shelf(self.folder, contents, self.group_writable, self.timeout_s)

    def _folders(self) -> Iterator[Path]:
        if self.folder.is_dir():
            yield from (path for path in self.folder.iterdir() if _KEY.fullmatch(path.name))

    def _settle(self, shelves: Collection[Shelf]) -> None:
        lease.settle([path for shelf in shelves for path in shelf.shared.leases()], self.timeout_s)

    def _remove_evicted(self) -> None:
        """What a process left that died while it evicted."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"{EVICTED}*"):
                shutil.rmtree(path, ignore_errors=True)
