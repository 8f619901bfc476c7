from __future__ import annotations

import pytest

from lit_transfer.phases.watch import Watch, improves_downwards, reason_to_end
from lit_transfer.schedule import Until


def seen(watch: Watch, *values: float) -> list[bool]:
    return [watch.see(value, step) for step, value in enumerate(values, start=10)]


@pytest.mark.parametrize(
    ("metric", "downwards"),
    [("val/loss", True), ("val/rmse", True), ("val/mae", True), ("val/accuracy", False), ("val/auroc", False)],
)
def test_a_metric_s_name_says_which_way_is_better(metric: str, downwards: bool) -> None:
    assert improves_downwards(metric) == downwards
    watch = Watch(metric)
    better = [3.0, 2.0, 1.0] if downwards else [1.0, 2.0, 3.0]
    assert seen(watch, *better) == [True] * 3 and (watch.best, watch.best_step) == (better[-1], 12)
    assert seen(Watch(metric), *reversed(better)) == [True, False, False]


def test_only_more_than_min_delta_is_an_improvement() -> None:
    watch = Watch("val/loss", min_delta=0.5)
    assert seen(watch, 3.0, 2.5, 2.4, 2.4) == [True, False, True, False], "from the best, not from the last"
    assert (watch.best, watch.best_step, watch.waited) == (2.4, 12, 1)
    assert seen(Watch("val/loss"), 3.0, 3.0) == [True, False]


def test_it_counts_validations_since_the_best_also_over_a_stop() -> None:
    watch = Watch("val/accuracy")
    seen(watch, 0.5, 0.4, 0.4)
    later = Watch("val/accuracy")
    later.go_on_from(watch.state())
    assert later == watch and later.waited == 2
    later.see(0.6, 20)
    assert (later.waited, later.best_step) == (0, 20)


def test_a_watch_of_another_metric_starts_anew() -> None:
    watch = Watch("val/accuracy")
    seen(watch, 0.5)
    later = Watch("val/loss")
    later.go_on_from(watch.state())
    assert later == Watch("val/loss")


@pytest.mark.parametrize(
    ("until", "values", "ends"),
    [
        (Until(metric="val/loss", patience=2), [3.0, 2.0, 2.0, 2.0], [None, None, None, "val/loss has not improved"]),
        (Until(metric="val/loss", patience=1, min_delta=1.5), [3.0, 2.0], [None, "not improved for 1 validations"]),
        (Until(metric="val/loss", below=2.0), [3.0, 2.0, 1.9], [None, None, "val/loss 1.9 is below 2"]),
        (Until(metric="val/accuracy", above=0.5), [0.4, 0.5, 0.51], [None, None, "val/accuracy 0.51 is above 0.5"]),
        (Until(metric="val/loss", below=0.0), [0.1, -0.1], [None, "val/loss -0.1 is below 0"]),
    ],
)
def test_a_phase_ends_for_a_reason_that_is_told(until: Until, values: list[float], ends: list[str | None]) -> None:
    watch = Watch(until.metric, until.min_delta)
    for step, (value, end) in enumerate(zip(values, ends, strict=True)):
        watch.see(value, step)
        reason = reason_to_end(until, watch, value)
        assert reason is None if end is None else reason is not None and end in reason
