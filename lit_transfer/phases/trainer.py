"""A fresh Lightning Trainer for what a config asks of the machine, and the predictions it makes."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from lit_transfer.config import Trainer as TrainerConfig
from lit_transfer.data.module import ImageData
from lit_transfer.data.streams import Samples
from lit_transfer.errors import require
from lit_transfer.model.memory import keep_freed_memory
from lit_transfer.model.module import Predictions, TransferModule

Result = TypeVar("Result")
_SYNC_BUFFERS = (  # the same switch, renamed in torch 2.15
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def ranks_of(config: TrainerConfig) -> int:
    """Ranks over all nodes, as the config asks for on this machine."""
    per_node = 1 if config.accelerator == "cpu" else max(1, torch.cuda.device_count())
    return (per_node if config.devices == "auto" else config.devices) * config.num_nodes


def check_machine(config: TrainerConfig) -> bool:
    """Whether the run is computed on GPUs.

    Raises:
        UserError: a precision or an accelerator that this machine does not have.
    """
    on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    require(
        on_gpu or config.accelerator != "gpu",
        "accelerator gpu needs a GPU and none is visible; use auto or cpu.",
    )
    require(
        on_gpu or config.precision != "16-mixed",
        "trainer.precision 16-mixed needs a GPU and none is visible; use bf16-mixed or 32.",
    )
    return on_gpu


def make_trainer(config: TrainerConfig, **settings: Any) -> pl.Trainer:
    """A fresh Trainer; DDP wraps anew in each, which is what makes thawing right on several ranks."""
    on_gpu = check_machine(config)
    if not on_gpu:
        keep_freed_memory()
    _quiet()
    strategy: Strategy | str = "auto"
    if ranks_of(config) > 1 or config.strategy == "ddp":
        # Buffers are equal on all ranks already (frozen, or shared before each validation): see model/module.py.
        unsynced: dict[str, Any] = {_SYNC_BUFFERS: False}
        strategy = DDPStrategy(**unsynced)
    precision: Any = {"32": "32-true"}.get(config.precision, config.precision)
    return pl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=config.devices if config.devices != "auto" or on_gpu else 1,
        num_nodes=config.num_nodes,
        strategy=strategy,
        precision=precision,
        deterministic=config.deterministic,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )


def on_all_ranks(trainer: pl.Trainer, function: Callable[[], Result]) -> Result:
    """Call a function on every rank, with their communication set up; ranks that do not run yet are started.

    Every rank that runs must call it. `fit` does the same, but only for training.
    """

    def run() -> Result:
        trainer.strategy.setup_environment()
        return function()

    launcher = trainer.strategy.launcher
    return launcher.launch(run, trainer=trainer) if launcher else run()


class PhaseBar(TQDMProgressBar):
    """Counts the steps of a phase that are still to come, so that its ETA is that of the phase."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Say which phase it is."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(f"phase {self._name}")

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The loss of the step, in the place of Lightning's run number."""
        assert isinstance(pl_module, TransferModule)
        return {"loss": f"{pl_module.train_loss:.3f}"}


def predict_stream(
    config: TrainerConfig, module: TransferModule, samples: Samples, *, global_batch: int, workers: int
) -> Predictions:
    """What a network says of every sample of a stream, each once; every rank must call it, every rank gets all."""
    data = ImageData(
        {"val": samples},
        module.preprocessing,
        seed=0,
        global_batch=global_batch,
        workers=workers,
    )
    callbacks: list[pl.Callback] = [TQDMProgressBar()] if config.progress else []
    trainer = make_trainer(
        config,
        logger=False,
        enable_checkpointing=False,
        callbacks=callbacks,
        enable_progress_bar=config.progress,
    )
    trainer.validate(module, datamodule=data, verbose=False)
    module.cpu()
    assert module.predictions is not None, "validation gathers them"
    return module.predictions


def _quiet() -> None:
    """Keep Lightning's banners, and warnings about what is meant here, out of the terminal."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*module\(s\) in eval mode at the start of training",  # frozen stages are
        r".*does not have many workers",  # data.workers is the user's choice
        r".*isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with torch 2.15
        r".*recommended to use `self.log\(.*sync_dist=True",  # validation values are gathered before
        r".*Checkpoint directory .* exists and is not empty",  # a resumed phase
    ):
        warnings.filterwarnings("ignore", message=message)
