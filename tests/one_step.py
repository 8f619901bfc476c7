"""A training module without a trainer, the batches it is given, and the gradient it leaves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.plan import PADDING
from lit_transfer.model.module import Batch, TransferModule
from lit_transfer.model.network import Network

PLAIN = Preprocessing(size=8, canvas=8, fit="crop", interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
CLASSES, ROWS = 3, 11


class Linear(nn.Module):
    """Stands for a network: one linear layer over the pixels."""

    norm = "pretrained"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, CLASSES)

    def forward(self, images: Tensor, start: int = 0) -> Tensor:
        return cast(Tensor, self.layer(images.flatten(1)))


def made(world_size: int = 1, **settings: Any) -> TransferModule:
    torch.manual_seed(0)
    module = TransferModule(cast(Network, Linear()), task="multiclass", preprocessing=PLAIN, **settings)
    data = SimpleNamespace(streams={name: SimpleNamespace(rows=range(ROWS)) for name in ("train", "val")})
    trainer = SimpleNamespace(world_size=world_size, global_step=0, global_rank=0, datamodule=data)
    module._trainer = cast(Any, trainer)
    return module


def batch_of(rows: np.ndarray[Any, Any], entries: int) -> Batch:
    """Rows of a dataset of noise whose label, weight and picture follow from the row; padded ones repeat the first."""
    valid = torch.from_numpy(rows != PADDING)
    real = np.where(rows == PADDING, rows[0] if rows[0] != PADDING else 0, rows)
    pictures = np.stack([np.random.default_rng(r).integers(0, 256, (3, 8, 8), dtype=np.uint8) for r in real])
    return {
        "image": torch.from_numpy(pictures),
        "target": torch.from_numpy(real % CLASSES),
        "weight": torch.from_numpy(1.0 + real % 2).float(),
        "row": torch.from_numpy(rows),
        "valid": valid,
        "entries": torch.tensor(entries),
        "damaged": [],
        "epoch": torch.tensor(0),
        "uniform": torch.full((len(rows), 16), 0.5),
    }


def whole() -> Batch:
    return batch_of(np.arange(ROWS), ROWS)


def gradient(module: TransferModule) -> Tensor:
    weight = module.get_parameter("network.layer.weight")
    assert weight.grad is not None
    found, weight.grad = weight.grad, None
    return found
