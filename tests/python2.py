"""Files of arrays such as NumPy pickled them under Python 2."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

HEADER = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes what NumPy wrote under Python 2: protocol 2, texts and the bytes of arrays as `str`."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_python2_str(self, value: str | bytes) -> None:
        data = value.encode("latin-1") if isinstance(value, str) else value
        self.write(b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data)))
        self.write(data)
        self.memoize(value)

    def save_global(self, value: Any, name: str | None = None) -> None:
        if getattr(value, "__name__", "") == "_reconstruct":
            self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
            self.memoize(value)
        else:
            super().save_global(value, name)

    dispatch[str] = dispatch[bytes] = save_python2_str


def npy(path: Path, pickled_object: bytes, header: bytes = HEADER) -> Path:
    """A .npy file of version 1.0."""
    padded = header.ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + pickled_object)
    return path


def save_python2(path: Path, layers: object) -> Path:
    wrapped = np.empty((), dtype=object)
    wrapped[()] = layers
    with npy(path, b"").open("ab") as file:
        Python2Pickler(file, protocol=2, fix_imports=False).dump(wrapped)
    return path
