"""Work that rank 0 does alone, for longer than the others may wait for it in silence."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lit_transfer.errors import UserError

BEAT_S = 60.0
"""Between signs of life to the ranks that wait; a process group gives up after minutes without one."""

FAILED = "rank 0 met an error; its own message says which."
Result = TypeVar("Result")


def told(word: Any) -> Any:
    """The word of rank 0, on every rank."""
    words = [word]
    dist.broadcast_object_list(words, src=0)
    return words[0]


def from_rank_0(work: Callable[[], Result]) -> Result:
    """What a function gives on rank 0, which calls it alone, on every rank; the others wait as long as that takes.

    Raises:
        UserError: what rank 0 has raised, on every rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    if dist.get_rank() > 0:
        while (ended := told(None)) == "works":
            pass
    else:
        ended = _worked(work)
    error, result = ended
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _worked(work: Callable[[], Result]) -> tuple[UserError | None, Result | None]:
    """Rank 0: do it, with signs of life to the others meanwhile, and tell them what came of it."""
    done = threading.Event()
    beats = threading.Thread(target=_beat_until, args=(done,))
    ended: tuple[UserError | None, Result | None] = UserError(FAILED), None
    beats.start()
    try:
        ended = None, work()
    except UserError as error:
        ended = error, None
    finally:
        done.set()
        beats.join()
        told(ended)
    return ended


def _beat_until(done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        told("works")
