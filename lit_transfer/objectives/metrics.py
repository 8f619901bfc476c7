"""Figures of merit by task, on the CPU. What is undefined (of an absent class) is NaN, never an error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    binary_precision,
    binary_recall,
    multiclass_accuracy,
    multiclass_cohen_kappa,
    multiclass_confusion_matrix,
)
from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error, r2_score

from lit_transfer.objectives.decisions import decide

NAN = float("nan")
Row = dict[str, float | int | str]


def metrics(
    task: str, probabilities: Tensor, target: Tensor, threshold: Sequence[float] | None = None
) -> dict[str, float]:
    """The task's figures over labelled samples, without a split prefix.

    multiclass: accuracy, balanced_accuracy (mean recall of the classes that occur), f1 (macro), auroc and
    average_precision (of class 1 if there are two, else the mean of each class against the rest),
    top5_accuracy above 5 classes. multilabel: f1, auroc and average_precision (means over the labels where
    they are defined), accuracy (of labelled entries), exact_match (of fully labelled rows). ordinal:
    accuracy, balanced_accuracy, mae (in classes), kappa (quadratic weights). regression: mae, rmse and r2
    (means over the targets).

    Args:
        task: of the dataset.
        probabilities: `[N, K]` from `decisions.probabilities`; if one is not finite every figure is NaN.
        target: int64 `[N]` (-1 missing), or float `[N, K]` (NaN missing) in multilabel and regression.
        threshold: from `decisions.choose_threshold`.
    """
    probabilities, target = probabilities.detach().cpu(), target.cpu()
    result = _BY_TASK[task](probabilities.nan_to_num(0, 0, 0), target, threshold)
    return result if _finite(probabilities) else dict.fromkeys(result, NAN)


def metric_names(task: str, width: int) -> tuple[str, ...]:
    """What `metrics` gives for a task with probabilities [N, width]."""
    target = torch.zeros(2, width) if task in ("multilabel", "regression") else torch.zeros(2, dtype=torch.long)
    return tuple(metrics(task, torch.full((2, width), 1 / width), target))


def per_class(
    task: str, probabilities: Tensor, target: Tensor, threshold: Sequence[float] | None, names: Sequence[str]
) -> list[Row]:
    """One row for each class (multiclass, ordinal), label (multilabel) or target (regression).

    Keys: name; samples (of the class; labelled ones of a label or target); positives (multilabel); precision,
    recall, f1, auroc, average_precision (a class against the rest); or mae, rmse, r2 (regression). Arguments
    as in `metrics`.
    """
    probabilities, target = probabilities.detach().cpu(), target.cpu()
    rows = _rows(task, probabilities.nan_to_num(0, 0, 0), target, threshold)
    if not _finite(probabilities):
        rows = [{key: NAN if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    return [{"name": name, **row} for name, row in zip(names, rows, strict=True)]


def confusion(task: str, probabilities: Tensor, target: Tensor, threshold: Sequence[float] | None = None) -> Tensor:
    """Counts `[K, K]` of multiclass and ordinal decisions; rows are true classes, columns predicted ones."""
    assert task in ("multiclass", "ordinal"), task
    probabilities, target = probabilities.detach().cpu(), target.cpu()
    labelled = target >= 0
    decided = decide(task, probabilities[labelled], threshold)
    return multiclass_confusion_matrix(decided, target[labelled], probabilities.shape[1])


def _rows(task: str, probabilities: Tensor, target: Tensor, threshold: Sequence[float] | None) -> list[Row]:
    if task == "regression":
        return [_errors(p, t) for p, t in zip(probabilities.unbind(1), target.unbind(1), strict=True)]
    decided = decide(task, probabilities, threshold)
    if task == "multilabel":
        columns = zip(probabilities.unbind(1), target.unbind(1), decided.unbind(1), strict=True)
        return [_label_row(p, t, d) for p, t, d in columns]
    seen = target >= 0
    p, t, d = probabilities[seen], target[seen], decided[seen]
    return [{"samples": int((t == k).sum()), **_one_against_rest(p[:, k], t == k, d == k)} for k in range(p.shape[1])]


def _label_row(scores: Tensor, target: Tensor, decided: Tensor) -> Row:
    seen = ~target.isnan()
    positive = target[seen] == 1
    counts = {"samples": int(seen.sum()), "positives": int(positive.sum())}
    return {**counts, **_one_against_rest(scores[seen], positive, decided[seen])}


def _one_against_rest(scores: Tensor, positive: Tensor, decided: Tensor) -> Row:
    truth, said = positive.long(), decided.long()
    occurs, accused = bool(positive.any()), bool(decided.any())
    ranked = occurs and not bool(positive.all())
    return {
        "precision": float(binary_precision(said, truth)) if accused else NAN,
        "recall": float(binary_recall(said, truth)) if occurs else NAN,
        "f1": float(binary_f1_score(said, truth)) if occurs or accused else NAN,
        "auroc": float(binary_auroc(scores.double(), truth)) if ranked else NAN,
        "average_precision": float(binary_average_precision(scores.double(), truth)) if ranked else NAN,
    }


def _multiclass(probabilities: Tensor, target: Tensor, threshold: Sequence[float] | None) -> dict[str, float]:
    rows = _rows("multiclass", probabilities, target, threshold)
    seen = target >= 0
    p, t = probabilities[seen], target[seen]
    ranked = rows[1:] if len(rows) == 2 else rows
    result = {
        "accuracy": _share(decide("multiclass", p, threshold) == t),
        "balanced_accuracy": _mean(rows, "recall"),
        "f1": _mean(rows, "f1"),
        "auroc": _mean(ranked, "auroc"),
        "average_precision": _mean(ranked, "average_precision"),
    }
    if len(rows) > 5:
        top5 = float(multiclass_accuracy(p, t, len(rows), average="micro", top_k=5)) if len(t) else NAN
        result["top5_accuracy"] = top5
    return result


def _multilabel(probabilities: Tensor, target: Tensor, threshold: Sequence[float] | None) -> dict[str, float]:
    rows = _rows("multilabel", probabilities, target, threshold)
    right = decide("multilabel", probabilities, threshold) == (target == 1)
    seen = ~target.isnan()
    return {
        "f1": _mean(rows, "f1"),
        "auroc": _mean(rows, "auroc"),
        "average_precision": _mean(rows, "average_precision"),
        "accuracy": _share(right[seen]),
        "exact_match": _share(right[seen.all(1)].all(1)),
    }


def _ordinal(probabilities: Tensor, target: Tensor, threshold: Sequence[float] | None) -> dict[str, float]:
    seen = target >= 0
    p, t = probabilities[seen], target[seen]
    decided = decide("ordinal", p, threshold)
    kappa = float(multiclass_cohen_kappa(decided, t, p.shape[1], weights="quadratic")) if len(t) else NAN
    return {
        "accuracy": _share(decided == t),
        "balanced_accuracy": _mean(_rows("ordinal", p, t, threshold), "recall"),
        "mae": float((decided - t).abs().double().mean()),
        "kappa": kappa,
    }


def _regression(values: Tensor, target: Tensor, threshold: Sequence[float] | None) -> dict[str, float]:
    rows = _rows("regression", values, target, threshold)
    return {name: _mean(rows, name) for name in ("mae", "rmse", "r2")}


def _errors(values: Tensor, target: Tensor) -> Row:
    seen = ~target.isnan()
    # In fp64, because r2 subtracts sums of squares, nearly equal ones when the mean is large (a year, say).
    v, t = values[seen].double(), target[seen].double()
    varies = len(t) > 1 and bool((t != t[0]).any())
    return {
        "samples": len(t),
        "mae": float(mean_absolute_error(v, t)) if len(t) else NAN,
        "rmse": float(mean_squared_error(v, t, squared=False)) if len(t) else NAN,
        "r2": float(r2_score(v, t)) if varies else NAN,
    }


_BY_TASK = {
    "multiclass": _multiclass,
    "multilabel": _multilabel,
    "ordinal": _ordinal,
    "regression": _regression,
}


def _finite(probabilities: Tensor) -> bool:
    return bool(probabilities.isfinite().all())


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _mean(rows: Sequence[Row], name: str) -> float:
    """The mean of the rows where the figure is defined."""
    values = [float(row[name]) for row in rows]
    return float(torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64).mean())
