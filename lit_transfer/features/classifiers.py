"""The classifiers of scikit-learn that are offered as heads: their settings, and what was fitted, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import ParameterGrid
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.svm import SVC, LinearSVC
from torch import Tensor

from lit_transfer.blocks import ClassicalHead
from lit_transfer.features.scaling import Matrix, Projection
from lit_transfer.model.classical import Fitted

Settings = dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """An estimator, calibrated where it is one of margins, and what it was fitted to.

    Args:
        estimator: of scikit-learn.
        projection: between the scaled features and the estimator, where there is one.
        given: what the estimator was fitted to, [N, F'].
        classes: of the samples, [N].
    """

    estimator: Any
    projection: Projection | None
    given: Matrix
    classes: NDArray[np.int64]


@dataclass(frozen=True)
class Classifier:
    """A kind of head.

    Args:
        make: a seed -> the estimator.
        grid: values of its settings that are tried.
        parts: what the parts of its form behind the scaling are fitted to.
        components: counts of principal components that are tried; empty takes the features as they are.
        is_weighted: takes sample weights.
        is_margin: gives decisions, which are then calibrated (Platt 1999).
        most_samples: time or memory grow too fast to fit it to more.
    """

    make: Callable[[int], Any]
    grid: dict[str, Sequence[Any]]
    parts: Callable[[Fit], list[Fitted]]
    components: tuple[int, ...] = ()
    is_weighted: bool = False
    is_margin: bool = False
    most_samples: int | None = None

    def settings(self, samples: int, features: int) -> list[Settings]:
        """All that are tried, where so many samples of so many features are fitted."""
        grid = dict(self.grid)
        if self.components:
            grid["components"] = sorted({min(count, samples, features) for count in self.components})
        if "n_neighbors" in grid:
            grid["n_neighbors"] = [count for count in grid["n_neighbors"] if count <= samples]
        return list(ParameterGrid(grid))


def _logistic_regression(fit: Fit) -> list[Fitted]:
    weight, bias = linear_of(fit.estimator)
    return [{"weight": weight, "bias": bias}, {}]


def linear_of(estimator: Any) -> tuple[Tensor, Tensor]:
    """Weights [K, F] and biases [K] whose softmax are a linear estimator's probabilities; of two classes symmetric."""
    weight, bias = estimator.coef_, estimator.intercept_
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return torch.from_numpy(np.ascontiguousarray(weight)), torch.from_numpy(np.ascontiguousarray(bias))


def _linear_svm(fit: Fit) -> list[Fitted]:
    (fitted,) = fit.estimator.calibrated_classifiers_
    machine = {"weight": fitted.estimator.coef_, "bias": fitted.estimator.intercept_}
    return [_tensors(machine), _calibration(fitted)]


def _rbf_svm(fit: Fit) -> list[Fitted]:
    (fitted,) = fit.estimator.calibrated_classifiers_
    machine = fitted.estimator
    kernel = {
        "support": machine.support_vectors_,
        "counts": machine.n_support_.astype(np.int64),
        "dual": machine.dual_coef_,
        "bias": machine.intercept_,
        "gamma": np.float64(machine.gamma),
    }
    return [_tensors(kernel), _calibration(fitted)]


def _calibration(fitted: Any) -> Fitted:
    slopes, offsets = zip(*((one.a_, one.b_) for one in fitted.calibrators), strict=True)
    return _tensors({"slope": np.array(slopes), "offset": np.array(offsets)})


def _gaussian_nb(fit: Fit) -> list[Fitted]:
    assert fit.projection is not None
    found = fit.estimator
    own = {"means": found.theta_, "variances": found.var_, "log_prior": np.log(found.class_prior_)}
    return [fit.projection.fitted(), _tensors(own), {}]


def _lda(fit: Fit) -> list[Fitted]:
    return [_behind(fit.projection, *linear_of(fit.estimator)), {}]


def _nearest_centroid(fit: Fit) -> list[Fitted]:
    """Tibshirani et al. 2002, eq. 6: minus the squared distance, in standard deviations within classes, and a prior;
    what is the same for all classes is left out, and the rest is linear.
    """
    found = fit.estimator
    std = np.where(found.within_class_std_dev_ == 0, 1.0, found.within_class_std_dev_)
    centroids = found.centroids_ / std
    weight = 2 * centroids / std
    bias = 2 * np.log(found.class_prior_) - (centroids**2).sum(1)
    return [_behind(fit.projection, torch.from_numpy(weight), torch.from_numpy(bias)), {}]


def _behind(projection: Projection | None, weight: Tensor, bias: Tensor) -> Fitted:
    """A linear layer and the projection before it as one."""
    assert projection is not None
    return {"weight": weight @ projection.fitted()["weight"], "bias": bias}


def _knn(fit: Fit) -> list[Fitted]:
    points = {
        "points": fit.given.astype(np.float32),
        "labels": fit.classes,
        "count": np.int64(fit.estimator.n_neighbors),
    }
    return [_tensors(points)]


def _tensors(arrays: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(array) for name, array in arrays.items()}


_FEW = (16, 64, 256)
CLASSIFIERS: dict[ClassicalHead, Classifier] = {
    "logistic_regression": Classifier(
        lambda seed: LogisticRegression(max_iter=2000),
        {"C": [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]},
        _logistic_regression,
        is_weighted=True,
    ),
    "linear_svm": Classifier(
        lambda seed: LinearSVC(dual="auto", max_iter=5000, random_state=seed),
        {"C": [0.01, 0.1, 1.0, 10.0, 100.0]},
        _linear_svm,
        is_weighted=True,
        is_margin=True,
    ),
    "rbf_svm": Classifier(
        lambda seed: SVC(kernel="rbf"),
        {"C": [0.1, 1.0, 10.0, 100.0], "gamma": [0.1, 0.3, 1.0]},
        _rbf_svm,
        is_weighted=True,
        is_margin=True,
        most_samples=20_000,
    ),
    "gaussian_nb": Classifier(
        lambda seed: GaussianNB(),
        {"var_smoothing": [1e-9, 1e-3, 1e-1]},
        _gaussian_nb,
        components=_FEW,
        is_weighted=True,
    ),
    "lda": Classifier(
        lambda seed: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
        {},
        _lda,
        components=(*_FEW, 1024),
    ),
    "knn": Classifier(
        lambda seed: KNeighborsClassifier(weights="distance", algorithm="brute"),
        {"n_neighbors": [1, 3, 5, 10, 20, 50]},
        _knn,
        most_samples=100_000,
    ),
    "nearest_centroid": Classifier(
        lambda seed: NearestCentroid(),
        {"shrink_threshold": [None, 0.5]},
        _nearest_centroid,
        components=_FEW,
    ),
}
