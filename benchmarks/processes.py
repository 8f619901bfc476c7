"""Trainings in processes of their own, some at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def threads_each(jobs: int) -> int:
    """Threads that each of some processes has, where they share those of this one."""
    return max(1, torch.get_num_threads() // jobs)


def at_a_time(jobs: int, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """What `work` returns for each item, in their order; every call is made in a fresh process.

    After an error no further item is begun.

    Args:
        jobs: processes that run at once; they share the threads of this one.
        work: a function of a module, and of what can be pickled.
        items: its arguments.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads_each(jobs))  # a process reads it as it starts, and so do its own
    with ThreadPoolExecutor(jobs) as threads:
        yield from threads.map(partial(_in_process, work), items)


def _in_process(work: Callable[[Item], Result], item: Item) -> Result:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, item).result()
