"""The cache on the local disk: whole files, in bounds, shared by processes and users."""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from system.servers import FaultServer

from lit_transfer.data import cache, transfer
from lit_transfer.data.cache import ShardCache
from lit_transfer.errors import UserError

SIZE = 200_000


def content(seed: int) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(SIZE)


FILES = {"train/000.tar": content(1), "val/000.tar": content(2), **{f"{i}.tar": content(10 + i) for i in range(6)}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.01)
    monkeypatch.setattr(cache, "_warned", set())
    with FaultServer(dict(FILES)) as running:
        yield running


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fetched(store: ShardCache, server: FaultServer, name: str) -> Path | None:
    return store.fetch(f"{server.url}/{name}", sha256=sha(FILES[name]), bytes=SIZE)


def whole(store: ShardCache, server: FaultServer, name: str) -> bytes:
    path = fetched(store, server, name)
    assert path is not None
    return path.read_bytes()


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_file_is_fetched_once_and_named_by_its_address(tmp_path: Path, server: FaultServer) -> None:
    store = ShardCache(tmp_path / "cache", 10 * SIZE)
    for _ in range(2):
        assert whole(store, server, "train/000.tar") == content(1)
        assert whole(store, server, "val/000.tar") == content(2)
    assert len(server.requests) == 2
    assert all(name.endswith("-000.tar") for name in files_of(store.folder))
    signed = f"{server.url}/val/000.tar?sig=1"
    assert store.fetch(signed, sha256=sha(content(2)), bytes=SIZE) is not None
    assert len(server.requests) == 2, "another signature is the same file"


def test_addresses_never_share_a_file(tmp_path: Path, server: FaultServer) -> None:
    store = ShardCache(tmp_path / "cache", 10 * SIZE)
    paths = [store.fetch(f"{server.url}/{name}", sha256=None, bytes=None) for name in ("train/000.tar", "val/000.tar")]
    assert [path and path.read_bytes() for path in paths] == [content(1), content(2)], (
        "both with one name, ETag, length"
    )


def test_another_content_of_an_address_is_another_file(tmp_path: Path, server: FaultServer) -> None:
    store = ShardCache(tmp_path, 10 * SIZE)
    old = fetched(store, server, "0.tar")
    server.files["0.tar"] = content(99)
    new = store.fetch(f"{server.url}/0.tar", sha256=sha(content(99)), bytes=SIZE)
    assert old is not None and new is not None and old != new
    assert new.read_bytes() == content(99)


def test_without_a_hash_the_server_is_asked_whether_it_is_the_same(tmp_path: Path, server: FaultServer) -> None:
    store, url = ShardCache(tmp_path, 10 * SIZE), f"{server.url}/0.tar"
    for _ in range(2):
        path = store.fetch(url, sha256=None, bytes=None)
        assert path is not None and path.read_bytes() == content(10)
    assert server.asked("0.tar") == ["bytes=0-0", None, "bytes=0-0"]
    server.order("0.tar", "changed", "changed")
    other = store.fetch(url, sha256=None, bytes=None)
    assert other != path
    with pytest.raises(UserError, match=f"has {SIZE} bytes, not 5"):
        store.fetch(url, sha256=None, bytes=5)


@pytest.mark.parametrize("fault", ["flip", "changed"])
def test_wrong_bytes_are_fetched_once_more_and_never_kept(tmp_path: Path, server: FaultServer, fault: str) -> None:
    store = ShardCache(tmp_path, 10 * SIZE)
    server.order("0.tar", *(["flip"] if fault == "flip" else ["cut", "changed"]))
    assert whole(store, server, "0.tar") == content(10)
    server.files["1.tar"] = content(77)
    with pytest.raises(UserError, match=r"has the sha256 \w+, not \w+ as in its manifest"):
        fetched(store, server, "1.tar")
    assert len(files_of(tmp_path)) == 1


def test_another_length_than_the_manifest_says(tmp_path: Path, server: FaultServer) -> None:
    server.files["0.tar"] = content(10)[:-5]
    with pytest.raises(UserError, match=rf"has {SIZE - 5} bytes, not {SIZE}"):
        fetched(ShardCache(tmp_path, 10 * SIZE), server, "0.tar")
    assert files_of(tmp_path) == []


def test_what_an_earlier_process_left_is_gone_on_from(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    store = ShardCache(tmp_path, 10 * SIZE)
    server.order("0.tar", "cut")
    with pytest.raises(UserError):
        fetched(store, server, "0.tar")
    (left,) = tmp_path.glob("*.partial")
    assert left.read_bytes() == content(10)[: SIZE // 2]
    assert whole(store, server, "0.tar") == content(10)
    assert server.asked("0.tar") == [None, f"bytes={SIZE // 2}-"]
    assert len(files_of(tmp_path)) == 1


def test_a_wrong_beginning_is_thrown_away(tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    store = ShardCache(tmp_path, 10 * SIZE)
    server.order("0.tar", "cut")
    with pytest.raises(UserError):
        fetched(store, server, "0.tar")
    next(tmp_path.glob("*.partial")).write_bytes(b"something else")
    assert whole(store, server, "0.tar") == content(10)


def test_a_poisoned_file_is_found_by_its_length_or_by_who_reads_it(tmp_path: Path, server: FaultServer) -> None:
    store = ShardCache(tmp_path, 10 * SIZE)
    path = fetched(store, server, "0.tar")
    assert path is not None
    path.write_bytes(b"short")
    assert whole(store, server, "0.tar") == content(10)
    wrong = store.open(f"{server.url}/0.tar", sha256=sha(content(10)), bytes=SIZE)
    also = store.open(f"{server.url}/0.tar", sha256=sha(content(10)), bytes=SIZE)
    assert wrong is not None and also is not None
    store.discard(wrong)
    assert not path.exists()
    assert whole(store, server, "0.tar") == content(10)
    store.discard(also)
    assert path.exists(), "the new file is not the one that was wrong"


def test_it_stays_in_bounds_and_evicts_what_was_used_longest_ago(tmp_path: Path, server: FaultServer) -> None:
    store = ShardCache(tmp_path, 3 * SIZE)
    paths = []
    for i in range(3):
        paths.append(fetched(store, server, f"{i}.tar"))
        os.utime(paths[-1], (i, i))  # type: ignore[arg-type]
    fetched(store, server, "0.tar")  # used again
    new = fetched(store, server, "3.tar")
    assert {path.name for path in (paths[0], paths[2], new)} == {*files_of(tmp_path)}  # type: ignore[union-attr]


def test_what_is_open_is_not_evicted(tmp_path: Path, server: FaultServer) -> None:
    store = ShardCache(tmp_path, 2 * SIZE)
    held = [store.open(f"{server.url}/{i}.tar", sha256=sha(FILES[f"{i}.tar"]), bytes=SIZE) for i in range(2)]
    with pytest.warns(UserWarning, match="are in use"):
        assert fetched(store, server, "2.tar") is None
    assert len(files_of(tmp_path)) == 2
    held.pop(0)
    gc.collect()
    assert fetched(store, server, "2.tar") is not None
    assert [file.read(0, SIZE) for file in held if file] == [content(11)]


def test_too_small_a_cache_is_read_through_with_one_warning(tmp_path: Path, server: FaultServer) -> None:
    store = ShardCache(tmp_path, SIZE - 1)
    with pytest.warns(UserWarning, match=r"shards are read through.*data\.cache\.limit_gb") as caught:
        assert fetched(store, server, "0.tar") is None
        assert fetched(store, server, "1.tar") is None
    assert len(caught) == 1
    assert files_of(tmp_path) == [] and server.requests == []


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_full_disk_is_read_through(
    tmp_path: Path, server: FaultServer, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if moment == "before":
        real = os.statvfs(tmp_path)
        monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*real[:4], 1, *real[5:])))
    else:
        monkeypatch.setattr(os, "pwrite", _no_space)
    with pytest.warns(UserWarning, match=r"above the|No space left"):
        assert fetched(ShardCache(tmp_path, 10 * SIZE), server, "0.tar") is None
    assert files_of(tmp_path) == []


def _no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_cannot_be_written_is_read_through(tmp_path: Path, server: FaultServer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="Not a directory"):
        assert fetched(ShardCache(tmp_path / "file" / "cache", 10 * SIZE), server, "0.tar") is None


def test_files_follow_the_umask_and_the_folder_keeps_its_group(tmp_path: Path, server: FaultServer) -> None:
    shared = tmp_path / "group"
    shared.mkdir()
    shared.chmod(0o2775)
    before = os.umask(0o002)
    try:
        path = fetched(ShardCache(shared / "cache", 10 * SIZE), server, "0.tar")
    finally:
        os.umask(before)
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o664
    assert stat.S_IMODE((path.parent / ".lock").stat().st_mode) == 0o664
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o2775


def test_what_another_process_has_just_finished_is_not_fetched_again(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ShardCache(tmp_path, 10 * SIZE)
    fetched(store, server, "0.tar")
    look, looks = ShardCache._ready, []

    def too_early(self: ShardCache, path: Path, size: int) -> cache.OpenFile | None:
        looks.append(path)
        return None if len(looks) == 1 else look(self, path, size)

    monkeypatch.setattr(ShardCache, "_ready", too_early)
    assert fetched(store, server, "0.tar") is not None
    assert len(server.requests) == 1 and len(looks) == 2


def test_a_file_evicted_at_the_moment_it_is_opened_is_fetched_again(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ShardCache(tmp_path, 10 * SIZE)
    path, lock = fetched(store, server, "0.tar"), fcntl.flock
    assert path is not None

    def evicted_before(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        path.unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", evicted_before)
    assert fetched(store, server, "0.tar") == path and path.exists()


def test_a_download_that_stands_still_is_not_waited_for(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ShardCache(tmp_path, 10 * SIZE, timeout_s=0.05)
    path = fetched(store, server, "0.tar")
    assert path is not None
    partial = path.with_name(f"{path.name}.{SIZE}.partial")
    path.rename(partial)
    with partial.open("r+b") as other:  # a process that was stopped, or hangs
        fcntl.flock(other, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.warns(UserWarning, match="has not moved"):
            assert fetched(store, server, "0.tar") is None
        assert time.monotonic() - began < transfer.longest_wait_s(0.05) + 1
