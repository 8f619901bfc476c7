"""The sections of a config that say what is learned: the network, the loss and the phases."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from lit_transfer.errors import require


@dataclass(frozen=True, kw_only=True)
class Head:
    """What replaces the network's last layer.

    Args:
        hidden: widths of hidden layers, each followed by ReLU; empty is one linear layer.
        dropout: probability after each hidden layer (before the last layer if there is none): one number, or
            one for each.
    """

    hidden: list[int] = field(default_factory=list)
    dropout: float | list[float] = 0.0

    def __post_init__(self) -> None:
        require(all(width > 0 for width in self.hidden), f"model.head.hidden {self.hidden} has a width under 1.")
        rates = self.dropout if isinstance(self.dropout, list) else [self.dropout]
        require(all(0 <= rate < 1 for rate in rates), f"model.head.dropout {self.dropout} is outside [0, 1).")
        places = max(1, len(self.hidden))
        require(
            not isinstance(self.dropout, list) or len(self.dropout) == places,
            f"model.head.dropout has {len(rates)} rates for {places} place(s); give one, or one for each.",
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The pretrained network and what is put in the place of its last layer.

    Args:
        backbone: `timm/NAME`, `torchvision/NAME`, `hf-hub:REPO`, `local-dir:DIR` or `module:callable`.
        weights: `pretrained` (the hub's cache), `none`, `file:PATH`, `package:MODULE` or `run:DIR`.
        match: pair the file's tensors with the network's by `name`, or by `order` where only names differ.
        drop: tensors of the file to leave out, by prefix; `head` is the network's own last layer.
        strip_prefix: prefix to remove from the file's names, such as `module.`.
        resample: tensors that may be interpolated to another size; only `pos_embed` is supported.
        last_stage: the last stage to keep, by name; later ones are removed. All are kept by default.
        pool: how the last stage's output becomes a vector: `auto` is the network's own way, else the average
            over positions, or all positions side by side.
        head: the new head.
    """

    backbone: str
    weights: str = "pretrained"
    match: Literal["name", "order"] = "name"
    drop: list[str] = field(default_factory=lambda: ["head"])
    strip_prefix: str = ""
    resample: list[str] = field(default_factory=list)
    last_stage: str | None = None
    pool: Literal["auto", "avg", "flatten"] = "auto"
    head: Head = field(default_factory=Head)

    def __post_init__(self) -> None:
        kind = self.weights.partition(":")[0]
        require(
            self.weights in ("pretrained", "none") or kind in ("file", "package", "run"),
            f"model.weights '{self.weights}' is not pretrained, none, file:PATH, package:MODULE or run:DIR.",
        )
        unknown = set(self.resample) - {"pos_embed"}
        require(not unknown, f"model.resample {sorted(unknown)} cannot be resampled; only pos_embed can.")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss and the decision; the dataset's task chooses their form (see `objectives/`).

    Args:
        label_smoothing: share of the target spread over all classes (multiclass).
        class_weights: weight of each class in the dataset's order, or `balanced` for N / (classes * count).
        focal_gamma: exponent of the focal loss (Lin et al. 2017, eq. 4); 0 is plain cross-entropy.
        threshold_metric: what the threshold of a binary or multilabel decision maximises on validation.
    """

    label_smoothing: float = 0.0
    class_weights: list[float] | Literal["balanced"] | None = None
    focal_gamma: float = 0.0
    threshold_metric: Literal["f1", "accuracy", "balanced_accuracy"] = "f1"

    def __post_init__(self) -> None:
        require(
            0 <= self.label_smoothing < 1,
            f"objective.label_smoothing {self.label_smoothing} is outside [0, 1).",
        )
        require(self.focal_gamma >= 0, f"objective.focal_gamma {self.focal_gamma} is negative.")
        weights = self.class_weights if isinstance(self.class_weights, list) else []
        require(all(w >= 0 for w in weights), f"objective.class_weights {weights} has a negative weight.")


@dataclass(frozen=True, kw_only=True)
class Until:
    """Ends a phase early when a metric stops improving.

    Args:
        metric: a validation metric, such as `val/loss`.
        patience: validations without an improvement before the phase ends.
        min_delta: smallest change that counts as an improvement.
    """

    metric: str
    patience: int
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.metric.startswith("val/"),
            f"until.metric '{self.metric}' must be a validation metric: val/...",
        )
        require(self.patience >= 1, f"until.patience {self.patience} is under 1.")
        require(self.min_delta >= 0, f"until.min_delta {self.min_delta} is negative.")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One row of the phase table: what trains, how fast, for how long.

    Args:
        name: names the phase's checkpoints and curves.
        train: `head`, `all`, or `{from: STAGE}`: that stage and all behind it, and the head.
        max_epochs: passes over the training stream, at most.
        lr: learning rate of the head.
        backbone_lr: learning rate of the trained stages; needed as soon as one trains.
        global_batch: samples per optimizer step, over all ranks.
        optimizer: `adamw` or `sgd`.
        momentum: of SGD.
        weight_decay: of matrices and kernels; biases, normalisation weights and what the network
            itself exempts have none.
        schedule: `constant`, or `warmup_cosine`: linear to the full rate, then a half cosine to zero.
        warmup_steps: steps of the linear part.
        norm: `pretrained` keeps BatchNorm's running statistics in the trained stages; `batch` uses and updates the
            batch's own, for training from scratch or pictures far from those of the pretraining. On several GPUs
            that is SyncBatchNorm; on CPU ranks each has its own part of the batch, so the result depends on them.
        until: ends the phase early.
        restore_best: go on with the weights of the phase's best validation by `monitor`, not with its last.
    """

    name: str
    train: str | dict[str, str] = "head"
    max_epochs: int
    lr: float
    backbone_lr: float | None = None
    global_batch: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "warmup_cosine"] = "constant"
    warmup_steps: int = 0
    norm: Literal["pretrained", "batch"] = "pretrained"
    until: Until | None = None
    restore_best: bool = False

    def __post_init__(self) -> None:
        where = f"phase '{self.name}'"
        require(bool(re.fullmatch(r"[A-Za-z0-9_-]+", self.name)), f"{where}: a name has letters, digits, _ and -.")
        named = isinstance(self.train, str) and self.train in ("head", "all")
        from_stage = isinstance(self.train, dict) and set(self.train) == {"from"}
        require(named or from_stage, f"{where}: train {self.train!r} is not head, all or {{from: STAGE}}.")
        require(self.max_epochs >= 1, f"{where}: max_epochs {self.max_epochs} is under 1.")
        require(self.global_batch >= 1, f"{where}: global_batch {self.global_batch} is under 1.")
        require(self.lr > 0, f"{where}: lr {self.lr} is not positive.")
        require(0 <= self.momentum < 1, f"{where}: momentum {self.momentum} is outside [0, 1).")
        require(self.weight_decay >= 0, f"{where}: weight_decay {self.weight_decay} is negative.")
        require(self.warmup_steps >= 0, f"{where}: warmup_steps {self.warmup_steps} is negative.")
        require(
            self.warmup_steps == 0 or self.schedule == "warmup_cosine",
            f"{where}: warmup_steps {self.warmup_steps} needs schedule warmup_cosine, not {self.schedule}.",
        )
        if isinstance(self.train, dict):
            stage = self.train["from"]
            require(
                stage not in ("head", "all"),
                f"{where}: train.from '{stage}' is no stage; write train: {stage}.",
            )
        if self.train == "head":
            require(
                self.backbone_lr is None,
                f"{where}: backbone_lr {self.backbone_lr} is given but only the head trains; remove it.",
            )
        else:
            require(
                self.backbone_lr is not None and self.backbone_lr > 0,
                f"{where}: backbone_lr {self.backbone_lr} must be positive where stages train; try lr / 10.",
            )
