"""The reading of a range test, on curves whose answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from layouts import config, row, small
from matplotlib.figure import Figure

from lit_transfer.errors import UserError
from lit_transfer.phases.checkpoint import PhaseResult
from lit_transfer.phases.lr_finder import (
    RangeTest,
    RateSweep,
    axis_of,
    config_rates,
    growing_rates,
    results_before,
    smooth,
    steepest,
)
from lit_transfer.phases.table import PhasePlan, resolve
from lit_transfer.report import plots


def plan_of(**settings: Any) -> PhasePlan:
    return resolve(config([row(**settings)]), small(), 64)[0]


def curve(rates: list[float], fall_at: float, noise: float, seed: int = 0) -> list[float]:
    """A loss of 1 that falls to 0.3, fastest at a rate, and grows without bound from 100 times that rate on."""
    x = np.log10(rates) - math.log10(fall_at)
    fall = 0.7 / (1 + np.exp(-4 * x))
    return list(1 - fall + 10 ** (3 * (x - 2)) + np.random.default_rng(seed).normal(0, noise, len(rates)))


def read(rates: list[float], losses: list[float]) -> RangeTest:
    return RangeTest(tuple(rates), tuple(losses), "head", 0.1, len(rates))


def test_rates_grow_by_one_factor_from_the_first_to_the_last() -> None:
    rates = growing_rates(1e-6, 1e-2, 41)
    assert rates == pytest.approx([1e-6 * 10 ** (i / 10) for i in range(41)], rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((1e-7, 10, 19), "--steps 19 is under 20"),
        ((1, 1, 100), "--from 1 and --to 1 are no range"),
        ((0, 1, 100), "--from 0 and --to 1 are no range"),
        ((1, float("inf"), 100), "--from 1 and --to inf are no range"),
        ((float("nan"), 1, 100), "--from nan and --to 1 are no range"),
    ],
)
def test_a_range_that_is_none_is_refused(arguments: tuple[float, float, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        growing_rates(*arguments)


def test_the_average_has_no_pull_to_zero_at_its_start() -> None:
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2, 2, 2], rel=1e-12)
    assert smooth([1.0, 3.0, 0.0])[2] == pytest.approx((0.81 * 1 + 0.9 * 3) / (0.81 + 0.9 + 1), rel=1e-12)


@pytest.mark.parametrize("fall_at", [1e-5, 1e-3, 3e-2])
@pytest.mark.parametrize(("noise", "decades"), [(0.0, 0.1), (0.05, 0.35)])
def test_the_suggestion_is_where_the_loss_falls_fastest(fall_at: float, noise: float, decades: float) -> None:
    rates = growing_rates(1e-7, 10, 100)
    for seed in range(5 if noise else 1):
        test = read(rates, curve(rates, fall_at, noise, seed))
        assert test.suggested is not None
        assert abs(math.log10(test.rates[test.suggested] / fall_at)) < decades


def test_the_suggestion_does_not_depend_on_where_the_test_began() -> None:
    found = []
    for low in (1e-9, 1e-7, 1e-5):
        rates = growing_rates(low, 10, round(12.5 * math.log10(10 / low)))
        test = read(rates, curve(rates, 1e-3, 0.0))
        assert test.suggested is not None
        found.append(math.log10(test.rates[test.suggested]))
    assert max(found) - min(found) < 0.15


@pytest.mark.parametrize("seed", range(8))
def test_there_is_no_suggestion_where_the_loss_only_grows_or_only_has_noise(seed: int) -> None:
    rates = growing_rates(1e-7, 10, 100)
    noise = np.random.default_rng(seed).normal(0, 0.1, 100)
    assert read(rates, list(np.linspace(1, 2, 100) + noise)).suggested is None
    assert read(rates, [1.0] * 100).suggested is None


def test_a_fall_behind_the_lowest_loss_does_not_count() -> None:
    """Where it diverges, a loss jumps up and comes back: steep, and worth nothing."""
    rates = growing_rates(1e-7, 10, 100)
    losses = np.array(curve(rates, 1e-4, 0.01))
    losses[75:] = np.linspace(9, 2, 25)
    test = read(rates, list(losses))
    assert test.lowest < 75 and test.suggested is not None
    assert abs(math.log10(test.rates[test.suggested] / 1e-4)) < 0.3
    assert steepest(rates, list(losses), width=16, last=99) != test.suggested


def test_the_first_steps_are_no_lowest_loss() -> None:
    """The average of one step is that step."""
    assert read(growing_rates(1e-7, 10, 100), [0.0, *np.linspace(2, 1, 99)]).lowest == 99


def test_a_test_that_ended_at_once_has_no_suggestion() -> None:
    test = RangeTest((1.0,), (0.7,), "head", 0.1, 100)
    assert test.lowest == 0 and test.suggested is None


def test_the_rate_of_the_head_stands_for_all() -> None:
    assert axis_of(plan_of(train="all", lr=0.1, backbone_lr=0.5)) == ("head", 0.1)
    assert axis_of(plan_of(lr=None, train={"params": {"stem/*.weight": 0.1, "*.bias": 0.02}})) == ("head", 0.02)
    alone = plan_of(lr=None, train={"params": {"stem/*": 0.1, "top/*": 0.3, "blocks.0/*": 0.2}})
    assert axis_of(alone) == ("top/*", 0.3)


def test_rates_of_the_config_are_told_as_it_has_them() -> None:
    decayed = plan_of(train="all", lr=0.1, backbone_lr=0.02, layer_decay=0.5)
    assert config_rates(decayed.phase, 10) == pytest.approx({"lr": 1, "backbone_lr": 0.2})
    own = plan_of(lr=None, train={"params": {"stem/*": 0.1, "top/*": 0.3}})
    assert config_rates(own.phase, 0.1) == pytest.approx({"stem/*": 0.01, "top/*": 0.03})
    assert config_rates(plan_of(lr=0.1, train={"params": ["head/*"]}).phase, 2) == {"lr": 0.2}


def test_all_groups_keep_their_ratio_to_the_head() -> None:
    plan = plan_of(train="all", lr=0.1, backbone_lr=0.02, layer_decay=0.5, weight_decay=0.1)
    sweep = RateSweep(plan, growing_rates(1e-4, 1, 20))
    sweep.losses = [0.0] * 19
    groups = [{"name": group.name, "lr": 0.0} for group in plan.groups]
    trainer: Any = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=groups)])
    sweep.on_train_batch_start(trainer, trainer, None, 0)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["head/decay"] == rates["head/no_decay"] == pytest.approx(1)
    assert rates["top/decay"] == pytest.approx(0.2) and rates["stem/no_decay"] == pytest.approx(0.2 / 8)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of which phases a and b are done, and c is not."""
    for name, after in (("a", []), ("b", ["a"])):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        result = PhaseResult(name, after, 2, 16, 1.0, 1.0, 0.0, 0.0, 0.0, "max_epochs 2 reached")
        (folder / "done.json").write_text(json.dumps(vars(result)))
    marks = {"seed": 0, "phases": [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}]}
    (tmp_path / "run.json").write_text(json.dumps({"fingerprint": marks}))
    return tmp_path


def test_earlier_phases_are_read_from_their_run(run_dir: Path) -> None:
    plans = [plan_of(name=name) for name in "abc"]
    found = results_before(run_dir, plans[:2], {"seed": 0, "phases": [{"lr": 0.1}, {"lr": 0.2}]})
    assert [(result.name, result.steps) for result in found] == [("a", 16), ("b", 16)]
    assert results_before(run_dir / "nowhere", [], {}) == []


def test_earlier_phases_must_be_finished_and_those_of_this_config(run_dir: Path) -> None:
    plans = [plan_of(name=name) for name in "abc"]
    with pytest.raises(UserError, match=r"phase 'c' is not finished in .*train until then.*or test phase 'a'"):
        results_before(run_dir, plans, {})
    with pytest.raises(UserError, match="phase 'a' is not finished"):
        results_before(run_dir / "nowhere", plans[:1], {})
    with pytest.raises(UserError, match=r"earlier phases of other settings \(phases\[1\].lr: 0.2 -> 0.25\)"):
        results_before(run_dir, plans[:2], {"seed": 0, "phases": [{"lr": 0.1}, {"lr": 0.25}]})
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        results_before(run_dir, plans[:1], {"seed": 1, "phases": [{"lr": 0.1}]})


@pytest.mark.parametrize("fall_at", [1e-3, 1e30])
def test_the_picture_shows_the_fall_and_marks_the_suggestion(fall_at: float, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    rates = growing_rates(1e-7, 10, 100)
    test = read(rates, curve(rates, fall_at, 0.02))
    plots.plot_range_test(test, "nowhere.png")
    (axes,) = figures[0].axes
    low, high = axes.get_ylim()
    seen = test.losses[: test.lowest + 1]
    assert axes.get_xscale() == "log" and low < min(seen) and max(seen) < high < 2
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    suggestion = [f"suggestion: {rates[test.suggested]:.2g}"] if test.suggested is not None else []
    assert labels == ["loss of a step", "smoothed", *suggestion, "in the config: 0.1"]
    assert bool(suggestion) == (fall_at < 10)
