"""What the processes of test_store_processes.py do; apart from it, so that a server of processes can load it once."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from lit_transfer.activations import part as part_file
from lit_transfer.activations.contents import Contents
from lit_transfer.activations.shelf import ROWS_PER_PART, Shelf
from lit_transfer.activations.store import ActivationStore

RECORDS = 11 * ROWS_PER_PART + 40
WIDTH = 8


def open_store(folder: Path, timeout_s: float) -> ActivationStore:
    """A store with room for all."""
    return ActivationStore(folder, limit_bytes=10**9, timeout_s=timeout_s)


def open_shelf(store: ActivationStore, name: str = "one", records: int = RECORDS) -> Shelf:
    """Made if it is not there."""
    shelf = store.shelf(Contents({"name": name}, records, (WIDTH,), torch.float32))
    shelf.shared.make()
    return shelf


def right() -> Tensor:
    """What every shelf holds."""
    return torch.arange(RECORDS * WIDTH, dtype=torch.float32).view(RECORDS, WIDTH)


def fill(shelf: Shelf, compute_s: float, seed: int, first: int | None = None) -> None:
    """Build until all is there, parts in an order of one's own."""
    numbers, expected = random.Random(seed), right()[: shelf.records]
    while missing := shelf.missing():
        for part in sorted(missing, key=lambda part: (part != first, numbers.random())):
            claim = shelf.claim(part)
            if claim is not None:
                with claim:
                    time.sleep(compute_s * numbers.uniform(0.5, 1.5))
                    shelf.write(part, expected[part * ROWS_PER_PART : (part + 1) * ROWS_PER_PART], {})
        time.sleep(0.01)


def build(folder: Path, timeout_s: float, compute_s: float, write_s: float, seed: int, first: int | None) -> None:
    """A run that fills a shelf; each file is unfinished for `write_s`."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(write_s)
        real(descriptor)

    part_file.os.fsync = fsync  # type: ignore[attr-defined]
    shelf = open_shelf(open_store(folder, timeout_s))
    with shelf.in_use():
        fill(shelf, compute_s, seed, first)


def use(folder: Path, seconds: float, seed: int) -> None:
    """Runs, one after another, that use shelves which others evict in between: while they do, all must be there."""
    store, numbers, expected = open_store(folder, 60), random.Random(seed), right()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        shelf = open_shelf(store, numbers.choice("abcd"), records=300)
        with shelf.in_use():
            folder_before = shelf.folder.stat()
            fill(shelf, 0, seed)
            for _ in range(numbers.randrange(4)):
                assert shelf.missing() == []
                assert torch.equal(shelf.load(), expected[:300])
            assert os.path.samestat(folder_before, shelf.folder.stat())
        time.sleep(numbers.uniform(0, 0.02))


def evict(folder: Path, seconds: float) -> int:
    """Take away all that nobody uses, again and again; returns how often there was something."""
    store = open_store(folder, 60)
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        count += len(store.prune(unused_s=0))
    return count
