"""The bytes of a sample: read by offset from local shards, cached ones or their address, and checked."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from typing import Any

from lit_transfer.data import reach
from lit_transfer.data.cache import OpenFile, WrongContent
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.quarantine import DamagedSample

OPEN_SHARDS = 64
"""Shards that a reader holds open, those used last; a cached shard that is open is not evicted."""


class ShardReader:
    """Reads the image bytes of single samples. Safe to hand to a worker, started in whichever way.

    Args:
        manifest: what is where; its cache holds remote shards, without one each sample is read from its address.
    """

    def __init__(self, manifest: Manifest) -> None:
        table = manifest.table
        self._manifest = manifest
        self._cache = manifest.cache
        self._shard = table["shard"].to_numpy()
        self._offset = table["offset"].to_numpy()
        self._size = table["size"].to_numpy()
        self._hash = table["hash"]
        self._open: OrderedDict[int, OpenFile | None] = OrderedDict()

    def read(self, row: int) -> bytes:
        """The image member of a manifest row, as packed.

        What is wrong is read once more, from a file that is opened or fetched anew.

        Raises:
            DamagedSample: the bytes are not those that were packed.
            UserError: they cannot be reached.
        """
        shard, start, size = int(self._shard[row]), int(self._offset[row]), int(self._size[row])
        for _ in range(2):
            data = self._read(shard, start, start + size)
            if hashlib.sha256(data).digest() == self._hash[row].as_py():
                return data
            self._discard(shard)
        reason = f"its {size} bytes (row {row}) are not those that were packed"
        raise DamagedSample(reach.shown(self._manifest.shard_address(shard)), start, reason)

    def place(self, row: int) -> tuple[str, int]:
        """The address of a row's shard, fit to be shown, and the offset of its image there."""
        return reach.shown(self._manifest.shard_address(int(self._shard[row]))), int(self._offset[row])

    def _read(self, shard: int, start: int, stop: int) -> bytes:
        file = self._opened(shard)
        if file is not None:
            return file.read(start, stop)
        timeout_s = self._cache.timeout_s if self._cache else reach.TIMEOUT_S
        return reach.read(self._manifest.shard_address(shard), start, stop, timeout_s=timeout_s)

    def _opened(self, shard: int) -> OpenFile | None:
        """The shard as a file; None where it is read from its address."""
        if shard not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[shard] = self._find(shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _find(self, shard: int) -> OpenFile | None:
        address, packed = self._manifest.shard_address(shard), self._manifest.shards[shard]
        if not reach.is_remote(address):
            path = reach.local_path(address)
            return OpenFile(path, os.open(path, os.O_RDONLY))
        try:
            return self._cache.open(address, sha256=packed.sha256, bytes=packed.bytes) if self._cache else None
        except WrongContent:  # its sound samples can still be read, by range: the hash of each decides
            return None

    def _discard(self, shard: int) -> None:
        file = self._open[shard]
        if file is None:  # read by range: to open it again would download all of it again
            return
        del self._open[shard]
        if self._cache and reach.is_remote(self._manifest.shard_address(shard)):
            self._cache.discard(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self._manifest,)  # a worker maps the manifest, and opens its own files
