"""The activation store: a folder of shelves, of bounded size."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_transfer.activations import lease
from lit_transfer.activations.contents import Contents, read_contents
from lit_transfer.activations.sharing import EVICTED, SharedFolder, folder_bytes
from lit_transfer.activations.shelf import Shelf
from lit_transfer.data import cache
from lit_transfer.errors import UserError

RESERVE_BYTES = 2 * 10**9
"""Of a disk, left free: a run has to write its next checkpoint there, and others may use the disk, too."""
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

    def shelf(self, contents: Contents) -> Shelf:
        """The shelf of some records, which may be half built or not be there; nothing is made.

        Raises:
            UserError: a shelf of this name says that it is of other records.
        """
        shelf = self._shelf(contents)
        read_contents(shelf.folder)
        return shelf

    def shelves(self) -> list[Shelf]:
        """All shelves that can be read, those used longest ago first; what is damaged is left out."""
        found = [self._shelf(contents) for _, contents in self._folders() if contents]
        return sorted(found, key=lambda shelf: shelf.shared.last_used_s())

    def strays(self) -> list[Path]:
        """Folders of the store whose `shelf.json` is missing, or is not what their name is the hash of."""
        return [folder for folder, contents in self._folders() if contents is None]

    def remove_stray(self, folder: Path) -> bool:
        """Remove one of `strays`; False if a live process uses it, or it is not ours to remove."""
        return self._shared(folder).evict()

    def free_bytes(self, wanted: Collection[Shelf] = ()) -> int:
        """Bytes that fit below the limit and, beside RESERVE_BYTES, on the disk with nothing evicted; may be negative.

        What live processes still add to the shelves that they build is taken off, but not for shelves in `wanted`.
        """
        keys = {shelf.key for shelf in wanted}
        built_by_others = [s for s in self.shelves() if s.key not in keys and s.missing() and s.shared.is_in_use()]
        promised = sum(max(0, shelf.full_bytes - shelf.shared.stored_bytes()) for shelf in built_by_others)
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        disk = os.statvfs(there)
        on_disk = disk.f_bavail * disk.f_frsize - RESERVE_BYTES
        return min(self.limit_bytes - folder_bytes(self.folder), on_disk) - promised

    def room_bytes(self, wanted: Collection[Shelf] = ()) -> int:
        """Bytes that would fit if all was evicted that no process may use, but for `wanted`."""
        others = [folder for folder in self._by_use(wanted) if not folder.is_in_use()]
        return self.free_bytes(wanted) + sum(folder.stored_bytes() for folder in others)

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
        others = self._by_use(wanted)
        self._settle(others)
        idle = [(folder, folder.stored_bytes()) for folder in others if not folder.is_in_use()]
        if sum(size for _, size in idle) < lacking:
            return False
        for folder, size in idle:
            if lacking > 0 and folder.evict():
                lacking -= size
        return lacking <= 0

    def prune(self, *, limit_bytes: int | None = None, unused_s: float | None = None) -> list[tuple[str, int]]:
        """Evict shelves and strays that no live process uses, and return their keys and bytes.

        Args:
            limit_bytes: those used longest ago, until all together hold no more than this.
            unused_s: those that were not used for so long; 0 is all.
        """
        self._remove_evicted()
        folders = self._by_use()
        self._settle(folders)
        above = 0 if limit_bytes is None else folder_bytes(self.folder) - limit_bytes
        before_s = 0.0 if unused_s is None else time.time() - unused_s
        removed: list[tuple[str, int]] = []
        for folder in folders:
            size = folder.stored_bytes()
            is_old = unused_s == 0 or folder.last_used_s() < before_s
            if (is_old or above > 0) and folder.evict():
                removed.append((folder.path.name, size))
                above -= size
        return removed

    def _shelf(self, contents: Contents) -> Shelf:
        return Shelf(self.folder, contents, self.group_writable, self.timeout_s)

    def _shared(self, folder: Path) -> SharedFolder:
        return SharedFolder(folder, {}, self.group_writable, self.timeout_s)

    def _folders(self) -> Iterator[tuple[Path, Contents | None]]:
        """Each folder and what is on it, None for a stray; those that others keep for themselves are left out."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        for folder in (path for path in folders if _KEY.fullmatch(path.name)):
            try:
                contents = read_contents(folder)
            except UserError:
                contents = None
            except PermissionError:
                continue
            if folder.is_dir():  # else it was evicted just now
                yield folder, contents

    def _by_use(self, wanted: Collection[Shelf] = ()) -> list[SharedFolder]:
        """All folders but those of `wanted`, those used longest ago first."""
        keys = {shelf.key for shelf in wanted}
        found = [self._shared(folder) for folder, _ in self._folders() if folder.name not in keys]
        return sorted(found, key=SharedFolder.last_used_s)

    def _settle(self, folders: Collection[SharedFolder]) -> None:
        lease.settle([path for folder in folders for path in folder.leases()], self.timeout_s)

    def _remove_evicted(self) -> None:
        """What a process left that died while it evicted."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"{EVICTED}*"):
                shutil.rmtree(path, ignore_errors=True)
