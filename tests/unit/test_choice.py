"""What a picture takes to be loaded, as a choice between storing and computing counts it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_transfer.phases import choice


class Clock:
    """Moves on by what reading takes."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("device", "workers", "cores", "expected_s"),
    [
        ("cpu", 0, 8, 8.0),
        ("cpu", 4, 8, 2.0),
        ("cpu", 4, 2, 4.0),
        ("cuda", 0, 8, 8.0),  # the process reads, then computes
        ("cuda", 4, 8, 2.0 - 1.5),
        ("cuda", 8, 8, 0.0),
    ],
)
def test_loading_counts_where_nothing_is_computed_meanwhile(
    monkeypatch: pytest.MonkeyPatch, device: str, workers: int, cores: int, expected_s: float
) -> None:
    clock = Clock()

    class Dataset:
        def __init__(self, *_: object) -> None:
            pass

        def __getitem__(self, batch: choice.Batch) -> None:
            clock.now_s += 8.0 * len(batch.rows)

    monkeypatch.setattr(choice, "time", clock)
    monkeypatch.setattr(choice, "SampleDataset", Dataset)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    job = SimpleNamespace(
        streams={"train": SimpleNamespace(rows=np.arange(40))},
        preprocessing=None,
        config=SimpleNamespace(data=SimpleNamespace(workers=workers)),
    )
    library = SimpleNamespace(device=torch.device(device))
    assert choice._load_s(job, library, 1.5) == pytest.approx(expected_s)  # type: ignore[arg-type]


def test_a_system_without_affinities_tells_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert choice._cores() == 6
