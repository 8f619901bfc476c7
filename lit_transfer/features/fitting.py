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
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from lit_transfer.blocks import ClassicalHead
from lit_transfer.errors import UserError, require
from lit_transfer.features.classifiers import CLASSIFIERS, Classifier, Fit, Settings
from lit_transfer.features.scaling import Matrix, Scaling, fit_projection, fit_scaling
from lit_transfer.model.classical import Classical, Fitted
from lit_transfer.objectives.metrics import metric_names, metrics

Classes = NDArray[np.int64]
Folds = list[tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Of each fold the places of the samples that are fitted to, and of those that are held out."""


@dataclass(frozen=True)
class Training:
    """What heads are fitted to.

    Args:
        task: of the dataset; not regression.
        features: [N, F].
        targets: int64 [N], or of a multilabel dataset float32 [N, L] with NaN for missing.
        weights: of the samples [N], or None for equal ones.
        widths: of the blocks of features.
        groups: number of the group of each sample [N], which folds keep whole; None if each stands alone.
    """

    task: str
    features: Matrix
    targets: NDArray[np.generic]
    weights: NDArray[np.floating[Any]] | None
    widths: tuple[int, ...]
    groups: NDArray[np.int64] | None = None

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
        notes: what else must be known of it.
    """

    name: ClassicalHead
    classifiers: tuple[FittedClassifier, ...]
    head: Classical
    seconds: float
    notes: tuple[str, ...]

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
    notes = {
        "did not converge": not all(one.converged for one in fitted),
        "takes no sample weights": training.weights is not None and not kind.is_weighted,
    }
    told = tuple(note for note, holds in notes.items() if holds)
    return FittedHead(name, fitted, head.eval(), time.perf_counter() - start, told)


def why_not_fitted(name: ClassicalHead, samples: int) -> str | None:
    """Why a kind of head is not fitted to so many samples; None if it is."""
    most = CLASSIFIERS[name].most_samples
    if most is None or samples <= most:
        return None
    return f"{samples} training samples are more than the {most} that it can be fitted to in useful time"


def check_targets(
    task: str, targets: NDArray[np.generic], names: Sequence[str], groups: NDArray[np.int64] | None = None
) -> None:
    """Refuse a task without classes, or a class that cross-validation would miss; `groups` as in `Training`.

    Raises:
        UserError: regression, or a class or label with fewer than two training samples, or groups of them.
    """
    what = "sample(s)" if groups is None else "group(s) of samples"
    require(
        task != "regression",
        "features: its heads are classifiers, but the dataset is regression; train a head with `lit-transfer train`.",
    )
    for name, column in zip(names, targets.T, strict=True) if task == "multilabel" else ():
        for value, word in ((1, "with"), (0, "without")):
            count = _count(column == value, groups)
            require(count >= 2, _too_few(f"label {name} has {count} training {what} {word} it"))
    if task != "multilabel":
        counts = [_count(targets == place, groups) for place in range(len(names))]
        rarest = int(np.argmin(counts))
        require(counts[rarest] >= 2, _too_few(f"class {names[rarest]} has {counts[rarest]} training {what}"))


def _count(chosen: NDArray[np.bool_], groups: NDArray[np.int64] | None) -> int:
    """How many of some samples can stand in different folds."""
    return int(chosen.sum()) if groups is None else len(np.unique(groups[chosen]))


def _too_few(what: str) -> str:
    return f"{what}, but cross-validation needs 2; bring more, or pack the dataset without it."


def fit_classifier(kind: Classifier, training: Training, choosing: Choosing, column: int) -> FittedClassifier:
    """The classifier of a label, fitted to the samples that have it, or that of the classes."""
    if training.task != "multilabel":
        return _fit_classes(kind, training, training.targets.astype(np.int64), choosing)
    targets = training.targets[:, column].astype(np.float64)
    known = ~np.isnan(targets)
    weights = None if training.weights is None else training.weights[known]
    groups = None if training.groups is None else training.groups[known]
    binary = Training("multiclass", training.features[known], targets[known], weights, training.widths, groups)
    metric = choosing.metric if choosing.metric in metric_names("multiclass", 2) else "accuracy"
    return _fit_classes(kind, binary, targets[known].astype(np.int64), replace(choosing, metric=metric))


def _fit_classes(kind: Classifier, training: Training, classes: Classes, choosing: Choosing) -> FittedClassifier:
    folds = make_folds(classes, training.groups, choosing)
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


def make_folds(classes: Classes, groups: NDArray[np.int64] | None, choosing: Choosing) -> Folds:
    """Stratified folds, as many as asked for or as the rarest class has samples (or groups) for. No group is torn
    apart, and every class is among what is fitted to and what is held out.

    Raises:
        UserError: groups are so made up that there are no such folds.
    """
    seed = choosing.seed % 2**32
    most = min(choosing.folds, *(_count(classes == place, groups) for place in range(classes.max() + 1)))
    if groups is None:
        return list(StratifiedKFold(most, shuffle=True, random_state=seed).split(classes, classes))
    for count in range(most, 1, -1):
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        folds = list(splitter.split(classes, classes, groups))
        if all(len(np.unique(classes[part])) == classes.max() + 1 for fold in folds for part in fold):
            return folds
    raise UserError(
        f"the {len(np.unique(groups))} groups of the training samples cannot be dealt into 2 folds that have every "
        "class each; bring more groups, or pack the dataset without them."
    )


def _choose(
    kind: Classifier, training: Training, classes: Classes, choosing: Choosing, folds: Folds
) -> tuple[Settings, float]:
    """The settings of the largest mean score over folds, the first of equal ones, and that score."""
    features, weights = training.features, training.weights
    tried = kind.settings(min(len(train) for train, _ in folds), features.shape[1])
    scores = np.zeros((len(tried), len(folds)))
    for place, (train, held_out) in enumerate(folds):
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
