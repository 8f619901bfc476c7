"""The config of `lit-transfer features`: backbones side by side, and the heads that are fitted to what they give."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from lit_transfer.config import Activations, Data, Image, Order
from lit_transfer.errors import require
from lit_transfer.recipe import Head, Model

ClassicalHead = Literal["logistic_regression", "linear_svm", "rbf_svm", "gaussian_nb", "lda", "knn", "nearest_centroid"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A backbone whose vector is a block of the features.

    Args:
        model: backbone, weights, last stage and pooling; it has no head.
        size: side of its input in pixels, to which the common picture is resized; null is the backbone's own.
        mean: per-channel mean of its input, of values in [0, 1]; null is that of `image`, else the backbone's own.
        std: likewise, the standard deviation.
    """

    model: Model
    size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        Image(size=self.size, mean=self.mean, std=self.std)  # has the same rules
        require(
            self.model.head == Head(),
            f"the model of a block has no head, but {self.model.backbone} is given one; remove it: see `heads`.",
        )


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A network without training: blocks side by side, and a head that was fitted to them.

    Args:
        blocks: with every setting of their input given.
        head: its kind.
    """

    blocks: list[Block]
    head: ClassicalHead


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Features of one or several backbones, and classical heads on them.

    Args:
        name: the run directory is `runs_dir/name`.
        runs_dir: folder of all runs.
        seed: of folds, of what is random in fitting, and of weights that start random.
        data: streams of samples; heads are fitted on `train` and chosen on `val`.
        image: the picture that all backbones share; its size is that of the largest by default, the rest of the first.
        backbones: whose vectors stand side by side, each divided by its mean norm over `train`.
        heads: to fit and compare; null is all.
        monitor: figure that settings are chosen by in cross-validation, and the head on validation (without `data.val`
            in cross-validation, too).
        folds: of cross-validation, stratified, groups kept whole; no more than the rarest class has samples (or groups
            of them) in `train`.
        threshold_metric: what the threshold of a binary or multilabel decision maximises on validation.
        activations: the store of what backbones give.
        export: file that the features are written to, with keys, splits and labels; null writes none.
        accelerator: `auto` is the GPU if there is one.
        progress: show progress bars.
    """

    name: str
    runs_dir: str = "runs"
    seed: int = 0
    data: Data
    image: Image = field(default_factory=Image)
    backbones: list[Block]
    heads: list[ClassicalHead] | None = None
    monitor: str = "val/auroc"
    folds: int = 5
    threshold_metric: Literal["f1", "accuracy", "balanced_accuracy"] = "f1"
    activations: Activations = field(default_factory=Activations)
    export: Literal["parquet", "npz"] | None = "parquet"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        require(
            bool(re.fullmatch(r"[\w.-]+", self.name)) and self.name[0] != ".",
            f"name '{self.name}' must be a plain folder name: letters, digits, '.', '_' and '-'.",
        )
        require(0 <= self.seed < 2**63, f"seed {self.seed} is outside [0, 2^63).")
        require(bool(self.backbones), "backbones is empty; name at least one.")
        require(bool(self.kinds), "heads is empty; name at least one, or leave the key out for all.")
        require(len(set(self.kinds)) == len(self.kinds), f"heads {self.heads} names one twice; name each once.")
        require(self.folds >= 2, f"folds {self.folds} is under 2; use 5 or so.")
        require(self.monitor.startswith("val/"), f"monitor '{self.monitor}' must be a validation metric: val/...")
        require(
            self.activations.views is None,
            f"activations.views {self.activations.views!r}: features are of the plain picture; remove it.",
        )
        require(
            self.data.order == Order(),
            "data.order is of the epochs of training, and features are computed once; remove it.",
        )

    @property
    def kinds(self) -> list[ClassicalHead]:
        """The heads, in order."""
        return list(get_args(ClassicalHead)) if self.heads is None else self.heads

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.runs_dir) / self.name
