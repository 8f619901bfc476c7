"""Probabilities, decisions and thresholds."""

from __future__ import annotations

import itertools

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from torch import Tensor

from lit_transfer.objectives.decisions import choose_threshold, decide, probabilities

NAN = float("nan")
SCORES = {"f1": f1_score, "accuracy": accuracy_score, "balanced_accuracy": balanced_accuracy_score}


def binary(scores: Tensor) -> Tensor:
    """`[N, 2]` from the score of class 1."""
    return torch.stack([1 - scores, scores], 1)


def test_probabilities() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.bfloat16)
    for task in ("multiclass", "multilabel", "ordinal", "regression"):
        assert probabilities(task, logits).dtype == torch.float32
    torch.testing.assert_close(probabilities("multiclass", logits).sum(1), torch.ones(1))
    torch.testing.assert_close(probabilities("multilabel", logits), logits.float().sigmoid())
    assert torch.equal(probabilities("regression", logits), logits.float())


def test_ordinal_probabilities_are_differences_of_the_monotone_cumulative_ones() -> None:
    above = torch.tensor([[0.9, 0.6, 0.2], [0.4, 0.7, 0.1]])
    p = probabilities("ordinal", above.logit())
    torch.testing.assert_close(p, torch.tensor([[0.1, 0.3, 0.4, 0.2], [0.6, 0.0, 0.3, 0.1]]))
    random = probabilities("ordinal", 3 * torch.randn(50, 5))
    assert (random >= 0).all()
    torch.testing.assert_close(random.sum(1), torch.ones(50))


def test_ordinal_decision_counts_the_thresholds_passed() -> None:
    above = torch.tensor([[0.9, 0.55, 0.2], [0.9, 0.8, 0.7], [0.3, 0.2, 0.1], [0.6, 0.45, 0.3]])
    assert decide("ordinal", probabilities("ordinal", above.logit())).tolist() == [2, 3, 0, 1]
    # The median class, not the likeliest one: class 0 has 0.4 here, but P(y > 0) is 0.6.
    assert decide("ordinal", torch.tensor([[0.4, 0.3, 0.3]])).tolist() == [1]


def test_decide() -> None:
    p = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    assert decide("multiclass", p).tolist() == [0, 1]
    assert decide("multiclass", p, [0.3 - 1e-6]).tolist() == [1, 1]
    assert decide("multiclass", p, [0.9]).tolist() == [0, 0]
    assert decide("multilabel", p, [0.1, 0.5]).tolist() == [[True, False], [True, True]]
    assert decide("multilabel", p).tolist() == [[True, False], [False, True]]
    assert torch.equal(decide("regression", p), p)


def test_a_threshold_between_neighbouring_floats_separates_them() -> None:
    low = torch.tensor(0.3)
    high = torch.nextafter(low, torch.tensor(1.0))
    p, target = binary(torch.stack([low, high])), torch.tensor([0, 1])
    threshold = choose_threshold("multiclass", p, target, "f1")
    assert decide("multiclass", p, threshold).tolist() == [0, 1]


@pytest.mark.parametrize("metric", list(SCORES))
@pytest.mark.parametrize("seed", range(4))
def test_threshold_is_the_exact_maximiser(metric: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(2, (40,), generator=generator)
    scores = (0.3 * target + torch.rand(40, generator=generator)).mul(8).round() / 12  # with ties
    chosen = choose_threshold("multiclass", binary(scores), target, metric)
    assert chosen is not None and len(chosen) == 1
    levels = sorted({0.0, 1.0, *scores.tolist()})
    candidates = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    quality = [SCORES[metric](target, scores.double() >= c) for c in candidates]
    best = [c for c, q in zip(candidates, quality, strict=True) if q > max(quality) - 1e-12]
    assert chosen[0] == min(best, key=lambda c: abs(c - 0.5))


def test_ties_go_to_the_candidate_nearest_one_half() -> None:
    p, target = binary(torch.tensor([0.1, 0.2, 0.6, 0.9])), torch.tensor([0, 1, 0, 1])
    # Accuracy 3/4 at 0.15 and at 0.75; 0.4 has 2/4.
    assert choose_threshold("multiclass", p, target, "accuracy") == pytest.approx([0.75])


def test_one_class_only_or_nan_gives_one_half() -> None:
    p = binary(torch.tensor([0.1, 0.9]))
    assert choose_threshold("multiclass", p, torch.tensor([1, 1]), "f1") == [0.5]
    assert choose_threshold("multiclass", p, torch.tensor([-1, -1]), "f1") == [0.5]
    assert choose_threshold("multiclass", binary(torch.tensor([0.1, NAN])), torch.tensor([0, 1]), "f1") == [0.5]
    assert choose_threshold("multiclass", p[:0], torch.tensor([0, 0])[:0], "f1") == [0.5]


def test_missing_labels_are_left_out() -> None:
    scores = torch.tensor([0.1, 0.3, 0.8, 0.9, 0.2])
    hidden = torch.tensor([0, 1, 1, -1, -1])
    assert choose_threshold("multiclass", binary(scores), hidden, "f1") == pytest.approx([0.2])
    p = torch.stack([scores, scores], 1)
    target = torch.tensor([[0.0, NAN], [1.0, 0.0], [1.0, NAN], [NAN, 1.0], [NAN, NAN]])
    assert choose_threshold("multilabel", p, target, "f1") == pytest.approx([0.2, 0.6])


def test_other_tasks_have_no_threshold() -> None:
    p = torch.full((2, 3), 1 / 3)
    assert choose_threshold("multiclass", p, torch.tensor([0, 1]), "f1") is None
    assert choose_threshold("ordinal", p[:, :2], torch.tensor([0, 1]), "f1") is None
    assert choose_threshold("regression", p, p, "f1") is None
