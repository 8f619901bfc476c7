"""What every phase of a run shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pytorch_lightning.loggers import WandbLogger

from lit_transfer.config import Config
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.streams import Samples
from lit_transfer.model.network import Network
from lit_transfer.tracking import Run


@dataclass(frozen=True)
class Setup:
    """What phases train, and on what; `network` is mutated by training."""

    config: Config
    network: Network
    streams: dict[str, Samples]
    preprocessing: Preprocessing
    class_weights: torch.Tensor | None


@dataclass(frozen=True)
class Job(Setup):
    """A setup with the run directory, and where its curves are also sent."""

    run: Run
    logger: WandbLogger | None
