"""A store of bounded size: what is found, what makes room, what stays."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shelves import STORE_BYTES as SIZE
from shelves import contents, cuts, filled, open_shelf

from lit_transfer.activations import lease, store
from lit_transfer.activations.contents import Contents
from lit_transfer.activations.lease import Holder
from lit_transfer.activations.sharing import ABOUT
from lit_transfer.activations.shelf import Shelf
from lit_transfer.activations.store import ActivationStore, default_folder
from lit_transfer.errors import UserError

TIMEOUT_S = 0.5


@pytest.fixture
def kept(tmp_path: Path) -> ActivationStore:
    return ActivationStore(tmp_path / "store", limit_bytes=10**9, timeout_s=TIMEOUT_S)


def foreign_lease(shelf: Shelf, name: str) -> None:
    (shelf.folder / name).write_text(json.dumps(asdict(Holder("far", "another", 1, "1", "x"))))


def test_to_look_makes_nothing(kept: ActivationStore) -> None:
    looked_at = kept.shelf(contents("a"))
    assert looked_at.missing() == [0, 1] and kept.shelves() == [] and kept.strays() == []
    assert not kept.folder.exists()
    assert filled(kept, "a") == looked_at and looked_at.missing() == [] and kept.shelves() == [looked_at]


def test_a_shelf_that_says_it_is_another(kept: ActivationStore) -> None:
    made = filled(kept, "a")
    text = (made.folder / ABOUT).read_text()
    (made.folder / ABOUT).write_text(text.replace('"a"', '"b"'))
    with pytest.raises(UserError, match="is not what the name of its folder stands for"):
        kept.shelf(contents("a"))
    assert kept.shelves() == [] and kept.strays() == [made.folder]


def test_a_stray_is_evicted_as_all_else_is(kept: ActivationStore) -> None:
    """It takes room, and who uses it keeps it."""
    strays = [filled(kept, name, used_s=100.0 * age) for age, name in enumerate("abc")]
    filled(kept, "d")
    with strays[0].in_use():
        for stray in strays:
            (stray.folder / ABOUT).write_text("{}")
            os.utime(stray.folder / ABOUT, (1, 1))
        assert not kept.remove_stray(strays[0].folder) and len(kept.strays()) == 3
        assert kept.remove_stray(strays[1].folder) and len(kept.strays()) == 2
        just = ActivationStore(kept.folder, limit_bytes=store.folder_bytes(kept.folder))
        assert just.room_bytes() == store.folder_bytes(strays[2].folder) + store.folder_bytes(kept.shelves()[0].folder)
        assert just.make_room(SIZE) and kept.strays() == [strays[0].folder] and cuts(kept) == ["d"]
    os.utime(strays[0].folder / ABOUT, (1, 1))
    assert [key for key, _ in kept.prune(unused_s=1000)] == [strays[0].key] and cuts(kept) == ["d"]


def test_a_shelf_that_is_made_during_a_look_is_no_stray(kept: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(kept, "a")
    real = store.read_contents

    def read(folder: Path) -> Contents | None:
        monkeypatch.setattr(store, "read_contents", real)
        filled(kept, "b")
        return real(folder)

    monkeypatch.setattr(store, "read_contents", read)
    assert kept.strays() == []


def test_what_another_user_keeps_for_himself_is_left_alone(
    kept: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, real = filled(kept, "a"), Path.read_text
    filled(kept, "b")

    def read_text(path: Path, *settings: Any, **more: Any) -> str:
        if path.parent == private.folder:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *settings, **more)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert cuts(kept) == ["b"] and kept.strays() == []
    assert kept.make_room(1) and not ActivationStore(kept.folder, limit_bytes=0).make_room(1)
    assert len(kept.prune(unused_s=0)) == 1 and private.missing() == []


def test_a_maker_that_died_is_helped_out(kept: ActivationStore) -> None:
    made = open_shelf(kept, "a")
    (made.folder / ABOUT).unlink()
    assert kept.shelves() == [] and kept.strays() == [made.folder]
    assert open_shelf(kept, "a") == made and kept.shelves() == [made] and kept.strays() == []


def test_room_is_made_by_what_was_used_longest_ago(tmp_path: Path) -> None:
    kept = ActivationStore(tmp_path, limit_bytes=10**9)
    for age, name in enumerate("cab"):
        filled(kept, name, used_s=1000.0 + age)
    assert cuts(kept) == ["c", "a", "b"]
    held = store.folder_bytes(tmp_path)
    for room, expected in [(held + 5 * SIZE, "cab"), (held, "cab"), (held - 1, "ab"), (held - 2 * held // 3, "b")]:
        assert ActivationStore(tmp_path, limit_bytes=room).make_room(0)
        assert cuts(kept) == [*expected]
    with open_shelf(kept, "b").in_use():
        pass
    assert open_shelf(kept, "b").shared.last_used_s() > time.time() - 100


def test_nothing_is_evicted_in_vain(tmp_path: Path) -> None:
    kept = ActivationStore(tmp_path, limit_bytes=10**9)
    for name in "ab":
        filled(kept, name)
    small = ActivationStore(tmp_path, limit_bytes=SIZE)
    assert not small.make_room(SIZE + 1) and len(cuts(kept)) == 2
    assert small.make_room(SIZE) and cuts(kept) == []


def test_what_is_used_or_built_or_wanted_stays(tmp_path: Path) -> None:
    kept = ActivationStore(tmp_path, limit_bytes=10**9)
    used, built, wanted, idle = (filled(kept, name) for name in ("used", "built", "wanted", "idle"))
    (built.folder / "part-00001.safetensors").unlink()
    claim = built.claim(1)
    assert claim is not None
    with used.in_use(), claim:
        small = ActivationStore(tmp_path, limit_bytes=0)
        assert not small.make_room(0, [wanted]) and len(cuts(kept)) == 4
        just = ActivationStore(tmp_path, limit_bytes=store.folder_bytes(tmp_path) + built.missing_records() * 32)
        assert just.make_room(idle.shared.stored_bytes(), [wanted])
        assert sorted(cuts(kept)) == ["built", "used", "wanted"]
        assert [key for key, _ in kept.prune(unused_s=0)] == [wanted.key]
    assert len(kept.prune(unused_s=0)) == 2 and cuts(kept) == []


def test_a_full_disk_needs_room_too(kept: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(kept, "a", used_s=1.0)
    filled(kept, "b", used_s=2.0)
    blocks = 2 + store.RESERVE_BYTES // 50
    monkeypatch.setattr(store.os, "statvfs", lambda _: SimpleNamespace(f_bavail=blocks, f_frsize=50))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lease.os, "write", full)
    assert kept.free_bytes() == 100
    assert kept.make_room(SIZE) and cuts(kept) == ["b"]


def test_a_shelf_that_is_not_ours_to_remove_stays(kept: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(kept, "a")
    for number in (errno.EACCES, errno.ENOSPC):

        def refused(*_: object, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(lease.os, "open", refused)
            assert kept.prune(unused_s=0) == [] and not ActivationStore(kept.folder, limit_bytes=0).make_room(1)
    assert cuts(kept) == ["a"]


def test_what_others_still_add_is_promised(kept: ActivationStore) -> None:
    half = open_shelf(kept, "half")
    before = kept.free_bytes()
    with half.in_use():
        assert before - half.full_bytes - 1000 < kept.free_bytes() <= before - half.full_bytes + 1000
        assert before - 1000 < kept.free_bytes([half]) <= before
    assert kept.free_bytes() == before


def test_a_store_that_is_not_there_has_room(kept: ActivationStore) -> None:
    assert kept.make_room(10) and kept.prune(unused_s=0) == []
    assert not ActivationStore(kept.folder, limit_bytes=9).make_room(10)
    assert not kept.folder.exists()


def test_another_hosts_use_is_watched_before_it_counts_as_over(kept: ActivationStore) -> None:
    made = filled(kept, "a")
    foreign_lease(made, "user-x.lease")
    assert made.shared.is_in_use()
    start = time.monotonic()
    assert [key for key, _ in kept.prune(unused_s=0)] == [made.key]
    assert time.monotonic() - start >= TIMEOUT_S
    foreign_lease(filled(kept, "b"), "user-y.lease")
    assert ActivationStore(kept.folder, SIZE, timeout_s=TIMEOUT_S).make_room(SIZE) and cuts(kept) == []


def test_another_hosts_use_that_goes_on_is_respected(kept: ActivationStore) -> None:
    made = filled(kept, "a")
    foreign_lease(made, "user-x.lease")
    over = threading.Event()

    def touch() -> None:
        while not over.wait(TIMEOUT_S / 10):
            os.utime(made.folder / "user-x.lease")

    thread = threading.Thread(target=touch)
    thread.start()
    start = time.monotonic()
    assert kept.prune(unused_s=0) == [] and not ActivationStore(kept.folder, 0, timeout_s=TIMEOUT_S).make_room(1)
    assert time.monotonic() - start < 2 * TIMEOUT_S
    over.set()
    thread.join()


def test_what_a_dead_evictor_left_is_in_nobodys_way(kept: ActivationStore) -> None:
    made = filled(kept, "a")
    (kept.folder / ".evicted-0123").mkdir()
    (kept.folder / ".evicted-0123" / "part-00000.safetensors").touch()
    dead = Holder("here", lease._system(), os.getpid(), "1", "x")
    (made.folder / "eviction.lease").write_text(json.dumps(asdict(dead)))
    with made.in_use():
        assert kept.prune(unused_s=0) == []
    assert len(kept.prune(unused_s=0)) == 1 and [*kept.folder.iterdir()] == []


def test_who_comes_while_it_is_evicted_waits_and_gets_a_new_one(kept: ActivationStore) -> None:
    made = filled(kept, "a")
    eviction = lease.acquire(made.folder / "eviction.lease")
    assert eviction is not None
    seen: list[list[int]] = []

    def use() -> None:
        with made.in_use():
            seen.append(made.missing())

    thread = threading.Thread(target=use)
    thread.start()
    time.sleep(0.3)
    assert seen == [], "it waits"
    made.folder.rename(kept.folder / ".evicted-x")
    eviction.release()
    thread.join()
    assert seen == [[0, 1]] and kept.shelves() == [made]


def test_who_comes_as_the_folder_goes_does_not_rely_on_its_lease(
    kept: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The eviction began after the lease was taken, and nothing of it can be seen where the folder was."""
    made, real = filled(kept, "a"), lease.acquire

    def acquire(path: Path, **settings: Any) -> lease.Lease | None:
        found = real(path, **settings)
        if path.name.startswith("user-") and not (kept.folder / ".evicted-x").exists():
            made.folder.rename(kept.folder / ".evicted-x")
            made.shared.make()
        return found

    monkeypatch.setattr(lease, "acquire", acquire)
    with made.in_use():
        assert made.missing() == [0, 1] and made.shared.is_in_use()


@pytest.mark.parametrize(
    ("asked", "left"),
    [({"unused_s": 50_000.0}, "b"), ({"unused_s": 200_000.0}, "ab"), ({"limit_bytes": 3 * SIZE // 2}, "b")],
    ids=str,
)
def test_prune(kept: ActivationStore, asked: dict[str, Any], left: str) -> None:
    first = filled(kept, "a", used_s=time.time() - 100_000)
    filled(kept, "b")
    removed = kept.prune(**asked)
    assert cuts(kept) == [*left]
    assert [key for key, _ in removed] == ([] if "a" in left else [first.key])
    assert all(SIZE < size < 2 * SIZE for _, size in removed)


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_folder() == Path("/cache/lit_transfer/activations")
