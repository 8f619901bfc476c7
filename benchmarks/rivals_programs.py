"""The programs that `rivals.py` times, each in a process of its own: what a user of each tool would write.

    PYTHON benchmarks/rivals_programs.py TOOL FOLDER

reads FOLDER/request.json and leaves FOLDER/result.json. The rivals' environment has no lit_transfer, so only `ours`
imports it. Each program imports first, then starts the clock: pictures, network and weights are on it. Everyone is
validated after each epoch, and stops at the validation that reaches the area under the ROC curve that is asked for, or
at the first one behind the limit.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from rank_drift import versions
from rivals_task import Enough, Request, Scores, Watch
from torch import Tensor, nn
from torch.utils.data import DataLoader

PACKAGES = ("torch", "torchvision", "timm", "lightning", "pytorch-lightning", "finetuning-scheduler", "fastai")
UNLIMITED = 1_000  # epochs, Lightning's own default: the limit of time ends a run
LIGHTNING_LR = 1e-3  # of Adam over the head, in the documentation of BackboneFinetuning
UNFROZEN_MAX_LR = 1e-5  # base_max_lr of finetuning-scheduler
FASTAI_LR = 2e-3  # base_lr of fine_tune
TIMM_LR, TIMM_LR_BATCH = 1e-3, 256  # of its AdamW; the batch that train.py scales rates from, with the root for Adam
TIMM_WEIGHT_DECAY, TIMM_SMOOTHING, TIMM_WARMUP_LR = 2e-5, 0.1, 1e-5  # of its train.py


def ours(request: Request, watch: Watch) -> None:
    """`lit-transfer train` on the config in the folder, with an empty store."""
    from lit_transfer.launch import train
    from lit_transfer.tracking import Recorder

    write = Recorder.write

    def timed(recorder: Recorder, step: int, values: dict[str, float]) -> None:
        write(recorder, step, values)
        if "val/auroc" in values:
            watch.see(values["val/auroc"])

    changes = {
        "runs_dir": request.folder / "runs",
        "activations.folder": request.folder / "activations",
        "seed": request.seed,
        "trainer.devices": 1,
        "trainer.progress": "false",
        "tracking.wandb": "off",
    }
    arguments = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    with mock.patch.object(Recorder, "write", timed):
        watch.start()
        train.main(["--config", str(request.folder / "config.yaml"), *arguments])


def fit_with_lightning(pl: ModuleType, callback: Any, request: Request, watch: Watch) -> None:
    """Train by a Lightning whose callback freezes and thaws; the module is that of its documentation."""

    class Classifier(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = request.backbone()
            self.head = nn.Linear(self.backbone.num_features, request.task["classes"])  # type: ignore[arg-type]
            self.scores = Scores()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            logits = self.head(self.backbone(batch[0]))
            self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
            self.scores.add(logits, batch[1])

        def on_validation_epoch_end(self) -> None:
            watch.see(self.scores.take_auc())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.head.parameters(), lr=LIGHTNING_LR * request.factor)

    watch.start()
    pl.seed_everything(request.seed)
    module = Classifier()
    trainer = pl.Trainer(
        devices=1,
        max_epochs=UNLIMITED,
        callbacks=[callback],
        num_sanity_val_steps=0,  # it would count against the rival
        default_root_dir=request.folder,
        enable_progress_bar=False,
    )
    trainer.fit(module, *request.loaders())


def backbone_finetuning(request: Request, watch: Watch) -> None:
    """Lightning's `BackboneFinetuning` at its defaults: the backbone thaws at epoch 10, at a tenth of the rate."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import BackboneFinetuning

    fit_with_lightning(pl, BackboneFinetuning(), request, watch)


def finetuning_scheduler(request: Request, watch: Watch) -> None:
    """finetuning-scheduler with the schedule that it makes: two tensors a phase, early stopping between them."""
    import lightning.pytorch as pl
    from finetuning_scheduler import FinetuningScheduler

    fit_with_lightning(pl, FinetuningScheduler(base_max_lr=UNFROZEN_MAX_LR * request.factor), request, watch)


def fastai(request: Request, watch: Watch) -> None:
    """fastai's `vision_learner` and `fine_tune`, called again as often as there is time."""
    from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, set_seed, vision_learner

    scores = Scores()

    class Watcher(Callback):  # type: ignore[misc]
        def after_pred(self) -> None:
            if not self.training:
                scores.add(self.pred, self.y)

        def after_validate(self) -> None:
            watch.see(scores.take_auc())

    watch.start()
    set_seed(request.seed)
    learner = vision_learner(
        DataLoaders(*request.loaders()),
        request.task["backbone"],
        normalize=False,  # the pictures are
        n_out=request.task["classes"],
        pretrained=False,  # the common weights follow
        loss_func=CrossEntropyLossFlat(),
        cbs=[Watcher()],
        path=request.folder,
    )
    request.with_weights(learner.model[0].model)
    with learner.no_bar(), learner.no_logging():
        while True:
            learner.fine_tune(request.task["epochs"], base_lr=FASTAI_LR * request.factor)


def timm(request: Request, watch: Watch) -> None:
    """All of the network from the start, as timm's train.py does with AdamW: its cosine, begun anew at its end.

    One epoch of warm-up, by steps: the 5 of train.py belong to 300 epochs.
    """
    import timm as library
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    watch.start()
    torch.manual_seed(request.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = request.task
    net = request.with_weights(library.create_model(task["backbone"], num_classes=task["classes"])).to(device)
    train, val = request.loaders()
    lr = TIMM_LR * math.sqrt(task["batch"] / TIMM_LR_BATCH) * request.factor
    optimizer = create_optimizer_v2(net, opt="adamw", lr=lr, weight_decay=TIMM_WEIGHT_DECAY)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=task["epochs"] * len(train),
        warmup_t=len(train),
        warmup_lr_init=TIMM_WARMUP_LR,
        cycle_limit=UNLIMITED,
        t_in_epochs=False,
    )
    loss, step = LabelSmoothingCrossEntropy(TIMM_SMOOTHING), 0
    while True:
        net.train()
        for images, labels in train:
            loss(net(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            schedule.step_update(step)
        watch.see(auc_of(net, val, device))


@torch.inference_mode()
def auc_of(net: nn.Module, batches: DataLoader[Any], device: torch.device) -> float:
    """The area under the ROC curve of a network, which is put into eval mode."""
    net.eval()
    scores = Scores()
    for images, labels in batches:
        scores.add(net(images.to(device)), labels)
    return scores.take_auc()


PROGRAMS: dict[str, Callable[[Request, Watch], None]] = {
    "lit_transfer": ours,
    "BackboneFinetuning": backbone_finetuning,
    "finetuning-scheduler": finetuning_scheduler,
    "fastai": fastai,
    "timm": timm,
}


def main(tool: str, folder: Path) -> None:
    """Train with one tool as the folder's request says, and leave the curve there."""
    import sklearn.metrics  # noqa: F401 - nobody's clock shall count it

    asked = json.loads((folder / "request.json").read_text())
    watch = Watch(asked["task"]["auc"], asked["limit_s"])
    request = Request(asked["task"], Path(asked["material"]), folder, asked["factor"], asked["seed"])
    with suppress(Enough):
        PROGRAMS[tool](request, watch)
    (folder / "result.json").write_text(json.dumps({"curve": watch.curve, "versions": versions(PACKAGES)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
