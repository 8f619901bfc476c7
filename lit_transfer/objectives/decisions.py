"""From logits to probabilities to a decision, and the threshold between them, by task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def probabilities(task: str, logits: Tensor) -> Tensor:
    """fp32 probabilities `[B, K]` of logits `[B, O]`.

    multiclass: of each class. multilabel: of each label. ordinal: of each of the O + 1 classes, the
    differences of P(y > k) made monotone by a running minimum. regression: the values as they are.
    """
    logits = logits.float()
    if task == "multiclass":
        return logits.softmax(1)
    if task == "multilabel":
        return logits.sigmoid()
    if task == "ordinal":
        above = logits.sigmoid().cummin(1).values
        one = torch.ones_like(above[:, :1])
        return torch.cat([one, above], 1) - torch.cat([above, torch.zeros_like(one)], 1)
    assert task == "regression", task
    return logits


def decide(task: str, probabilities: Tensor, threshold: Sequence[float] | None = None) -> Tensor:
    """The decision for each row.

    multiclass: int64 `[B]`, the likeliest class, or p[:, 1] >= threshold where one is given.
    multilabel: bool `[B, L]`, p >= threshold (0.5 without one). ordinal: int64 `[B]`, the number of k with
    P(y > k) > 0.5. regression: the values.
    """
    if task == "multiclass":
        if threshold is None:
            return probabilities.argmax(1)
        assert probabilities.shape[1] == 2 and len(threshold) == 1, (probabilities.shape, threshold)
        return _at_least(probabilities[:, 1:], threshold)[:, 0].long()
    if task == "multilabel":
        return _at_least(probabilities, threshold or [0.5] * probabilities.shape[1])
    if task == "ordinal":
        above = probabilities.flip(1).cumsum(1).flip(1)[:, 1:]
        return (above > 0.5).sum(1)
    assert task == "regression", task
    return probabilities


def _at_least(scores: Tensor, threshold: Sequence[float]) -> Tensor:
    # In fp64, because a midpoint of two neighbouring fp32 scores rounds onto one of them.
    return scores.double() >= torch.tensor(threshold, dtype=torch.float64, device=scores.device)


def choose_threshold(task: str, probabilities: Tensor, target: Tensor, metric: str) -> list[float] | None:
    """The threshold that maximises `metric` on these samples: one if binary, one per label if multilabel.

    Candidates are the midpoints of the distinct values among 0, the scores and 1; of equally good ones the
    nearest to 0.5 is taken. Where the labelled samples hold one class only, or a
    score is NaN, it is 0.5.

    Args:
        task: of the dataset; None is returned where it has no threshold.
        probabilities: `[N, K]`.
        target: `[N]` (-1 missing), or `[N, L]` (NaN missing) in multilabel.
        metric: `f1` (of the positive class), `accuracy` or `balanced_accuracy`.
    """
    if task == "multiclass" and probabilities.shape[1] == 2:
        labelled = target >= 0
        return [_best_threshold(probabilities[labelled, 1], target[labelled] == 1, metric)]
    if task != "multilabel":
        return None
    columns = zip(probabilities.unbind(1), target.unbind(1), strict=True)
    return [_best_threshold(scores[~t.isnan()], t[~t.isnan()] == 1, metric) for scores, t in columns]


def _best_threshold(scores: Tensor, positive: Tensor, metric: str) -> float:
    n, n_positive = len(positive), int(positive.sum())
    if n_positive in (0, n) or bool(scores.isnan().any()):
        return 0.5
    scores, order = scores.double().sort()
    edges = torch.unique_consecutive(torch.cat([scores.new_zeros(1), scores, scores.new_ones(1)]))
    candidates = (edges[:-1] + edges[1:]) / 2
    below = torch.searchsorted(scores, candidates)
    missed = torch.cat([positive.new_zeros(1, dtype=torch.long), positive[order].long().cumsum(0)])[below]
    hit, rejected = n_positive - missed, below - missed
    quality = _quality(metric, hit, rejected, n_positive, n - n_positive)
    best = candidates[quality == quality.max()]
    return float(best[(best - 0.5).abs().argmin()])


def _quality(metric: str, hit: Tensor, rejected: Tensor, n_positive: int, n_negative: int) -> Tensor:
    """A number that grows with the metric; equal metrics give equal numbers (whole, or one correctly rounded
    division), so that ties are seen.
    """
    if metric == "f1":
        return 2 * hit / (hit.double() + n_positive + n_negative - rejected)
    if metric == "accuracy":
        return hit + rejected
    assert metric == "balanced_accuracy", metric
    return hit * n_negative + rejected * n_positive
