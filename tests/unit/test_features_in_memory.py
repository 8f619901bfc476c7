"""Where stored features are held for the plain loop, and what a phase does where they fit nowhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import PREPROCESSING, digits
from shelves import fill, new_shelf, values
from stored_runs import EXACT, HEAD, assert_same, configured, ran

from lit_transfer.activations.data import StoredStream
from lit_transfer.activations.views import plain_views
from lit_transfer.config import Stream
from lit_transfer.data.streams import open_stream
from lit_transfer.errors import UserError
from lit_transfer.phases import features as features_module
from lit_transfer.phases.features import MEMORY_SHARE, in_memory

CPU, DEVICE = torch.device("cpu"), torch.device("meta")
"""A device that has shapes alone stands for a GPU."""


def free(monkeypatch: pytest.MonkeyPatch, *, cpu: float, device: float) -> None:
    by_place = {CPU: cpu / MEMORY_SHARE, DEVICE: device / MEMORY_SHARE}
    monkeypatch.setattr(features_module, "free_bytes", lambda place: by_place[place])


def test_features_lie_on_the_device_else_on_the_cpu_else_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = digits(tmp_path / "digits")
    samples = open_stream(Stream(manifest=str(manifest.path), split="train"), None, seed=0)
    shelf = fill(new_shelf(tmp_path / "shelf", records=len(samples.rows), dtype=torch.float16))
    needed = shelf.full_bytes
    streams = {"train": StoredStream(samples, plain_views(PREPROCESSING), (shelf,))}
    rows = samples.rows[[3, 1, 7]]
    for on_device, kept_on in ((needed, DEVICE), (needed - 1, CPU)):
        free(monkeypatch, cpu=needed, device=on_device)
        found = in_memory(streams, DEVICE)
        assert found is not None
        held = found["train"]
        got = held.gather(rows, np.zeros(3, np.int64))
        assert (held.device, held.views[0].device) == (DEVICE, kept_on)
        assert (got.device, got.dtype, got.shape) == (DEVICE, torch.float32, (3, 3))
        two = replace(held, views=(held.views[0], held.views[0]))
        assert two.gather(rows, np.array([0, 1, 0])).device == DEVICE
    on_cpu = replace(held, device=CPU).gather(rows, np.zeros(3, np.int64))
    assert torch.equal(on_cpu, values(shelf)[[3, 1, 7]].float())
    free(monkeypatch, cpu=needed - 1, device=needed - 1)
    assert in_memory(streams, DEVICE) is None


def test_where_they_fit_nowhere_a_head_trains_the_same_by_a_trainer_and_many_heads_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = digits(tmp_path / "digits", count=128)
    held = ran(configured(manifest, tmp_path, "held", [HEAD], EXACT))
    monkeypatch.setattr(features_module, "MEMORY_SHARE", 0.0)
    trained = []
    monkeypatch.setattr("lit_transfer.phases.run.train_heads", lambda *_: trained.append(1))
    assert_same(ran(configured(manifest, tmp_path, "streamed", [HEAD], EXACT)), held)
    assert not trained
    many = {**HEAD, "lr": None, "heads": {"lr": [0.1, 0.01]}}
    with pytest.raises(UserError, match=r"phase 'head': heads trains on .* \(they do not fit into memory\); set"):
        ran(configured(manifest, tmp_path, "many", [many], EXACT))
