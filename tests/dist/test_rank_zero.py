"""What rank 0 does alone: the others wait longer than a collective may take, and meet its faults."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from digits import digits
from ranks import Left, start, write_config
from torch.multiprocessing.spawn import spawn

from lit_transfer.errors import UserError
from lit_transfer.phases import rank_zero
from lit_transfer.phases.rank_zero import FAILED, from_rank_0

PATIENCE_S = 2.0


def slow() -> int:
    assert dist.get_rank() == 0
    time.sleep(2 * PATIENCE_S)
    return 7


def refused() -> int:
    raise UserError("no room; make some.")


def broken() -> int:
    raise ZeroDivisionError


def came_of(work: Any) -> str:
    try:
        return str(from_rank_0(work))
    except (UserError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"


def on_a_rank(rank: int, folder: Path) -> None:
    rank_zero.BEAT_S = PATIENCE_S / 10
    rule = {"init_method": f"file://{folder}/meet", "timeout": timedelta(seconds=PATIENCE_S)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **rule)
    torch.save([came_of(work) for work in (slow, refused, broken)], folder / f"left-{rank}.pt")
    dist.destroy_process_group()


def test_ranks_wait_for_as_long_as_it_takes_and_end_alike(tmp_path: Path) -> None:
    spawn(on_a_rank, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"left-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == ["7", "UserError: no room; make some.", "ZeroDivisionError: "]
    assert second == [*first[:2], f"UserError: {FAILED}"]


def test_a_head_start_that_fails_ends_all_ranks_with_its_sentence(tmp_path: Path) -> None:
    """The features have no room, which only rank 0 sees."""
    file = write_config(
        tmp_path,
        "lp_ft",
        digits(tmp_path / "digits").path,
        2,
        [{"name": "head", "max_epochs": 1, "lr": 0.01, "global_batch": 6}],
        model={"head": {"init": "logistic_regression"}},
        activations={"store": "require", "views": 1, "limit_gb": 1e-6, "folder": str(tmp_path / "store")},
    )
    assert start([file], timeout_s=60).returncode != 0
    said = [(Left(file.with_suffix("")).folder / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and said[0].startswith(f"features cannot be stored in {tmp_path / 'store'} (")
    assert said[0].endswith("; make room, name another activations.folder, or use auto.")
