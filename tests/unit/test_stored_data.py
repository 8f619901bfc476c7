"""Who reads stored activations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from digits import PREPROCESSING

from lit_transfer.activations.module import StoredData


@pytest.mark.parametrize(
    ("device", "stream", "workers"), [("cpu", "train", 0), ("cpu", "val", 3), ("cuda", "train", 3), ("cuda", "val", 3)]
)
def test_on_a_cpu_the_training_process_reads_what_is_stored(device: str, stream: str, workers: int) -> None:
    stored: Any = {"train": None}
    data = StoredData(stored, {}, PREPROCESSING, seed=0, global_batch=4, workers=3)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    data.trainer = trainer
    assert data._workers(stream) == workers
