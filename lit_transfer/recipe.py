"""The sections of a config that say what is learned: the network and the loss."""

from __future__ import annotations

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
        init: how the last layer starts: near zero, or as the logistic regression that cross-validation finds best on
            what the backbone gives for the training pictures before the first phase (LP-FT, Kumar et al. 2022); that
            takes a head of one linear layer.
    """

    hidden: list[int] = field(default_factory=list)
    dropout: float | list[float] = 0.0
    init: Literal["random", "logistic_regression"] = "random"

    def __post_init__(self) -> None:
        require(all(width > 0 for width in self.hidden), f"model.head.hidden {self.hidden} has a width under 1.")
        rates = self.dropout if isinstance(self.dropout, list) else [self.dropout]
        require(all(0 <= rate < 1 for rate in rates), f"model.head.dropout {self.dropout} is outside [0, 1).")
        places = max(1, len(self.hidden))
        require(
            not isinstance(self.dropout, list) or len(self.dropout) == places,
            f"model.head.dropout has {len(rates)} rates for {places} place(s); give one, or one for each.",
        )
        require(
            self.init == "random" or not self.hidden,
            f"model.head.init {self.init} starts one linear layer, but model.head.hidden {self.hidden} stands before "
            "it; remove hidden, or use random.",
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The pretrained network and what is put in the place of its last layer.

    Args:
        backbone: `timm/NAME`, `torchvision/NAME`, `caffe/alexnet`, `hf-hub:REPO`, `local-dir:DIR` or
            `module:callable`.
        weights: `pretrained` (the hub's cache), `none`, `file:PATH`, `package:MODULE`, `run:DIR`, or for
            `caffe/alexnet` `caffe_npy:PATH`.
        match: pair the file's tensors with the network's by `name`, or by `order` where only names differ.
        drop: tensors of the file to leave out, by prefix; `head` is the network's own last layer.
        strip_prefix: prefix to remove from the file's names, such as `module.`.
        resample: tensors that may be interpolated to another size; only `pos_embed` is supported.
        last_stage: the last stage to keep, by name; later ones are removed. All are kept by default.
        transfer_to: the last stage whose weights are copied, by name; later ones start as those of a new network,
            from the run's seed (Yosinski et al. 2014). All are copied by default.
        pool: how the last stage's output becomes a vector: `auto` is the network's own way, else the average or
            the maximum over positions, or all positions side by side.
        head: the new head.
    """

    backbone: str
    weights: str = "pretrained"
    match: Literal["name", "order"] = "name"
    drop: list[str] = field(default_factory=lambda: ["head"])
    strip_prefix: str = ""
    resample: list[str] = field(default_factory=list)
    last_stage: str | None = None
    transfer_to: str | None = None
    pool: Literal["auto", "avg", "max", "flatten"] = "auto"
    head: Head = field(default_factory=Head)

    def __post_init__(self) -> None:
        kind = self.weights.partition(":")[0]
        require(
            self.weights in ("pretrained", "none") or kind in ("file", "package", "run", "caffe_npy"),
            f"model.weights '{self.weights}' is not pretrained, none, file:PATH, package:MODULE, run:DIR or "
            "caffe_npy:PATH.",
        )
        caffe = self.backbone == "caffe/alexnet"
        require(
            kind != "caffe_npy" or caffe,
            f"model.weights '{self.weights}' is for model.backbone caffe/alexnet, not {self.backbone}; change one.",
        )
        require(
            self.weights != "pretrained" or not caffe,
            "model.weights pretrained: no hub has weights of caffe/alexnet; bring bvlc_alexnet.npy here and set "
            "caffe_npy:PATH.",
        )
        unknown = set(self.resample) - {"pos_embed"}
        require(not unknown, f"model.resample {sorted(unknown)} cannot be resampled; only pos_embed can.")
        require(
            self.transfer_to not in ("all", "head"),
            f"model.transfer_to '{self.transfer_to}' is not a stage's name; name the last stage to copy, or remove it.",
        )
        require(
            self.transfer_to is None or self.weights != "none",
            f"model.transfer_to '{self.transfer_to}' copies weights, but model.weights is none; name some.",
        )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss and the decision; the dataset's task chooses their form (see `objectives/`).

    Args:
        label_smoothing: share of the target spread over all classes (multiclass).
        class_weights: weight of each class in the dataset's order, or `balanced` for N / (classes * count).
        focal_gamma: exponent of the focal loss (Lin et al. 2017, eq. 4); 0 is plain cross-entropy.
        temperature_scaling: divide the logits of the trained network by one temperature, fitted on validation, so that
            its probabilities mean what they say (multiclass, multilabel; Guo et al. 2017).
        threshold_metric: what the threshold of a binary or multilabel decision maximises on validation.
    """

    label_smoothing: float = 0.0
    class_weights: list[float] | Literal["balanced"] | None = None
    focal_gamma: float = 0.0
    temperature_scaling: bool = False
    threshold_metric: Literal["f1", "accuracy", "balanced_accuracy"] = "f1"

    def __post_init__(self) -> None:
        require(
            0 <= self.label_smoothing < 1,
            f"objective.label_smoothing {self.label_smoothing} is outside [0, 1).",
        )
        require(self.focal_gamma >= 0, f"objective.focal_gamma {self.focal_gamma} is negative.")
        weights = self.class_weights if isinstance(self.class_weights, list) else []
        require(all(w >= 0 for w in weights), f"objective.class_weights {weights} has a negative weight.")
