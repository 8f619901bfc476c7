"""A folder that others evict is made again; one that cannot be made is an error, not a wait."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lit_transfer.activations.sharing import ABOUT, SharedFolder

TIMEOUT_S = 0.5


def test_a_folder_that_is_evicted_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mkdir finds it there, and then does not find a folder: the error says that it exists."""
    folder = SharedFolder(tmp_path / "store" / "shelf", {}, group_writable=False, timeout_s=TIMEOUT_S)
    mkdir, evicted = os.mkdir, []

    def racing(path: Path, mode: int = 0o777) -> None:
        if Path(path) == folder.path and not evicted:
            evicted.append(path)
            raise FileExistsError(path)
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", racing)
    folder.make()
    assert evicted and (folder.path / ABOUT).is_file()


@pytest.mark.parametrize("name", ["file", "link", "pipe"])
@pytest.mark.parametrize("below", ["", "shelf", "store/shelf"])
def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path, name: str, below: str) -> None:
    """Something else is there, such as a link to nowhere: it does not go away by waiting."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    folder = SharedFolder(tmp_path / name / below, {}, group_writable=False, timeout_s=TIMEOUT_S)
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        folder.hold("user-x")


def test_a_folder_that_never_stays_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems say of what they do not allow that it is not there."""

    def refused(path: Path, mode: int = 0o777) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(FileNotFoundError):
        SharedFolder(tmp_path / "shelf", {}, group_writable=False, timeout_s=TIMEOUT_S).hold("user-x")
