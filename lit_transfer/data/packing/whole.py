"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_transfer.errors import UserError


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` when the block succeeds, and is removed when it fails.

    The block flushes its files to the disk; `out` must be absent or empty.

    Raises:
        UserError: for an `OSError` in the block, such as a full disk.
    """
    folder = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        _sync(folder)
        folder.rename(out)
        _sync(out.parent)
    except OSError as error:
        raise _explained(error, out, folder) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _explained(error: OSError, out: Path, folder: Path) -> UserError:
    """What an operating-system error means to the user; removes the unfinished folder to see what is free."""
    held = sum(file.stat().st_size for file in folder.glob("*")) >> 20
    shutil.rmtree(folder, ignore_errors=True)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"packing to '{out}' failed and left nothing there: {error}.")
    free = shutil.disk_usage(out.parent).free >> 20
    return UserError(
        f"the disk of '{out}' is full: it needs more than {held} MiB, {free} MiB are free; free some space,"
        " choose another --out, or shrink the pictures with --short_side."
    )


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename never outlives what it renamed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
