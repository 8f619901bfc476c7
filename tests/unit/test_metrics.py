"""Metrics agree with scikit-learn, ignore missing labels, and are NaN where they are undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from torch import Tensor

from lit_transfer.objectives.decisions import decide
from lit_transfer.objectives.metrics import confusion, metrics, per_class

NAN = float("nan")
CLOSE = {"rel": 1e-5, "abs": 1e-6}


def draw(classes: int, rows: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities that know a little, and classes."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (rows,), generator=generator)
    logits = torch.randn(rows, classes, generator=generator)
    logits[torch.arange(rows), target] += 1
    return logits.softmax(1), target


def draw_labels() -> tuple[Tensor, Tensor]:
    """Three labels, some missing."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(2, (60, 3), generator=generator).float()
    p = (0.4 * target + 0.6 * torch.rand(60, 3, generator=generator)).clamp(0, 1)
    target[torch.rand(60, 3, generator=generator) < 0.2] = NAN
    return p, target


def all_nan(values: dict[str, float]) -> bool:
    return all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize("threshold", [None, [0.31]])
def test_binary(threshold: list[float] | None) -> None:
    p, t = draw(2)
    d = (p[:, 1].double() >= (threshold or [0.5])[0]).long()
    assert metrics("multiclass", p, t, threshold) == pytest.approx(
        {
            "accuracy": sk.accuracy_score(t, d),
            "balanced_accuracy": sk.balanced_accuracy_score(t, d),
            "f1": sk.f1_score(t, d, average="macro"),
            "auroc": sk.roc_auc_score(t, p[:, 1]),
            "average_precision": sk.average_precision_score(t, p[:, 1]),
        },
        **CLOSE,
    )


def test_multiclass() -> None:
    p, t = draw(7, rows=150)
    d = p.argmax(1)
    hot = np.eye(7)[t.numpy()]
    assert metrics("multiclass", p, t) == pytest.approx(
        {
            "accuracy": sk.accuracy_score(t, d),
            "balanced_accuracy": sk.balanced_accuracy_score(t, d),
            "f1": sk.f1_score(t, d, average="macro"),
            "auroc": sk.roc_auc_score(hot, p, average="macro"),
            "average_precision": sk.average_precision_score(hot, p, average="macro"),
            "top5_accuracy": sk.top_k_accuracy_score(t, p, k=5),
        },
        **CLOSE,
    )


def test_classes_that_do_not_occur_are_left_out() -> None:
    p, t = draw(4)
    kept = (t != 3) & (p.argmax(1) != 3)
    p, t = p[kept], t[kept]
    result = metrics("multiclass", p, t)
    assert result["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(t, p.argmax(1)), **CLOSE)
    assert result["f1"] == pytest.approx(sk.f1_score(t, p.argmax(1), average="macro"), **CLOSE)
    one_against_rest = [sk.roc_auc_score(t == k, p[:, k]) for k in range(3)]
    assert result["auroc"] == pytest.approx(np.mean(one_against_rest), **CLOSE)


def test_a_class_that_is_only_predicted_lowers_f1_and_not_recall() -> None:
    p, t = torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 1])
    result = metrics("multiclass", p, t)
    assert result["balanced_accuracy"] == pytest.approx(0.75)
    assert result["f1"] == pytest.approx(sk.f1_score(t, p.argmax(1), average="macro"))


def test_multilabel() -> None:
    p, t = draw_labels()
    threshold = [0.3, 0.5, 0.6]
    d = p.double() >= torch.tensor(threshold).double()
    seen = ~t.isnan()
    columns = [(t[seen[:, k], k], p[seen[:, k], k], d[seen[:, k], k]) for k in range(3)]
    whole = seen.all(1)
    assert metrics("multilabel", p, t, threshold) == pytest.approx(
        {
            "f1": np.mean([sk.f1_score(t, d) for t, p, d in columns]),
            "auroc": np.mean([sk.roc_auc_score(t, p) for t, p, d in columns]),
            "average_precision": np.mean([sk.average_precision_score(t, p) for t, p, d in columns]),
            "accuracy": sk.accuracy_score(t[seen], d[seen]),
            "exact_match": sk.accuracy_score(t[whole], d[whole]),
        },
        **CLOSE,
    )


def test_ordinal() -> None:
    p, t = draw(5)
    d = decide("ordinal", p)
    assert metrics("ordinal", p, t) == pytest.approx(
        {
            "accuracy": sk.accuracy_score(t, d),
            "balanced_accuracy": sk.balanced_accuracy_score(t, d),
            "mae": sk.mean_absolute_error(t, d),
            "kappa": sk.cohen_kappa_score(t, d, weights="quadratic"),
        },
        **CLOSE,
    )


def test_regression_with_a_large_mean() -> None:
    generator = torch.Generator().manual_seed(2)
    t = 2000 + torch.randn(50, 2, generator=generator)
    v = t + 0.5 * torch.randn(50, 2, generator=generator)
    t[:10, 1] = NAN
    columns = [(t[:, 0], v[:, 0]), (t[10:, 1], v[10:, 1])]
    assert metrics("regression", v, t) == pytest.approx(
        {
            "mae": np.mean([sk.mean_absolute_error(t, v) for t, v in columns]),
            "rmse": np.mean([sk.root_mean_squared_error(t.double(), v.double()) for t, v in columns]),
            "r2": np.mean([sk.r2_score(t.double(), v.double()) for t, v in columns]),
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("task", ["multiclass", "ordinal"])
def test_missing_classes_are_left_out(task: str) -> None:
    p, t = draw(4)
    hidden = torch.cat([t, torch.full((9,), -1)])
    padded = torch.cat([p, p[:9]])
    assert metrics(task, padded, hidden) == metrics(task, p, t)
    assert per_class(task, padded, hidden, None, "abcd") == per_class(task, p, t, None, "abcd")
    assert torch.equal(confusion(task, padded, hidden), confusion(task, p, t))


def test_what_is_undefined_is_nan() -> None:
    p, t = draw(2)
    one_class = metrics("multiclass", p, torch.ones_like(t), [0.0])
    assert math.isnan(one_class["auroc"]) and math.isnan(one_class["average_precision"])
    assert one_class["accuracy"] == one_class["balanced_accuracy"] == one_class["f1"] == 1
    for task in ("multiclass", "ordinal"):
        assert all_nan(metrics(task, draw(8)[0], torch.full((60,), -1)))
        assert all_nan(metrics(task, torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)))
    for task in ("multilabel", "regression"):
        assert all_nan(metrics(task, p, torch.full((60, 2), NAN)))
        assert all_nan(metrics(task, p[:0], torch.zeros(0, 2)))
    constant = metrics("regression", p, torch.ones(60, 2))
    assert math.isnan(constant["r2"]) and constant["mae"] > 0
    assert math.isnan(metrics("ordinal", torch.eye(3)[[1, 1]], torch.tensor([1, 1]))["kappa"])


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "ordinal", "regression"])
def test_a_diverged_network_has_no_figures(task: str) -> None:
    p, t = draw(3)
    p[0] = NAN
    target = t if task in ("multiclass", "ordinal") else torch.zeros(60, 3)
    assert all_nan(metrics(task, p, target))
    for row in per_class(task, p, target, None, "abc"):
        assert isinstance(row["samples"], int) and all_nan({k: v for k, v in row.items() if isinstance(v, float)})


def test_per_class() -> None:
    p, t = draw(3)
    rows = per_class("multiclass", p, t, None, ["a", "b", "c"])
    precision, recall, f1, samples = sk.precision_recall_fscore_support(t, p.argmax(1))
    for k, row in enumerate(rows):
        expected = [precision[k], recall[k], f1[k], samples[k], sk.roc_auc_score(t == k, p[:, k])]
        names = ["precision", "recall", "f1", "samples", "auroc"]
        assert [row[name] for name in names] == pytest.approx(expected, **CLOSE)
        assert row["average_precision"] == pytest.approx(sk.average_precision_score(t == k, p[:, k]), **CLOSE)
    assert [row["name"] for row in rows] == ["a", "b", "c"]


def test_per_label_and_per_target() -> None:
    p, t = draw_labels()
    row = per_class("multilabel", p, t, [0.4, 0.5, 0.6], ["a", "b", "c"])[2]
    seen = ~t[:, 2].isnan()
    assert (row["name"], row["samples"], row["positives"]) == (
        "c",
        int(seen.sum()),
        int((t[:, 2] == 1).sum()),
    )
    assert row["recall"] == pytest.approx(sk.recall_score(t[seen, 2], p[seen, 2] >= 0.6), **CLOSE)
    target = per_class("regression", p, t, None, ["a", "b", "c"])[1]
    assert set(target) == {"name", "samples", "mae", "rmse", "r2"}


def test_confusion_has_a_row_for_each_true_class() -> None:
    p, t = draw(3)
    assert confusion("multiclass", p, t).tolist() == sk.confusion_matrix(t, p.argmax(1)).tolist()
    q, u = draw(2)
    decided = q[:, 1] >= 0.2
    assert confusion("multiclass", q, u, [0.2]).tolist() == sk.confusion_matrix(u, decided).tolist()
