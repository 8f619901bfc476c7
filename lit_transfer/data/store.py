"""The bytes of a shard: local files, read by offset and checked against the manifest."""

from __future__ import annotations

import hashlib
import os

from lit_transfer.data.manifest import Manifest
from lit_transfer.errors import UserError


class ShardReader:
    """Reads the image bytes of single samples. Opens each shard once a process; safe to hand to a worker."""

    def __init__(self, manifest: Manifest) -> None:
        table = manifest.table
        self._folder = manifest.path
        self._shards = [shard.name for shard in manifest.shards]
        self._shard = table["shard"].to_numpy()
        self._offset = table["offset"].to_numpy()
        self._size = table["size"].to_numpy()
        self._hash = table["hash"]
        self._open: dict[tuple[int, int], int] = {}

    def read(self, row: int) -> bytes:
        """The image member of a manifest row, as packed.

        Raises:
            UserError: the bytes are not those that were packed.
        """
        shard = int(self._shard[row])
        size, offset = int(self._size[row]), int(self._offset[row])
        data = os.pread(self._descriptor(shard), size, offset)
        if hashlib.sha256(data).digest() != self._hash[row].as_py():
            raise UserError(
                f"{self._folder / self._shards[shard]}: the {size} bytes at {offset} (row {row}) are not "
                "those that were packed; the shard was changed or damaged: run lit-transfer prepare again."
            )
        return data

    def _descriptor(self, shard: int) -> int:
        place = (os.getpid(), shard)  # a forked worker opens its own
        if place not in self._open:
            self._open[place] = os.open(self._folder / self._shards[shard], os.O_RDONLY)
        return self._open[place]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": {}}

    def __del__(self) -> None:
        for (pid, _), descriptor in self._open.items():
            if pid == os.getpid():
                os.close(descriptor)
