"""Calibration error against a plain loop, and temperatures against those that were put in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lit_transfer.objectives.calibration import (
    BINS,
    calibration_metrics,
    fit_temperature,
    reliability,
    rescale,
)
from lit_transfer.objectives.decisions import decide, probabilities

NAN = float("nan")


def problem(task: str, sharpness: float, rows: int = 4000, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 logits `[N, K]`, `sharpness` times those that the targets were drawn from; their probabilities; targets."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, width, generator=generator)
    if task == "multiclass":
        target = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    else:
        target = torch.bernoulli(logits.sigmoid(), generator=generator)
    return sharpness * logits, probabilities(task, sharpness * logits), target


def hide(target: Tensor) -> Tensor:
    """Targets of which every third is missing."""
    hidden = target.clone()
    hidden.view(-1)[::3] = -1 if target.ndim == 1 else NAN
    return hidden


def looped_error(confidences: list[float], hits: list[bool]) -> float:
    """Guo et al. 2017, eq. 3, bin by bin."""
    total = 0.0
    for m in range(1, BINS + 1):
        inside = [i for i, c in enumerate(confidences) if (m - 1) / BINS < c <= m / BINS or (m == 1 and c == 0)]
        if inside:
            accuracy = sum(hits[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            total += len(inside) / len(confidences) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("width", [2, 5])
def test_the_error_of_classes_is_that_of_a_loop(width: int) -> None:
    _, said, target = problem("multiclass", 3, 300, width)
    target = hide(target)
    rows = [(p, t) for p, t in zip(said.tolist(), target.tolist(), strict=True) if t >= 0]
    if width == 2:  # the probability of class 1, which may be under one half
        pairs = [(p[1], t == 1) for p, t in rows]
        reference = binary_calibration_error(said[target >= 0, 1], target[target >= 0], n_bins=BINS)
    else:
        pairs = [(max(p), p.index(max(p)) == t) for p, t in rows]
        reference = multiclass_calibration_error(said[target >= 0], target[target >= 0], width, n_bins=BINS)
    error = reliability("multiclass", said, target).error
    assert error == pytest.approx(looped_error(*map(list, zip(*pairs, strict=True))), abs=1e-12)
    assert error == pytest.approx(float(reference), abs=1e-6) and error > 0.05


def test_the_error_of_labels_is_that_of_a_loop_over_all_entries() -> None:
    _, said, target = problem("multilabel", 3, 100)
    target = hide(target)
    pairs = [(p, t == 1) for p, t in zip(said.flatten().tolist(), target.flatten().tolist(), strict=True) if t == t]
    error = reliability("multilabel", said, target).error
    assert error == pytest.approx(looped_error(*map(list, zip(*pairs, strict=True))), abs=1e-12)
    assert error > 0.05


def test_bins_hold_their_upper_edge_and_0_and_1_have_none_of_their_own() -> None:
    scores = torch.tensor([0.0, 1 / BINS, 0.99, 1.0], dtype=torch.float64)
    binned = reliability("multilabel", scores[:, None], torch.tensor([[0.0], [1.0], [1.0], [0.0]]))
    assert binned.counts.tolist() == [2] + [0] * (BINS - 2) + [2]
    assert binned.hits.tolist() == [1] + [0] * (BINS - 2) + [1]
    assert binned.confidences[0] == pytest.approx(1 / BINS) and binned.confidences[-1] == pytest.approx(1.99)


@pytest.mark.parametrize(("task", "width"), [("multiclass", 5), ("multiclass", 2), ("multilabel", 5)])
def test_nll_is_that_of_the_logits(task: str, width: int) -> None:
    logits, said, target = problem(task, 1, 200, width)
    target = hide(target)
    if task == "multiclass":
        expected = torch.nn.functional.cross_entropy(logits, target, ignore_index=-1)
    else:
        seen = ~target.isnan()
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[seen], target[seen])
    assert calibration_metrics(task, said, target)["nll"] == pytest.approx(float(expected), rel=1e-6)


def test_what_is_undefined_is_nan_and_what_is_certain_is_finite() -> None:
    target = torch.tensor([1, 0])
    for said, truth in (
        (torch.full((2, 2), NAN), target),
        (torch.full((2, 2), 0.5), torch.tensor([-1, -1])),
    ):
        assert all(math.isnan(value) for value in calibration_metrics("multiclass", said, truth).values())
    wrong = calibration_metrics("multiclass", torch.tensor([[1.0, 0.0], [0.0, 1.0]]), target)
    assert wrong["calibration_error"] == 1 and 80 < wrong["nll"] < 90
    assert calibration_metrics("ordinal", torch.full((2, 2), 0.5), target) == {}


@pytest.mark.parametrize("sharpness", [0.25, 1.0, 3.0])
@pytest.mark.parametrize(("task", "width"), [("multiclass", 5), ("multiclass", 2), ("multilabel", 5)])
def test_the_temperature_is_that_which_was_put_in(task: str, width: int, sharpness: float) -> None:
    _, said, target = problem(task, sharpness, width=width)
    temperature = fit_temperature(task, said, hide(target))
    assert temperature == pytest.approx(sharpness, rel=0.1)
    before, after = (calibration_metrics(task, p, target) for p in (said, rescale(task, said, temperature)))
    if sharpness != 1:
        assert after["calibration_error"] < 0.5 * before["calibration_error"] and after["nll"] < before["nll"]


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_no_other_temperature_is_better(task: str) -> None:
    logits, said, target = problem(task, 2.5, 500)

    def loss(temperature: float) -> Tensor:
        scaled = logits.double() / temperature
        if task == "multiclass":
            return torch.nn.functional.cross_entropy(scaled, target)
        return torch.nn.functional.binary_cross_entropy_with_logits(scaled, target.double())

    best = fit_temperature(task, said, target)
    assert loss(best) < min(loss(best * 0.999), loss(best * 1.001))


@pytest.mark.parametrize("scale", [1e-3, 8.0])
def test_the_temperature_grows_with_the_logits(scale: float) -> None:
    logits, said, target = problem("multiclass", 1, 500, 3)
    temperature = fit_temperature("multiclass", probabilities("multiclass", scale * logits), target)
    assert temperature == pytest.approx(scale * fit_temperature("multiclass", said, target), rel=1e-3)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_probabilities_are_those_of_the_divided_logits(task: str, temperature: float) -> None:
    logits, said, _ = problem(task, 1, 200)
    exact = logits.double() / temperature
    expected = exact.softmax(1) if task == "multiclass" else exact.sigmoid()
    scaled = rescale(task, said, temperature)
    assert scaled.dtype == torch.float64
    torch.testing.assert_close(scaled, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0, 1e4])
def test_no_decision_among_classes_changes(temperature: float) -> None:
    _, said, _ = problem("multiclass", 3)
    half = torch.tensor(0.5)
    near = torch.stack([half, torch.nextafter(half, torch.tensor(1.0)), half], 0)[None]  # apart by one step of fp32
    tied, certain = torch.tensor([[0.2, 0.4, 0.4]]), torch.tensor([[0.0, 1.0, 0.0]])
    for rows in (said, near, tied, certain):
        assert torch.equal(decide("multiclass", rescale("multiclass", rows, temperature)), decide("multiclass", rows))


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "ordinal", "regression"])
def test_without_a_temperature_probabilities_are_the_same_tensor(task: str) -> None:
    said = torch.rand(3, 4)
    assert rescale(task, said, None) is said


@pytest.mark.parametrize(
    ("task", "said", "target"),
    [
        ("multiclass", [[0.9, 0.1], [0.3, 0.7]], [0, 1]),  # all right: the sharper, the likelier
        ("multiclass", [[0.9, 0.1], [0.3, 0.7]], [1, 0]),  # all wrong: the flatter, the likelier
        ("multiclass", [[0.5, 0.5], [0.5, 0.5]], [1, 0]),
        ("multiclass", [[0.9, 0.1], [0.3, 0.7]], [-1, -1]),
        ("multiclass", [[NAN, NAN], [0.3, 0.7]], [0, 0]),
        ("multilabel", [[0.9, 0.1], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]),
        ("multilabel", [[0.9, 0.1]], [[0.0, NAN]]),
        ("multilabel", [[0.9, 0.1]], [[NAN, NAN]]),
    ],
)
def test_where_none_is_best_the_temperature_is_1(task: str, said: list[list[float]], target: list[object]) -> None:
    assert fit_temperature(task, torch.tensor(said), torch.tensor(target)) == 1


def test_certain_labels_that_are_wrong_still_have_a_temperature() -> None:
    """A label at exactly 0 or 1 in fp32 has a bounded logit, so one mistake does not make the loss infinite."""
    said = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    temperature = fit_temperature("multilabel", said, torch.tensor([[1.0], [1.0], [0.0], [0.0]]))
    assert 1 < temperature < 100
    assert bool(rescale("multilabel", said, temperature).isfinite().all())
