"""What `rivals.py` asks of every tool's program: the common pictures, weights and clock. Needs no lit_transfer."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Enough(Exception):
    """The aim or the limit was reached."""


@dataclass
class Watch:
    """The clock of a run, and what its validations gave.

    Args:
        auc: that ends the run once a validation has it.
        limit_s: seconds; the first validation behind them ends the run. None is no limit.
    """

    auc: float
    limit_s: float | None
    curve: list[tuple[float, float]] = field(default_factory=list)
    _start: float = 0.0

    def start(self) -> None:
        """Imports are done; what follows is on the clock."""
        self._start = time.perf_counter()

    def see(self, auc: float) -> None:
        """A validation is done.

        Raises:
            Enough: it was the last one.
        """
        seconds = time.perf_counter() - self._start
        self.curve.append((seconds, auc))
        print(f"{seconds:.1f} s: validation AUC {auc:.4f}", flush=True)
        if auc >= self.auc or seconds >= (self.limit_s or math.inf):
            raise Enough("the last validation")  # fastai rewrites the words of an exception


@dataclass(frozen=True)
class Request:
    """What a program is asked to do.

    Args:
        task: network, pictures and all else that every tool has in common.
        material: folder of the pictures, a folder a class below `train` and `val`, and of `weights.pt`.
        folder: for what the tool writes.
        factor: of the default learning rates.
        seed: of the head, the order and the augmentation.
    """

    task: dict[str, Any]
    material: Path
    folder: Path
    factor: float
    seed: int

    def backbone(self) -> nn.Module:
        """timm's network without its last layer, with the common weights."""
        import timm

        return self.with_weights(timm.create_model(self.task["backbone"], num_classes=0))

    def with_weights(self, net: nn.Module) -> nn.Module:
        """The same network with the common weights in it; what the file lacks must be the last layer."""
        state = torch.load(self.material / "weights.pt", weights_only=True)
        found = net.load_state_dict(state, strict=False)
        classifier = getattr(net, "default_cfg")["classifier"]  # noqa: B009 - timm's networks have it, Module does not
        left = [name for name in found.missing_keys if not name.startswith(f"{classifier}.")]
        assert not left and not found.unexpected_keys, (left, found.unexpected_keys)
        return net

    def loaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Training and validation batches, as torchvision's ImageFolder and transforms make them."""
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        task = self.task
        interpolation = v2.InterpolationMode(task["interpolation"])
        first = [v2.Resize(task["canvas"], interpolation), v2.CenterCrop(task["size"])]
        changes = [v2.RandomHorizontalFlip(task["flip_h"]), v2.RandomVerticalFlip(task["flip_v"])]
        changes += [v2.Lambda(quarter_turn)] if task["quarter_turns"] else []
        last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(task["mean"], task["std"])]
        made = []
        for split, transform in (("train", [*first, *changes, *last]), ("val", [*first, *last])):
            pictures = ImageFolder(str(self.material / split), v2.Compose(transform))
            workers: int = task["workers"]
            made.append(
                DataLoader(
                    pictures,
                    batch_size=task["batch"],
                    shuffle=split == "train",
                    num_workers=workers,
                    persistent_workers=workers > 0,
                )
            )
        return made[0], made[1]


def quarter_turn(picture: Any) -> Any:
    """A PIL picture turned by 0, 90, 180 or 270 degrees."""
    return picture.rotate(90 * int(torch.randint(4, ())))


@dataclass
class Scores:
    """What a network says of the validation pictures, batch by batch."""

    logits: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """A batch: `[B, 2]` and `[B]`."""
        self.logits.append(logits.detach().float().cpu())
        self.labels.append(labels.cpu())

    def take_auc(self) -> float:
        """The area under the ROC curve of all batches, which are forgotten."""
        from sklearn.metrics import roc_auc_score

        probabilities = torch.cat(self.logits).softmax(1)[:, 1]
        auc = float(roc_auc_score(torch.cat(self.labels), probabilities))
        self.logits, self.labels = [], []
        return auc
