"""Heads fitted to features, their settings chosen by cross-validation on the training samples alone."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold

from lit_transfer.blocks import ClassicalHead
from lit_transfer.errors import require
from lit_transfer.features.classifiers import CLASSIFIERS, Classifier, Fit, Settings
from lit_transfer.features.scaling import Matrix, Scaling, fit_projection, fit_scaling
from lit_transfer.model.classical import Classical, Fitted
from lit_transfer.objectives.metrics import metric_names, metrics

Classes = NDArray[np.int64]


@dataclass(frozen=True)
class Training:
    """What heads are fitted to.

    Args:
        task: of the dataset; not regression.
        features: [N, F].
        targets: int64 [N], or of a multilabel dataset float32 [N, L] with NaN for missing.
        weights: of the samples [N], or None for equal ones.
        widths: of the blocks of features.
    """

    task: str
    features: Matrix
    targets: NDArray[np.generic]
    weights: NDArray[np.floating[Any]] | None
    widths: tuple[int, ...]

    @property
    def columns(self) -> range:
        """Numbers of the labels of a multilabel dataset; else a single one."""
        return range(self.targets.shape[1] if self.task == "multilabel" else 1)


@dataclass(frozen=True)
class Choosing:
    """How settings are chosen.

    Args:
        metric: figure of merit, the larger the better, without a split before it.
        folds: of stratified cross-validation, at most.
        seed: of the folds and of what is random in fitting.
    """

    metric: str
    folds: int
    seed: int


@dataclass(frozen=True)
class FittedClassifier:
    """One classifier.

    Args:
        scaling: of its features.
        fit: to scaled features.
        settings: that were chosen.
        score: of them in cross-validation, the mean over folds.
        converged: whether the optimizer came to its end.
    """

    scaling: Scaling
    fit: Fit
    settings: Settings
    score: float
    converged: bool

    def probabilities(self, features: Matrix) -> Matrix:
        """Of features [N, F], as scikit-learn computes them, [N, K]."""
        scaled = self.scaling(features)
        given = self.fit.projection(scaled) if self.fit.projection else scaled
        return np.asarray(self.fit.estimator.predict_proba(given))

    def parts(self, classifier: Classifier) -> list[Fitted]:
        """What the parts of its form are fitted to."""
        return [self.scaling.fitted(), *classifier.parts(self.fit)]


@dataclass(frozen=True)
class FittedHead:
    """A head of one or, for multilabel, several classifiers.

    Args:
        name: its kind.
        classifiers: one, or one for each label.
        head: the same in torch.
        seconds: that it took.
    """

    name: ClassicalHead
    classifiers: tuple[FittedClassifier, ...]
    head: Classical
    seconds: float

    @property
    def score(self) -> float:
        """In cross-validation, the mean over labels."""
        return float(np.mean([one.score for one in self.classifiers]))


def fit_head(name: ClassicalHead, training: Training, choosing: Choosing) -> FittedHead:
    """Choose settings by cross-validation, and fit the head with them to all training samples."""
    start = time.perf_counter()
    kind = CLASSIFIERS[name]
    fitted = tuple(fit_classifier(kind, training, choosing, column) for column in training.columns)
    head = Classical(training.task, name, [one.parts(kind) for one in fitted])
    return FittedHead(name, fitted, head.eval(), time.perf_counter() - start)


def why_not_fitted(name: ClassicalHead, samples: int) -> str | None:
    """Why a kind of head is not fitted to so many samples; None if it is."""
    most = CLASSIFIERS[name].most_samples
    if most is None or samples <= most:
        return None
    return f"{samples} training samples are more than the {most} that it can be fitted to in useful time"


def check_targets(task: str, targets: NDArray[np.generic], names: Sequence[str]) -> None:
    """Refuse a task without classes, or a class that cross-validation would miss.

    Raises:
        UserError: regression, or a class or label with fewer than two training samples.
    """
    require(
        task != "regression",
        "features: its heads are classifiers, but the dataset is regression; train a head with `lit-transfer train`.",
    )
    for name, column in zip(names, targets.T, strict=True) if task == "multilabel" else ():
        for value, word in ((1, "with"), (0, "without")):
            count = int((column == value).sum())
            require(count >= 2, _too_few(f"label {name} has {count} training sample(s) {word} it"))
    if task != "multilabel":
        counts = np.bincount(targets.astype(np.int64), minlength=len(names))
        rarest = int(counts.argmin())
        require(counts[rarest] >= 2, _too_few(f"class {names[rarest]} has {counts[rarest]} training sample(s)"))


def _too_few(what: str) -> str:
    return f"{what}, but cross-validation needs 2; bring more, or pack the dataset without it."


def fit_classifier(kind: Classifier, training: Training, choosing: Choosing, column: int) -> FittedClassifier:
    """The classifier of a label, fitted to the samples that have it, or that of the classes."""
    if training.task != "multilabel":
        return _fit_classes(kind, training, training.targets.astype(np.int64), choosing)
    targets = training.targets[:, column].astype(np.float64)
    known = ~np.isnan(targets)
    weights = None if training.weights is None else training.weights[known]
    binary = Training("multiclass", training.features[known], targets[known], weights, training.widths)
    metric = choosing.metric if choosing.metric in metric_names("multiclass", 2) else "accuracy"
    return _fit_classes(kind, binary, targets[known].astype(np.int64), replace(choosing, metric=metric))


def _fit_classes(kind: Classifier, training: Training, classes: Classes, choosing: Choosing) -> FittedClassifier:
    folds = StratifiedKFold(
        min(choosing.folds, int(np.bincount(classes).min())), shuffle=True, random_state=choosing.seed % 2**32
    )
    settings, score = _choose(kind, training, classes, choosing, folds)
    with warnings.catch_warnings(record=True, action="always") as caught:
        scaling = fit_scaling(training.features, training.widths)
        scaled = scaling(training.features)
        projection = fit_projection(scaled, settings["components"]) if kind.components else None
        given = projection(scaled) if projection else scaled
        estimator = _make(kind, settings, choosing.seed, len(training.widths))
        if kind.is_margin:
            estimator = CalibratedClassifierCV(estimator, method="sigmoid", ensemble=False, cv=folds)
        estimator.fit(given, classes, **_weighted(kind, training.weights))
    converged = not any(issubclass(one.category, ConvergenceWarning) for one in caught)
    return FittedClassifier(scaling, Fit(estimator, projection, given, classes), settings, score, converged)


def _choose(
    kind: Classifier, training: Training, classes: Classes, choosing: Choosing, folds: StratifiedKFold
) -> tuple[Settings, float]:
    """The settings of the largest mean score over folds, the first of equal ones, and that score."""
    features, weights = training.features, training.weights
    splits = list(folds.split(features, classes))
    tried = kind.settings(min(len(train) for train, _ in splits), features.shape[1])
    scores = np.zeros((len(tried), len(splits)))
    for place, (train, held_out) in enumerate(splits):
        scaling = fit_scaling(features[train], training.widths)
        given, seen = scaling(features[train]), scaling(features[held_out])
        if kind.components:
            projection = fit_projection(given, max(settings["components"] for settings in tried))
            given, seen = projection(given), projection(seen)
        for row, settings in enumerate(tried):
            count = settings.get("components", given.shape[1])
            estimator = _make(kind, settings, choosing.seed, len(training.widths))
            own = None if weights is None else weights[train]
            with warnings.catch_warnings(action="ignore"):  # of settings that fit badly: their scores say so
                estimator.fit(given[:, :count], classes[train], **_weighted(kind, own))
            scores[row, place] = _score(
                training.task, kind, estimator, seen[:, :count], classes[held_out], choosing.metric
            )
    means = np.nan_to_num(scores.mean(1), nan=-np.inf)
    best = int(means.argmax())
    return tried[best], float(means[best])


def _make(kind: Classifier, settings: Settings, seed: int, blocks: int) -> Any:
    """An estimator; the squared distances that a kernel sees grow with the number of blocks."""
    own = {name: value for name, value in settings.items() if name != "components"}
    if "gamma" in own:
        own["gamma"] /= blocks
    return kind.make(seed % 2**32).set_params(**own)


def _weighted(kind: Classifier, weights: NDArray[np.floating[Any]] | None) -> dict[str, Any]:
    return {"sample_weight": weights} if kind.is_weighted and weights is not None else {}


def _score(task: str, kind: Classifier, estimator: Any, features: Matrix, classes: Classes, metric: str) -> float:
    """A figure of merit on samples that the estimator was not fitted to."""
    if kind.is_margin:
        margins = estimator.decision_function(features)
        rows = np.stack([np.zeros_like(margins), margins], 1) if margins.ndim == 1 else margins
        said = torch.from_numpy(rows).softmax(1)  # ranks samples and classes as the margins do
    else:
        said = torch.from_numpy(estimator.predict_proba(features))
    return metrics(task, said, torch.from_numpy(classes))[metric]
