"""The head of a network as the logistic regression on what its backbone gives: the start of a phase (LP-FT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_transfer.config import Config
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.streams import Samples
from lit_transfer.errors import require
from lit_transfer.features.classifiers import CLASSIFIERS, linear_of
from lit_transfer.features.fitting import Choosing, FittedClassifier, Training, check_targets, fit_classifier
from lit_transfer.features.table import block_vectors, groups_of, sound_places
from lit_transfer.model.network import Network

_FOLDS = 5


@dataclass(frozen=True)
class LinearStart:
    """A linear layer.

    Args:
        weight: fp32 [O, F].
        bias: fp32 [O].
        record: of each of its classifiers the settings, their score in cross-validation, and whether it converged.
    """

    weight: Tensor
    bias: Tensor
    record: list[dict[str, Any]]

    @torch.no_grad()
    def put_into(self, head: nn.Module) -> None:
        """Give the last layer of a head of one linear layer these values; mutates it."""
        layer = head.get_submodule("logits")
        assert isinstance(layer, nn.Linear) and layer.weight.shape == self.weight.shape
        layer.weight.copy_(self.weight)
        assert layer.bias is not None
        layer.bias.copy_(self.bias)


def check_start(config: Config, train: Samples) -> None:
    """Refuse a dataset to which the start that a config asks for cannot be fitted, before any network is built.

    Raises:
        UserError: regression, or a class with fewer than two samples.
    """
    if config.model.head.init == "logistic_regression":
        task, names = train.manifest.task, train.manifest.classes(config.data.label)
        _check(task, train.targets[train.rows], names, groups_of(train, train.rows))


def _check(task: str, targets: NDArray[np.generic], names: tuple[str, ...], groups: NDArray[np.int64] | None) -> None:
    require(
        task != "regression",
        "model.head.init logistic_regression needs classes, but the dataset is regression; use random.",
    )
    check_targets(task, targets, names, groups)


def start_of_head(network: Network, config: Config, train: Samples, preprocessing: Preprocessing) -> LinearStart:
    """The logistic regression on what the backbone gives for the plain training pictures; damaged ones are left out.

    One rank calls it, before the first step; the network is where its backbone is to be run, and is not changed.

    Raises:
        UserError: as `fit_linear_head` and `block_vectors` do.
    """
    workers, progress = config.data.workers, config.trainer.progress
    streams = {"train": train}
    backbone, settings = network.backbone, config.activations
    found = block_vectors(backbone, preprocessing, settings, streams, workers=workers, progress=progress)
    vectors, damaged = found["train"]
    sound = sound_places(len(train.rows), damaged)
    rows = train.rows[sound.numpy()]
    names, task = train.manifest.classes(config.data.label), train.manifest.task
    targets, weights, groups = train.targets[rows], train.weights[rows], groups_of(train, rows)
    return fit_linear_head(task, vectors[sound], targets, weights, names, config.seed, groups)


def fit_linear_head(
    task: str,
    features: Tensor,
    targets: NDArray[np.generic],
    weights: NDArray[np.floating[Any]] | None,
    names: tuple[str, ...],
    seed: int,
    groups: NDArray[np.int64] | None = None,
) -> LinearStart:
    """The last layer for which `probabilities` are those of logistic regression on features (Kumar et al. 2022).

    C is chosen by the accuracy in stratified cross-validation; features are standardised, which the layer undoes. An
    ordinal dataset has a regression for each P(y > k), a multilabel one for each label, on the samples that have it.

    Args:
        task: of the dataset.
        features: of the training samples, [N, F].
        targets: int64 [N], or of a multilabel dataset float32 [N, L] with NaN for missing.
        weights: of the samples [N], or None for equal ones.
        names: of the classes or labels.
        seed: of the folds.
        groups: of the samples [N], which folds keep whole; None if each stands alone.

    Raises:
        UserError: regression, or a class with fewer than two samples, or groups of them.
    """
    _check(task, targets, names, groups)
    if task == "ordinal":
        classes = targets.astype(np.int64)
        targets = np.stack([classes > k for k in range(len(names) - 1)], 1).astype(np.float32)
    values = features.double().numpy()
    width = (values.shape[1],)
    training = Training("multiclass" if task == "multiclass" else "multilabel", values, targets, weights, width, groups)
    fitted = [
        fit_classifier(CLASSIFIERS["logistic_regression"], training, Choosing("accuracy", _FOLDS, seed), column)
        for column in training.columns
    ]
    layers = [_unscaled(one) for one in fitted]
    if task != "multiclass":  # of two classes the difference of logits is the logit
        layers = [(weight[1:] - weight[:1], bias[1:] - bias[:1]) for weight, bias in layers]
    return LinearStart(
        weight=torch.cat([weight for weight, _ in layers]).float(),
        bias=torch.cat([bias for _, bias in layers]).float(),
        record=[{**one.settings, "score": one.score, "converged": one.converged} for one in fitted],
    )


def _unscaled(fitted: FittedClassifier) -> tuple[Tensor, Tensor]:
    """Weights [K, F] and biases [K] for features as they are."""
    weight, bias = linear_of(fitted.fit.estimator)
    scaling = fitted.scaling.fitted()
    weight = weight / scaling["scale"]
    return weight, bias - weight @ scaling["mean"]
