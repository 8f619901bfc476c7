"""A lease is held by one live process, and outlives none."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lit_transfer.activations import lease
from lit_transfer.activations.lease import Holder, Lease, acquire, settle, standing

TIMEOUT_S = 0.5
ACQUIRE_AND_HANG = """
import sys, time
from pathlib import Path
from lit_transfer.activations.lease import acquire
assert acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "part-00003.lease"


def take(path: Path) -> Lease:
    found = acquire(path, timeout_s=TIMEOUT_S)
    assert found is not None
    return found


def own() -> Holder:
    return Holder("here", lease._system(), os.getpid(), lease._started(os.getpid()), "token")


def leave(path: Path, holder: Holder) -> None:
    path.write_text(json.dumps(asdict(holder)))


def elsewhere(path: Path) -> None:
    """A lease of another host, whose process cannot be looked at."""
    leave(path, replace(own(), host="elsewhere", system="another"))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_holder_at_a_time(path: Path) -> None:
    with take(path):
        assert acquire(path, timeout_s=TIMEOUT_S) is None
        assert standing(path) == "live"
    assert not path.exists() and standing(path) == "dead"
    take(path).release()


def test_a_killed_process_is_dead_at_once_even_before_its_parent_looks(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ACQUIRE_AND_HANG, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert acquire(path) is None
        process.kill()
        until(lambda: standing(path) == "dead")  # a zombie: nobody has waited for it
        take(path).release()


def test_a_process_of_the_same_number_is_another_one(path: Path) -> None:
    leave(path, own())
    assert standing(path) == "live"
    leave(path, replace(own(), started="1"))
    take(path).release()


@pytest.mark.parametrize("age_s", [-1e6, 0, 1e6], ids=["slow clock", "same clock", "fast clock"])
def test_another_host_is_dead_once_it_was_watched_in_vain(path: Path, age_s: float) -> None:
    elsewhere(path)
    os.utime(path, (time.time() + age_s,) * 2)
    assert standing(path, TIMEOUT_S) == "unknown" and acquire(path, timeout_s=TIMEOUT_S) is None
    time.sleep(TIMEOUT_S / 2)
    assert standing(path, TIMEOUT_S) == "unknown"
    time.sleep(TIMEOUT_S / 2 + 0.05)
    take(path).release()


def test_another_host_that_touches_its_lease_lives(path: Path) -> None:
    elsewhere(path)
    standing(path, TIMEOUT_S)
    for second in range(4):
        time.sleep(TIMEOUT_S / 2)
        os.utime(path, (second, second))
        assert standing(path, TIMEOUT_S) == "live" and acquire(path, timeout_s=TIMEOUT_S) is None


def test_a_file_without_words_counts_by_its_touches(path: Path) -> None:
    """Its maker died between making and filling it."""
    path.touch()
    assert standing(path, TIMEOUT_S) == "unknown"
    time.sleep(TIMEOUT_S + 0.05)
    take(path).release()


def test_all_leases_are_touched_by_one_thread_that_ends_with_them(tmp_path: Path) -> None:
    leases = [take(tmp_path / f"{i}.lease") for i in range(3)]
    before = [one.path.stat().st_mtime_ns for one in leases]
    until(lambda: all(one.path.stat().st_mtime_ns > t for one, t in zip(leases, before, strict=True)))
    assert [thread.name for thread in threading.enumerate()].count("leases") == 1
    for one in leases:
        one.release()
        one.release()  # nothing more
    until(lambda: "leases" not in [thread.name for thread in threading.enumerate()])
    with take(tmp_path / "again.lease") as again:
        before_ns = again.path.stat().st_mtime_ns
        until(lambda: again.path.stat().st_mtime_ns > before_ns)


def test_one_of_many_takes_a_dead_lease(path: Path) -> None:
    for _ in range(20):
        leave(path, replace(own(), started="1"))
        found: list[Lease] = []
        ready = threading.Barrier(8)

        def try_it(found: list[Lease] = found, ready: threading.Barrier = ready) -> None:
            ready.wait()
            if mine := acquire(path):
                found.append(mine)

        threads = [threading.Thread(target=try_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len([one for one in found if one.is_held()]) == 1
        for one in found:
            one.release()
        assert not path.exists() or path.unlink() is None


def test_who_comes_late_puts_the_new_lease_back(path: Path) -> None:
    dead = replace(own(), started="1")
    with take(path) as mine:
        lease._remove(path, dead)
        assert mine.is_held()
    assert [*path.parent.iterdir()] == []


def test_release_leaves_the_lease_of_who_took_it_over(path: Path) -> None:
    mine = take(path)
    path.unlink()
    leave(path, own())
    assert not mine.is_held()
    mine.release()
    assert path.exists()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_process_has_no_part_in_it(path: Path) -> None:
    with take(path) as mine:
        child = os.fork()
        if child == 0:
            mine.release()  # as a `with` block that is left would do
            with take(path.with_name("child.lease")) as own_lease:
                before_ns = own_lease.path.stat().st_mtime_ns
                until(lambda: own_lease.path.stat().st_mtime_ns > before_ns)  # a thread of its own touches it
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert mine.is_held()
        before = path.stat().st_mtime_ns
        until(lambda: path.stat().st_mtime_ns > before)


def test_to_settle_is_to_wait_only_for_what_is_unknown(tmp_path: Path) -> None:
    with take(tmp_path / "own.lease") as mine:
        start = time.monotonic()
        settle([mine.path, tmp_path / "gone.lease"], TIMEOUT_S)
        assert time.monotonic() - start < TIMEOUT_S / 2
        elsewhere(tmp_path / "far.lease")
        settle([mine.path, tmp_path / "far.lease"], TIMEOUT_S)
        assert standing(tmp_path / "far.lease", TIMEOUT_S) == "dead" and standing(mine.path, TIMEOUT_S) == "live"


def test_a_full_disk_holds_an_empty_lease(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lease.os, "write", full)
    with take(path) as mine:
        assert mine.is_held() and path.stat().st_size == 0
        assert acquire(path, timeout_s=TIMEOUT_S) is None


def test_no_folder_is_no_lease(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        acquire(tmp_path / "nothing" / "a.lease")
