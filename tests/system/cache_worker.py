"""What the processes of test_shared_cache.py do; apart from it, since it imports much."""

from __future__ import annotations

import hashlib
import pickle
import warnings

from lit_transfer.data.cache import ShardCache


def read_hash(store: ShardCache, address: str, sha256: str, size: int) -> str | None:
    """The sha256 of what the cache gives; None where it has no room."""
    with warnings.catch_warnings(action="ignore"):
        file = store.open(address, sha256=sha256, bytes=size)
    return None if file is None else hashlib.sha256(file.read(0, size)).hexdigest()


def read_rows(reader: bytes, rows: int) -> list[bytes]:
    """The samples that a pickled reader gives."""
    unpickled = pickle.loads(reader)
    return [unpickled.read(row) for row in range(rows)]
