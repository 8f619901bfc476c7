"""What `benchmarks/rivals.py` makes of its runs: who was how soon, what is only a bound, what may not be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lit_transfer.errors import UserError
from lit_transfer.schedule import Heads, Phase


@pytest.fixture
def rivals(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("rivals")


@pytest.fixture
def runs(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("rivals_runs")


def record(*curve: tuple[float, float]) -> dict[str, Any]:
    return {"curve": [list(point) for point in curve]}


def found(rivals: ModuleType, ours: dict[str, float], **theirs: dict[str, float]) -> Any:
    """Timings in which each rival took the seconds that are given, or 900 s; not in 500 s where they are infinite."""
    seconds = {rival: {"default": 900.0} for rival in rivals.RIVALS} | theirs
    timings = {tool: {k: rivals.Timing(s, 500.0, 0.9) for k, s in each.items()} for tool, each in seconds.items()}
    return {rivals.OURS: {k: rivals.Timing(s, math.inf, 0.95) for k, s in ours.items()}} | timings


def test_the_aim_is_reached_at_the_validation_that_has_it(rivals: ModuleType) -> None:
    reached = rivals.timing([record((30, 0.8), (60, 0.93))], 0.93)
    assert (reached.seconds, reached.best_auc) == (60, 0.93)
    missed = rivals.timing([record((300, 0.92), (520, 0.9))], 0.93)
    assert (missed.seconds, missed.known_s, missed.best_auc) == (math.inf, 520, 0.92)


def test_over_seeds_the_median_counts_and_one_that_was_missed_is_the_slowest(rivals: ModuleType) -> None:
    there = [record((20, 0.95)), record((40, 0.95))]
    assert rivals.timing([*there, record((600, 0.5))], 0.93).seconds == 40
    assert rivals.timing([there[0], record((600, 0.5))], 0.93).seconds == math.inf


def test_what_was_not_reached_gives_a_bound_and_no_ratio(rivals: ModuleType) -> None:
    ratios = rivals.ratios(found(rivals, {"default": 100.0}, fastai={"default": math.inf}))
    assert ratios["fastai"] == {"default": rivals.Ratio(5.0, is_bound=True)}
    assert ratios["timm"] == {"default": rivals.Ratio(9.0, is_bound=False)}


def test_one_that_came_behind_the_limit_has_its_ratio(rivals: ModuleType) -> None:
    ratios = rivals.ratios(found(rivals, {"default": 100.0}, timm={"default": 530.0}))
    assert ratios["timm"]["default"] == rivals.Ratio(5.3, is_bound=False)


def test_the_best_of_the_grid_is_compared_with_our_best_once_both_have_all_of_it(rivals: ModuleType) -> None:
    ours = {"default": 100.0, "higher": 50.0, "lower": math.inf}
    fast = {"default": 400.0, "higher": math.inf, "lower": 150.0}
    lacking = {"default": 400.0, "higher": 20.0}
    ratios = rivals.ratios(found(rivals, ours, timm=fast, fastai=lacking))
    assert ratios["timm"]["best"] == rivals.Ratio(3.0, is_bound=False)
    assert "best" not in ratios["fastai"]


def test_a_grid_has_a_bound_where_one_that_was_missed_may_have_been_the_soonest(rivals: ModuleType) -> None:
    theirs = {"default": 530.0, "higher": math.inf, "lower": math.inf}
    ratios = rivals.ratios(found(rivals, dict.fromkeys(rivals.GRID, 100.0), timm=theirs))
    assert ratios["timm"]["best"] == rivals.Ratio(5.0, is_bound=True)


def test_without_our_own_time_there_is_no_figure(rivals: ModuleType) -> None:
    with pytest.raises(UserError, match=r"did not reach the aim, its best is 0\.9500"):
        rivals.ratios(found(rivals, {"default": math.inf}))


def test_the_figure_is_the_smallest_ratio_and_says_if_it_is_a_bound(
    rivals: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(rivals, "write_result", lambda *result: written.append(result))
    rivals.report(found(rivals, {"default": 100.0}, fastai={"default": math.inf}), {}, {})
    rivals.report(found(rivals, {"default": 100.0}, fastai={"default": 450.0}), {}, {})
    bound, measured = written
    assert bound[1] == {"time_to_auc_093_worst_rival": 5.0}
    assert bound[2]["worst"] == "fastai, default"
    assert bound[3] == ["time_to_auc_093_worst_rival"]
    assert "timm, lower" in bound[2]["grid lacks"]
    assert measured[1] == {"time_to_auc_093_worst_rival": 4.5}
    assert measured[3] == []


def test_all_rates_of_a_phase_are_scaled(runs: ModuleType) -> None:
    thaw = Phase(name="thaw", train="all", max_epochs=1, lr=1e-3, backbone_lr=1e-4, weight_decay=0.05)
    scaled = runs.at_rates(thaw, 3.0)
    assert (scaled.lr, scaled.backbone_lr) == (pytest.approx(3e-3), pytest.approx(3e-4))
    assert scaled.weight_decay == 0.05
    many = runs.at_rates(Phase(name="many", max_epochs=1, heads=Heads(lr=[1.0, 2.0])), 3.0)
    assert (many.lr, many.heads.lr) == (None, [3.0, 6.0])
    own = runs.at_rates(Phase(name="own", max_epochs=1, train={"params": {"stem/*": 1.0, "head/*": 2.0}}), 3.0)
    assert own.train == {"params": {"stem/*": 3.0, "head/*": 6.0}}
    listed = Phase(name="listed", max_epochs=1, lr=1.0, backbone_lr=1.0, train={"params": ["stem/*"]})
    assert runs.at_rates(listed, 3.0).train == listed.train


def test_a_run_of_another_task_is_refused(runs: ModuleType, tmp_path: Path) -> None:
    task = {"batch": 32, "mean": (0.5, 0.5), "auc": 0.93}
    stored = json.loads(json.dumps(task))
    runs.check_same(tmp_path / "timm.json", stored, task)
    with pytest.raises(UserError, match=r"timm\.json is of another auc, batch; remove it"):
        runs.check_same(tmp_path / "timm.json", stored, task | {"batch": 64, "auc": 0.5})
