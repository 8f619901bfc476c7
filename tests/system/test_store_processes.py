"""Many processes at one activation store, which are killed, stopped and late."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from system.store_worker import RECORDS, build, evict, open_shelf, open_store, right, use

from lit_transfer.activations.lease import standing
from lit_transfer.activations.shelf import Shelf

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lit_transfer.activations.store"])  # all that takes time to import
TIMEOUT_S = 1.0


@pytest.fixture
def started() -> Iterator[list[BaseProcess]]:
    """Processes of the test; none outlives it."""
    running: list[BaseProcess] = []
    yield running
    for process in running:
        process.kill()
        process.join()


def builder(
    started: list[BaseProcess], folder: Path, *, compute_s: float, write_s: float = 0.0, first: int | None = None
) -> BaseProcess:
    settings = (folder, TIMEOUT_S, compute_s, write_s, len(started), first)
    process = SERVER.Process(target=build, args=settings)
    started.append(process)
    process.start()
    return process


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def finished(process: BaseProcess) -> None:
    process.join(60)
    assert process.exitcode == 0


def assert_right(shelf: Shelf) -> None:
    """All records, and nothing else but `shelf.json` and the log."""
    assert torch.equal(shelf.load(), right())
    assert [part for part in range(shelf.parts) if shelf.verify(part)] == []
    assert len([*shelf.folder.iterdir()]) == shelf.parts + 2, sorted(p.name for p in shelf.folder.iterdir())


def test_while_nobody_dies_each_part_is_built_once(tmp_path: Path, started: list[BaseProcess]) -> None:
    for process in [builder(started, tmp_path, compute_s=0.02) for _ in range(4)]:
        finished(process)
    shelf = open_shelf(open_store(tmp_path, TIMEOUT_S))
    assert_right(shelf)
    counts = shelf.counts()
    assert (counts["built"], counts["wasted"], counts["corrupted"]) == (shelf.parts, 0, 0)
    assert counts["built_records"] == RECORDS


def test_builders_killed_at_any_moment(tmp_path: Path, started: list[BaseProcess]) -> None:
    numbers = random.Random(5)
    running = [builder(started, tmp_path, compute_s=0.3, write_s=0.3) for _ in range(3)]
    shelf = open_shelf(open_store(tmp_path, TIMEOUT_S))
    unfinished = 0
    while len(started) < 15:
        time.sleep(numbers.uniform(0.05, 0.3))
        victim = running.pop(numbers.randrange(len(running)))
        victim.kill()
        victim.join()
        unfinished = max(unfinished, len([*shelf.folder.glob(".part-*")]))
        running.append(builder(started, tmp_path, compute_s=0.3, write_s=0.3))
    assert shelf.missing() and unfinished, "they were killed in the middle of it"
    for process in running:
        finished(process)
    with shelf.in_use():
        pass
    assert_right(shelf)
    assert shelf.counts()["wasted"] == 0, "on this host it is seen who is dead"


@pytest.mark.parametrize(("compute_s", "write_s", "sign"), [(4, 0, "part-00002.lease"), (0, 4, ".part-00002.*")])
def test_a_stopped_builder_that_wakes_up_late_does_no_harm(
    tmp_path: Path, started: list[BaseProcess], compute_s: float, write_s: float, sign: str
) -> None:
    late = builder(started, tmp_path, compute_s=compute_s, write_s=write_s, first=2)
    shelf = open_shelf(open_store(tmp_path, TIMEOUT_S))
    until(lambda: [*shelf.folder.glob(sign)])
    time.sleep(0.5)  # it is in the middle of it
    assert late.pid is not None
    os.kill(late.pid, signal.SIGSTOP)
    assert standing(shelf.folder / "part-00002.lease", TIMEOUT_S) == "live"
    finished(builder(started, tmp_path, compute_s=0.01))
    built = (shelf.folder / "part-00002.safetensors").stat()
    os.kill(late.pid, signal.SIGCONT)
    finished(late)
    assert os.path.samestat(built, (shelf.folder / "part-00002.safetensors").stat())
    with shelf.in_use():
        pass
    assert_right(shelf)
    assert (shelf.counts()["built"], shelf.counts()["wasted"]) == (shelf.parts, 1)


def test_what_is_used_is_never_evicted(tmp_path: Path) -> None:
    with ProcessPoolExecutor(5, mp_context=SERVER) as pool:
        users = [pool.submit(use, tmp_path, 4, seed) for seed in range(3)]
        evictors = [pool.submit(evict, tmp_path, 4) for _ in range(2)]
        for user in users:
            user.result()
        assert sum(evictor.result() for evictor in evictors) > 20
    assert len(open_store(tmp_path, 60).prune(unused_s=0)) <= 4
    assert [*tmp_path.iterdir()] == []
