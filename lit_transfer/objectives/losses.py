"""The loss of each row of a batch, by task.

A row's loss is a sum over its labelled entries and no mean is taken here: the module divides the weighted sum
of `values` by the sum of `counts` over all ranks, so that partial batches and missing labels are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_transfer.errors import UserError, require
from lit_transfer.objectives.calibration import CALIBRATED_TASKS
from lit_transfer.recipe import Objective

TASKS = ("multiclass", "multilabel", "ordinal", "regression")


def outputs(task: str, classes: int) -> int:
    """Width of the network's last layer for `classes` classes (label columns: multilabel, regression)."""
    assert task in TASKS, task
    return classes - 1 if task == "ordinal" else classes


def check_objective(task: str, objective: Objective) -> None:
    """Raise `UserError` for settings that have no meaning in this task."""
    o = objective
    require(
        o.label_smoothing == 0 or task == "multiclass",
        f"objective.label_smoothing {o.label_smoothing} is for multiclass, this task is {task}; set it to 0.",
    )
    require(
        o.focal_gamma == 0 or task in ("multiclass", "multilabel"),
        f"objective.focal_gamma {o.focal_gamma} is for multiclass and multilabel, this task is {task}; set it to 0.",
    )
    require(
        o.focal_gamma == 0 or o.label_smoothing == 0,
        f"objective.focal_gamma {o.focal_gamma} is defined for hard targets, but label_smoothing is "
        f"{o.label_smoothing}; set one of them to 0.",
    )
    require(
        not o.temperature_scaling or task in CALIBRATED_TASKS,
        f"objective.temperature_scaling true is for multiclass and multilabel, this task is {task}; set it to false.",
    )
    require(
        o.class_weights is None or task != "regression",
        f"objective.class_weights {o.class_weights} needs classes, this task is {task}; set it to null.",
    )


def class_weights(objective: Objective, target: Tensor, task: str, classes: Sequence[str]) -> Tensor | None:
    """The weights that `loss_rows` takes, fp32 `[len(classes)]`, or None where all weigh the same.

    Args:
        objective: its `class_weights` is resolved. A list is taken as given. `balanced` comes from the
            labelled `target`: N / (K * count) of each class; in multilabel negatives / positives of each
            label, which is the ratio of these two weights for one label.
        target: training targets, `[N]` (-1 missing), or `[N, L]` (NaN missing) in multilabel.
        task: of the dataset.
        classes: names of the classes, or of the label columns in multilabel.

    Raises:
        UserError: a list of another length, or `balanced` where a class (a side of a label) has no sample.
    """
    check_objective(task, objective)
    given = objective.class_weights
    if given is None:
        return None
    if isinstance(given, list):
        require(
            len(given) == len(classes),
            f"objective.class_weights has {len(given)} weights for {len(classes)} classes; "
            f"give one for each of {', '.join(classes)}.",
        )
        return torch.tensor(given, dtype=torch.float32)
    if task == "multilabel":
        positives, negatives = (target == 1).sum(0), (target == 0).sum(0)
        _require_samples(positives, classes, "positive training sample")
        _require_samples(negatives, classes, "negative training sample")
        return (negatives / positives).float()
    counts = torch.bincount(target[target >= 0], minlength=len(classes))
    _require_samples(counts, classes, "training sample")
    return (counts.sum() / (len(classes) * counts)).float()


def _require_samples(counts: Tensor, classes: Sequence[str], what: str) -> None:
    absent = [name for name, count in zip(classes, counts.tolist(), strict=True) if count == 0]
    if absent:
        raise UserError(
            f"objective.class_weights 'balanced' is undefined: {', '.join(absent)} has no {what}; "
            "give a list of weights instead."
        )


def loss_rows(
    task: str, logits: Tensor, target: Tensor, objective: Objective, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss of each row, in fp32 also under autocast.

    multiclass: cross-entropy. multilabel: binary cross-entropy of each label. Where `focal_gamma` > 0, either
    is the focal loss of Lin et al. 2017 (eq. 4; eq. 5 with `class_weights` as alpha). ordinal: binary
    cross-entropy of P(y > k), summed over the K - 1 thresholds (Niu et al. 2016). regression: squared error.

    Args:
        task: of the dataset.
        logits: `[B, O]`, see `outputs`.
        target: int64 `[B]` (-1 missing), or float `[B, O]` (NaN missing) in multilabel and regression.
        objective: settings that passed `check_objective`.
        class_weights: `[K]` by the true class, or `[L]` of each label's positives in multilabel.

    Returns:
        `values` `[B]`, the sum over the row's labelled entries, and `counts` `[B]`, their number. A missing
        entry adds zero to both and to the gradient.
    """
    logits = logits.float()
    if task == "multiclass":
        return _multiclass(logits, target, objective, class_weights), (target >= 0).float()
    if task == "ordinal":
        return _ordinal(logits, target, class_weights), (target >= 0).float()
    assert task in ("multilabel", "regression"), task
    assert logits.shape == target.shape, (logits.shape, target.shape)
    labelled = ~target.isnan()
    filled = torch.where(labelled, target, 0.0).float()
    if task == "multilabel":
        entries = _multilabel(logits, filled, objective, class_weights)
    else:
        entries = F.mse_loss(logits, filled, reduction="none")
    return torch.where(labelled, entries, 0.0).sum(1), labelled.sum(1).float()


def _multiclass(logits: Tensor, target: Tensor, objective: Objective, weights: Tensor | None) -> Tensor:
    smoothing = objective.label_smoothing
    values = F.cross_entropy(logits, target, weights, ignore_index=-1, reduction="none", label_smoothing=smoothing)
    if objective.focal_gamma == 0:
        return values
    plain = F.cross_entropy(logits, target, ignore_index=-1, reduction="none")
    return _focal_factor(plain, objective.focal_gamma) * values


def _multilabel(logits: Tensor, target: Tensor, objective: Objective, weights: Tensor | None) -> Tensor:
    entries = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weights, reduction="none")
    if objective.focal_gamma == 0:
        return entries
    plain = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return _focal_factor(plain, objective.focal_gamma) * entries


def _focal_factor(cross_entropy: Tensor, gamma: float) -> Tensor:
    """(1 - p_t) ** gamma, where cross_entropy = -log p_t."""
    # x ** gamma has an infinite slope at 0 for gamma < 1: the clamp keeps the gradient of a certain row at 0.
    return (-torch.expm1(-cross_entropy)).clamp(min=torch.finfo(torch.float32).tiny) ** gamma


def _ordinal(logits: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    thresholds = torch.arange(logits.shape[1], device=logits.device)
    passed = (target[:, None] > thresholds).float()
    values = F.binary_cross_entropy_with_logits(logits, passed, reduction="none").sum(1)
    if weights is not None:
        values = values * weights[target.clamp(min=0)]
    return torch.where(target >= 0, values, 0.0)
