"""Classical heads: what torch computes is what scikit-learn computes, and their settings come from cross-validation."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from lit_transfer.blocks import ClassicalHead
from lit_transfer.comparison import choose
from lit_transfer.errors import UserError
from lit_transfer.features.classifiers import CLASSIFIERS
from lit_transfer.features.fitting import Choosing, Training, check_targets, fit_head, why_not_fitted
from lit_transfer.features.scaling import Matrix, fit_projection, fit_scaling
from lit_transfer.model.classical import FORMS, Linear, build_classical
from lit_transfer.objectives.decisions import probabilities

HEADS = get_args(ClassicalHead)
CHOOSING = Choosing("accuracy", folds=2, seed=0)
WIDTHS = (7, 3)


def features(count: int = 48, classes: int = 3, seed: int = 0) -> tuple[Matrix, np.ndarray]:
    """Overlapping clouds in fp32 precision, their features of different sizes, one dead."""
    random = np.random.default_rng(seed)
    targets = np.arange(count) % classes
    centres = np.random.default_rng(9).normal(size=(classes, sum(WIDTHS)))
    x = (centres[targets] + 1.5 * random.normal(size=(count, sum(WIDTHS)))) * np.logspace(-2, 2, sum(WIDTHS)) + 5
    x[:, 4] = 3.0
    return x.astype(np.float32).astype(np.float64), targets


def training(task: str = "multiclass", classes: int = 3, weights: Matrix | None = None) -> Training:
    x, targets = features(classes=classes)
    if task == "multilabel":
        labels = np.stack([targets == 0, targets == 1], 1).astype(np.float32)
        labels[5:15, 1] = np.nan
        return Training(task, x, labels, weights, WIDTHS)
    return Training(task, x, targets, weights, WIDTHS)


def said(head: torch.nn.Module, task: str, x: Matrix) -> torch.Tensor:
    return probabilities(task, head(torch.from_numpy(x).float()))


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", HEADS)
def test_torch_computes_the_probabilities_of_scikit_learn(name: ClassicalHead, classes: int) -> None:
    fitted = fit_head(name, training(classes=classes), CHOOSING)
    x, _ = features(50, seed=1)
    expected = torch.from_numpy(fitted.classifiers[0].probabilities(x)).float()
    got = said(fitted.head, "multiclass", x)
    assert got.shape == (50, classes) and torch.allclose(got, expected, atol=1e-4, rtol=0)
    assert expected.std(0).min() > 0.02, "probabilities that are all alike would prove nothing"
    again = build_classical("multiclass", name, fitted.head.state_dict())
    assert torch.equal(said(again, "multiclass", x), got)


@pytest.mark.parametrize("name", HEADS)
def test_each_label_has_a_classifier_of_the_samples_that_have_it(name: ClassicalHead) -> None:
    fitted = fit_head(name, training("multilabel"), CHOOSING)
    x, _ = features(30, seed=1)
    expected = np.stack([one.probabilities(x)[:, 1] for one in fitted.classifiers], 1)
    assert np.allclose(said(fitted.head, "multilabel", x).numpy(), expected, atol=1e-4)
    assert [len(one.fit.classes) for one in fitted.classifiers] == [48, 38]
    assert fitted.score == pytest.approx(np.mean([one.score for one in fitted.classifiers]))


@pytest.mark.parametrize("name", HEADS)
def test_the_steps_of_an_ordinal_scale_are_classes(name: ClassicalHead) -> None:
    fitted = fit_head(name, training("ordinal"), CHOOSING)
    x, _ = features(30, seed=1)
    assert fitted.head(torch.from_numpy(x).float()).shape == (30, 2)
    assert np.allclose(said(fitted.head, "ordinal", x).numpy(), fitted.classifiers[0].probabilities(x), atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_the_same_seed_gives_the_same_head(name: ClassicalHead) -> None:
    first, again = (fit_head(name, training(), CHOOSING) for _ in range(2))
    assert first.classifiers[0].settings == again.classifiers[0].settings and first.score == again.score
    x, _ = features(20, seed=1)
    assert torch.equal(said(first.head, "multiclass", x), said(again.head, "multiclass", x))


def test_settings_and_score_are_those_of_a_grid_search_of_scikit_learn() -> None:
    given = replace(training(), widths=(10,))
    fitted = fit_head("logistic_regression", given, Choosing("accuracy", folds=4, seed=3)).classifiers[0]
    pipeline = make_pipeline(
        StandardScaler(), FunctionTransformer(lambda x: x / np.sqrt(10)), LogisticRegression(max_iter=2000)
    )
    grid = {"logisticregression__C": CLASSIFIERS["logistic_regression"].grid["C"]}
    search = GridSearchCV(pipeline, grid, scoring="accuracy", cv=StratifiedKFold(4, shuffle=True, random_state=3))
    search.fit(given.features, given.targets)
    scores = search.cv_results_["mean_test_score"]
    assert len(set(scores)) > 2, "settings that are all as good would prove nothing"
    assert fitted.settings == {"C": search.best_params_["logisticregression__C"]}
    assert fitted.score == pytest.approx(search.best_score_)
    x, _ = features(30, seed=1)
    assert np.allclose(fitted.probabilities(x), search.predict_proba(x), atol=1e-3)


def test_every_kind_of_head_is_judged_by_the_figure_that_was_asked_for() -> None:
    by_accuracy, by_area = (fit_head("linear_svm", training(), Choosing(m, 3, 0)).score for m in ("accuracy", "auroc"))
    assert by_accuracy == pytest.approx(round(48 * by_accuracy) / 48) and by_area > by_accuracy + 0.05


@pytest.mark.parametrize("name", HEADS)
def test_sample_weights_are_used_where_a_kind_takes_them(name: ClassicalHead) -> None:
    weights = np.where(training().targets == 0, 50.0, 1.0)
    x, _ = features(48, seed=1)
    both = [fit_head(name, training(weights=own), CHOOSING) for own in (None, weights)]
    plain, weighted = (fitted.classifiers[0].probabilities(x)[:, 0].mean() for fitted in both)
    told = "takes no sample weights"
    assert told not in both[0].notes and (told in both[1].notes) != CLASSIFIERS[name].is_weighted
    assert (weighted > plain + 0.05) == CLASSIFIERS[name].is_weighted
    assert (weighted == plain) != CLASSIFIERS[name].is_weighted


def test_blocks_weigh_the_same_whatever_their_width_and_size() -> None:
    x, _ = features(500)
    scaled = fit_scaling(x, WIDTHS)(x)
    assert np.allclose(scaled.mean(0), 0, atol=1e-12)
    squares = (scaled**2).mean(0)
    assert squares[7:].sum() == pytest.approx(1)
    assert squares[:7].sum() == pytest.approx(6 / 7) and squares[4] == 0, "one feature of the block is dead"


def test_components_are_as_many_as_there_are_directions() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 3)) @ random.normal(size=(3, 12))
    for rows in (x - x.mean(0), x[:9] - x[:9].mean(0)):
        projection = fit_projection(rows, 8)
        got = projection(rows)
        assert got.shape[1] == 3
        distances = [np.linalg.norm(one[:, None] - one, axis=2) for one in (rows, got)]
        assert np.allclose(*distances) and np.allclose(got.mean(0), 0, atol=1e-9)
        assert np.allclose(fit_projection(rows, 2)(rows), got[:, :2]) and (np.diff(got.var(0)) < 0).all()


def test_what_grows_too_fast_is_not_fitted_to_many_samples() -> None:
    assert why_not_fitted("rbf_svm", 20_000) is None and why_not_fitted("logistic_regression", 10**9) is None
    assert "20001 training samples are more than the 20000" in str(why_not_fitted("rbf_svm", 20_001))


def test_a_scarce_class_has_fewer_folds() -> None:
    x, targets = features()
    targets[:] = np.where(np.arange(48) < 46, targets % 2, 2)
    given = Training("multiclass", x, targets, None, WIDTHS)
    for name in HEADS:
        fitted = fit_head(name, given, Choosing("accuracy", folds=5, seed=0))
        assert np.isfinite(fitted.classifiers[0].probabilities(x)).all() and np.isfinite(fitted.score), name


def test_what_cannot_be_cross_validated_is_refused() -> None:
    check_targets("multiclass", np.array([0, 0, 1, 1]), ["a", "b"])
    with pytest.raises(UserError, match="class c has 1 training sample"):
        check_targets("multiclass", np.array([0, 0, 1, 1, 2]), ["a", "b", "c"])
    with pytest.raises(UserError, match="class c has 0 training sample"):
        check_targets("ordinal", np.array([0, 0, 1, 1]), ["a", "b", "c"])
    nan = np.nan
    check_targets("multilabel", np.array([[0, 1], [0, 1], [1, 0], [1, 0], [1, nan]]), ["a", "b"])
    with pytest.raises(UserError, match=r"label b has 1 training sample\(s\) without it"):
        check_targets("multilabel", np.array([[0, 1], [0, 1], [1, 0], [1, nan]]), ["a", "b"])
    with pytest.raises(UserError, match="dataset is regression"):
        check_targets("regression", np.zeros((4, 1), np.float32), ["a"])


def test_tensors_of_another_head_are_refused() -> None:
    state = fit_head("lda", training(), CHOOSING).head.state_dict()
    with pytest.raises(TypeError, match="Gaussians is fitted to"):
        build_classical("multiclass", "gaussian_nb", state)
    with pytest.raises(TypeError, match="Linear is fitted to"):
        Linear(weight=torch.zeros(1, 1))
    assert set(FORMS) == set(CLASSIFIERS) == set(HEADS)


def test_an_optimizer_that_was_stopped_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit_head("logistic_regression", training(), CHOOSING).classifiers[0].converged
    short = replace(CLASSIFIERS["logistic_regression"], make=lambda seed: LogisticRegression(max_iter=1))
    monkeypatch.setitem(CLASSIFIERS, "logistic_regression", short)
    fitted = fit_head("logistic_regression", training(), CHOOSING)
    assert not fitted.classifiers[0].converged and fitted.notes == ("did not converge",)


@pytest.mark.parametrize("splits", [{}, {"val": 0}])
@pytest.mark.parametrize("undefined", [float("nan"), -float("inf")])
def test_where_the_figure_is_undefined_for_all_no_head_is_the_best(splits: dict[str, int], undefined: float) -> None:
    first, second = Mock(), Mock()
    for one in (first, second):
        one.verdict.evaluations, one.fitted.score = splits, undefined
        one.verdict.figures.return_value = {"val/auroc": undefined}
    with pytest.raises(UserError, match=r"val/auroc is undefined for every head, so none is the best; a class may be"):
        choose([first, second], "val/auroc")
    second.fitted.score, second.verdict.figures.return_value = 0.1, {"val/auroc": 0.1}
    assert choose([first, second], "val/auroc") is second
