"""Who may write what lies in a store."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def grant(path: Path, group_writable: bool) -> None:
    """Let the group write a file or folder, whatever the umask; another user's is left as its maker granted it."""
    if group_writable:
        with suppress(PermissionError):
            path.chmod(0o2775 if path.is_dir() else 0o664)


def make_folder(path: Path, group_writable: bool) -> None:
    """A folder and those above it that are missing, each granted."""
    if not path.is_dir():
        make_folder(path.parent, group_writable)
        path.mkdir(exist_ok=True)
        grant(path, group_writable)
