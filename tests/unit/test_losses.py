"""Losses agree with their definitions, ignore missing labels exactly, and refuse settings without meaning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_transfer.errors import UserError
from lit_transfer.objectives.losses import TASKS, check_objective, class_weights, loss_rows, outputs
from lit_transfer.recipe import Objective

NAN = float("nan")
PLAIN = Objective()


def draw(task: str, rows: int = 6, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Logits and complete targets."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(rows, outputs(task, classes), generator=generator)
    if task in ("multiclass", "ordinal"):
        return logits, torch.randint(classes, (rows,), generator=generator)
    if task == "multilabel":
        return logits, torch.randint(2, (rows, classes), generator=generator).float()
    return logits, torch.randn(rows, classes, generator=generator)


def drop_labels(target: Tensor) -> Tensor:
    """The whole first row, and one further entry where a row has several."""
    target = target.clone()
    target[0] = NAN if target.is_floating_point() else -1
    if target.ndim == 2:
        target[2, 1] = NAN
    return target


def test_outputs() -> None:
    assert [outputs(task, 5) for task in TASKS] == [5, 5, 4, 5]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_multiclass_is_cross_entropy(smoothing: float) -> None:
    logits, target = draw("multiclass")
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    objective = Objective(label_smoothing=smoothing)
    values, counts = loss_rows("multiclass", logits, target, objective, weights)
    soft = F.one_hot(target, 4) * (1 - smoothing) + smoothing / 4
    expected = -(soft * weights * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(values, expected)
    assert counts.tolist() == [1] * 6


def test_multilabel_is_binary_cross_entropy() -> None:
    logits, target = draw("multilabel")
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    values, counts = loss_rows("multilabel", logits, target, PLAIN, weights)
    p = logits.sigmoid()
    expected = -(weights * target * p.log() + (1 - target) * (1 - p).log()).sum(1)
    torch.testing.assert_close(values, expected)
    assert counts.tolist() == [4] * 6


def test_ordinal_is_the_sum_over_thresholds() -> None:
    logits, target = draw("ordinal")
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    values, counts = loss_rows("ordinal", logits, target, PLAIN, weights)
    for row, label in enumerate(target.tolist()):
        above = logits[row].sigmoid()
        expected = sum(-(above[k] if label > k else 1 - above[k]).log() for k in range(3)) * weights[label]
        torch.testing.assert_close(values[row], expected)
    assert counts.tolist() == [1] * 6


def test_regression_is_squared_error() -> None:
    logits, target = draw("regression")
    values, counts = loss_rows("regression", logits, target, PLAIN, None)
    torch.testing.assert_close(values, ((logits - target) ** 2).sum(1))
    assert counts.tolist() == [4] * 6


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_focal(task: str) -> None:
    logits, target = draw(task)
    hot = F.one_hot(target, 4).bool() if task == "multiclass" else target.bool()
    p = logits.softmax(1) if task == "multiclass" else logits.sigmoid()
    p_t = p[hot] if task == "multiclass" else torch.where(hot, p, 1 - p)
    alpha = torch.tensor([1.0, 2.0, 0.5, 3.0])
    a_t = alpha[target] if task == "multiclass" else torch.where(hot, alpha, 1.0)
    expected = -a_t * (1 - p_t) ** 1.5 * p_t.log()
    values, _ = loss_rows(task, logits, target, Objective(focal_gamma=1.5), alpha)
    torch.testing.assert_close(values, expected if task == "multiclass" else expected.sum(1))
    nearly_plain, _ = loss_rows(task, logits, target, Objective(focal_gamma=1e-7), alpha)
    torch.testing.assert_close(nearly_plain, loss_rows(task, logits, target, PLAIN, alpha)[0])


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_gradient_is_finite_where_the_network_is_certain(task: str, gamma: float) -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    target = torch.tensor([0, 0]) if task == "multiclass" else torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    values, _ = loss_rows(task, logits, target, Objective(focal_gamma=gamma), None)
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert values[0] == 0 and values[1] > 100 and logits.grad.isfinite().all()
    assert (logits.grad[0] == 0).all() and (logits.grad[1] != 0).all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_missing_labels_add_exactly_nothing(task: str, gamma: float) -> None:
    complete, target = draw(task)
    logits = complete.requires_grad_()
    missing = drop_labels(target)
    weights = None if task == "regression" else torch.tensor([1.0, 2.0, 0.5, 3.0])
    objective = Objective(focal_gamma=gamma if task in ("multiclass", "multilabel") else 0.0)
    values, counts = loss_rows(task, logits, missing, objective, weights)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert values[0] == 0 and counts[0] == 0 and (gradient[0] == 0).all() and gradient.isfinite().all()
    whole, whole_counts = loss_rows(task, logits, target, objective, weights)
    kept = [1, 3, 4, 5]
    assert torch.equal(values[kept], whole[kept]) and torch.equal(counts[kept], whole_counts[kept])
    if target.ndim == 2:
        assert counts[2] == 3 and gradient[2, 1] == 0 and values[2] < whole[2]


@pytest.mark.parametrize("task", TASKS)
def test_half_precision_logits_give_the_fp32_loss(task: str) -> None:
    logits, target = draw(task)
    half = logits.bfloat16()
    expected, _ = loss_rows(task, half.float(), target, PLAIN, None)
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            values, counts = loss_rows(task, half, target, PLAIN, None)
        assert values.dtype == counts.dtype == torch.float32
        assert torch.equal(values, expected)


@pytest.mark.parametrize("task", TASKS)
def test_an_empty_batch_is_zero(task: str) -> None:
    logits, target = draw(task)
    values, counts = loss_rows(task, logits[:0].requires_grad_(), target[:0], PLAIN, None)
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert values.shape == counts.shape == (0,)


def test_a_regression_target_never_broadcasts() -> None:
    with pytest.raises(AssertionError):
        loss_rows("regression", torch.zeros(3, 1), torch.zeros(1, 3), PLAIN, None)


def test_balanced_weights_give_every_class_the_same_sum() -> None:
    target = torch.tensor([0, 0, 0, 1, 2, 2, -1])
    weights = class_weights(Objective(class_weights="balanced"), target, "multiclass", "abc")
    assert weights is not None and weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([6 / 9, 6 / 3, 6 / 6]))


def test_balanced_positive_weights() -> None:
    target = torch.tensor([[1.0, NAN], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    weights = class_weights(Objective(class_weights="balanced"), target, "multilabel", "ab")
    assert weights is not None and weights.tolist() == [3.0, 0.5]


def test_given_weights() -> None:
    target = torch.tensor([0, 1])
    assert class_weights(PLAIN, target, "multiclass", "ab") is None
    weights = class_weights(Objective(class_weights=[1.0, 4.0]), target, "ordinal", "ab")
    assert weights is not None and weights.tolist() == [1.0, 4.0]
    with pytest.raises(UserError, match=r"has 1 weights for 2 classes; give one for each of cat, dog"):
        class_weights(Objective(class_weights=[1.0]), target, "multiclass", ["cat", "dog"])


@pytest.mark.parametrize(
    ("task", "target", "message"),
    [
        ("multiclass", torch.tensor([0, 0, -1]), "dog has no training sample"),
        ("multilabel", torch.tensor([[1.0, NAN], [0.0, 0.0]]), "dog has no positive training sample"),
        ("multilabel", torch.tensor([[1.0, 1.0], [0.0, NAN]]), "dog has no negative training sample"),
    ],
)
def test_balanced_weights_name_the_absent_class(task: str, target: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        class_weights(Objective(class_weights="balanced"), target, task, ["cat", "dog"])


@pytest.mark.parametrize(
    ("task", "objective", "message"),
    [
        (
            "ordinal",
            Objective(label_smoothing=0.1),
            "label_smoothing 0.1 is for multiclass, this task is ordinal",
        ),
        ("multilabel", Objective(label_smoothing=0.1), "set it to 0"),
        ("ordinal", Objective(focal_gamma=2), "focal_gamma 2"),
        ("regression", Objective(focal_gamma=2), "this task is regression"),
        ("multiclass", Objective(focal_gamma=2, label_smoothing=0.1), "set one of them to 0"),
        ("regression", Objective(class_weights="balanced"), "class_weights balanced needs classes"),
        ("ordinal", Objective(temperature_scaling=True), "temperature_scaling true .* ordinal; set it to false"),
        ("regression", Objective(temperature_scaling=True), "this task is regression"),
    ],
)
def test_settings_without_meaning_are_refused(task: str, objective: Objective, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_objective(task, objective)


@pytest.mark.parametrize("task", TASKS)
def test_defaults_fit_every_task(task: str) -> None:
    check_objective(task, PLAIN)
