"""Decisions that can be checked by hand: three stages of 1, 2 and 4 ms; a deeper cut has smaller records."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from lit_transfer.activations import costs as costs_module
from lit_transfer.activations.costs import Costs, Use, decide, disk_speed, pass_s, sample_s, weigh

COSTS = Costs(
    load_s=0.001,
    compute_s={1: 0.001, 2: 0.003, 3: 0.007},
    store_s={1: 0.0005, 2: 0.0015, 3: 0.0035},
    bytes={1: 4000, 2: 2000, 3: 100},
    write_bytes_per_s=1e6,
    read_bytes_per_s=1e6,
)
SAMPLES = 1000
MISSING = dict.fromkeys((1, 2, 3), SAMPLES)
ROOM = 1e9


def head(epochs: int) -> Use:
    return Use("head", 3, epochs * SAMPLES)


def top(epochs: int) -> Use:
    """Trains the last stage, too."""
    return Use("top", 2, epochs * SAMPLES)


def test_a_sample_is_computed_or_read_and_run_on() -> None:
    assert sample_s(COSTS, head(1), None) == pytest.approx(0.001 + 0.007)
    assert sample_s(COSTS, head(1), 3) == pytest.approx(0.0001)
    assert sample_s(COSTS, head(1), 1) == pytest.approx(0.004 + 0.006)
    assert sample_s(COSTS, top(1), 2) == pytest.approx(0.002)


def test_a_long_phase_stores() -> None:
    decision = decide(COSTS, [head(20)], MISSING, SAMPLES, ROOM)
    assert decision.cuts == {"head": 3} and decision.saved_s > decision.build_s
    assert decision.build_s == pytest.approx(1000 * (0.001 + 0.0035))
    # Computing 20 epochs, less reading them and writing the records once.
    assert decision.saved_s == pytest.approx(20 * 8 - 20 * 0.1 - 0.1)


def test_one_epoch_computes() -> None:
    """What is read once would have to be loaded and computed for that anyway, and written beside."""
    assert not decide(replace(COSTS, store_s=COSTS.compute_s), [head(1)], MISSING, SAMPLES, ROOM).cuts
    assert decide(replace(COSTS, store_s=COSTS.compute_s), [head(2)], MISSING, SAMPLES, ROOM).cuts


def test_a_prefix_must_earn_its_compiling() -> None:
    costs = replace(COSTS, store_s=COSTS.compute_s, compile_s=10)
    assert not decide(costs, [head(2)], MISSING, SAMPLES, ROOM).cuts  # 8 s saved
    assert decide(costs, [head(4)], MISSING, SAMPLES, ROOM).cuts
    assert decide(costs, [head(1)], dict.fromkeys((1, 2, 3), 0), SAMPLES, ROOM).cuts, "nothing is to be compiled"


def test_several_views_of_each_picture_are_computed_and_loaded_once() -> None:
    missing = dict.fromkeys((1, 2, 3), 8 * SAMPLES)
    decision = decide(COSTS, [head(20)], missing, SAMPLES, ROOM)
    assert decision.build_s == pytest.approx(1000 * 0.001 + 8000 * 0.0035)


def test_no_room_computes() -> None:
    assert decide(COSTS, [head(20)], MISSING, SAMPLES, 100 * SAMPLES - 1).cuts == {}
    assert decide(COSTS, [head(20)], MISSING, SAMPLES, 100 * SAMPLES).cuts == {"head": 3}
    assert not decide(COSTS, [head(20)], MISSING, SAMPLES, -5.0).cuts


@pytest.mark.parametrize(("read_bytes_per_s", "cut"), [(1e8, 2), (3e5, 1), (1e5, None)])
def test_the_cut_depends_on_how_fast_records_are_read(read_bytes_per_s: float, cut: int | None) -> None:
    """Where the deeper cut has the larger records, a slow disk takes the shallower one, and a slower one none."""
    costs = replace(COSTS, bytes={1: 400, 2: 2000}, read_bytes_per_s=read_bytes_per_s, write_bytes_per_s=1e9)
    decision = decide(costs, [top(50)], dict.fromkeys((1, 2), SAMPLES), SAMPLES, ROOM)
    assert decision.cuts == ({} if cut is None else {"top": cut})
    assert bool(decision.cuts) == (cut is not None)


def test_a_cut_behind_what_a_phase_trains_is_never_read() -> None:
    assert decide(COSTS, [top(20)], MISSING, SAMPLES, ROOM).cuts == {"top": 2}


def test_records_that_are_there_cost_nothing() -> None:
    decision = decide(COSTS, [head(1)], MISSING | {3: 0}, SAMPLES, free_bytes=-1.0)
    assert decision.cuts == {"head": 3} and decision.build_s == 0 and decision.saved_s > decision.build_s
    assert decision.saved_s == pytest.approx(8 - 0.1)


def test_records_that_are_there_are_read_where_others_would_have_to_be_made() -> None:
    """From a shallower cut, whose stages in between are then run in each epoch, but not for many epochs."""
    costs = replace(COSTS, bytes=dict.fromkeys((1, 2, 3), 100), write_bytes_per_s=2e4)
    for epochs, cut in ((1, 2), (20, 3)):
        assert decide(costs, [head(epochs)], MISSING | {2: 0}, SAMPLES, ROOM).cuts == {"head": cut}


def test_one_epoch_reads_what_is_there_and_does_not_build_deeper_records() -> None:
    """It takes 6 s from the second cut; a pass for the third would take as long as computing."""
    decision = decide(replace(COSTS, store_s=COSTS.compute_s), [head(1)], MISSING | {2: 0}, SAMPLES, ROOM)
    assert decision.cuts == {"head": 2} and decision.saved_s > decision.build_s


def test_a_short_phase_reads_what_is_stored_in_the_pass_of_a_longer_one() -> None:
    """8 views, so that the pass takes longer than one epoch does; ten epochs of the later phase pay for it."""
    missing = dict.fromkeys((1, 2, 3), 8 * SAMPLES)
    costs = replace(COSTS, write_bytes_per_s=1e9, read_bytes_per_s=1e9)
    assert not decide(costs, [head(1)], missing, SAMPLES, ROOM).cuts
    decision = decide(costs, [head(1), top(20)], missing, SAMPLES, ROOM)
    assert decision.cuts == {"head": 2, "top": 2} and decision.saved_s > decision.build_s, (
        "a deeper pass would not pay for itself"
    )
    assert decision.build_s == pytest.approx(1000 * 0.001 + 8000 * 0.0015)


def test_half_of_the_records_take_half_of_the_work() -> None:
    half = decide(COSTS, [head(20)], MISSING | {3: 500}, SAMPLES, ROOM)
    assert half.build_s == pytest.approx(1000 * 0.001 + 500 * 0.0035)
    assert half.saved_s == pytest.approx(20 * 8 - 20 * 0.1 - 0.05)


def test_later_phases_share_the_pass_over_the_pictures() -> None:
    costs = replace(COSTS, store_s=COSTS.compute_s)
    assert not decide(costs, [head(1)], MISSING, SAMPLES, ROOM).cuts
    both = decide(costs, [head(1), top(5)], MISSING, SAMPLES, ROOM)
    assert both.cuts == {"head": 3, "top": 2} and both.saved_s > both.build_s
    assert both.build_s == pytest.approx(1000 * (0.001 + 0.007)), "stage 2 lies on the way to stage 3"
    head_saves, top_saves = 8 - 0.1 - 0.1, 5 * 4 - 5 * 2 - 2
    assert both.saved_s == pytest.approx(head_saves + top_saves)


def test_a_later_phase_that_does_not_fit_beside_the_first_computes() -> None:
    decision = decide(COSTS, [head(20), top(20)], MISSING, SAMPLES, (100 + 1999) * SAMPLES)
    assert decision.cuts == {"head": 3}
    assert decide(COSTS, [head(20), top(20)], MISSING, SAMPLES, (100 + 2000) * SAMPLES).cuts == {"head": 3, "top": 2}


def test_two_phases_of_one_cut_need_its_room_once() -> None:
    decision = decide(COSTS, [head(20), replace(head(5), name="again")], MISSING, SAMPLES, 100 * SAMPLES)
    assert decision.cuts == {"head": 3, "again": 3}
    assert decision.saved_s == pytest.approx(25 * 8 - 25 * 0.1 - 0.1), "and are written once"


def test_a_pass_goes_as_deep_as_what_is_missing() -> None:
    assert pass_s(COSTS, {1, 3}, MISSING | {3: 0}, SAMPLES) == pytest.approx(1000 * (0.001 + 0.0005))
    assert pass_s(COSTS, {3}, MISSING | {3: 0}, SAMPLES) == 0
    assert pass_s(COSTS, set(), MISSING, SAMPLES) == 0


def test_what_was_compared_is_told_for_each_cut() -> None:
    stages, missing = ["a", "b", "c", "head"], MISSING | {1: 0, 3: 500}
    weighed = weigh(COSTS, top(20), stages, SAMPLES, missing, SAMPLES, ROOM, chosen=2)
    assert weighed.samples == 20_000 and weighed.room_bytes == ROOM
    assert weighed.compute_s == pytest.approx(20 * (1 + 3))
    first, second = weighed.cuts  # nothing of the last stage, which the phase trains
    assert (first.stage, first.chosen, second.stage, second.chosen) == ("b", False, "c", True)
    assert (first.bytes, first.missing_bytes, second.missing_bytes) == (4_000_000, 0, 2_000_000)
    assert (first.build_s, first.read_s, first.run_on_s) == pytest.approx((0, 20 * 4, 20 * 2))
    assert (second.build_s, second.read_s, second.run_on_s) == pytest.approx((1 + 1.5 + 2, 20 * 2, 0))
    deepest = weigh(COSTS, head(20), stages, SAMPLES, missing, SAMPLES, ROOM, chosen=None).cuts[2]
    assert (deepest.stage, deepest.bytes, deepest.missing_bytes) == ("head", 100_000, 50_000)
    assert deepest.build_s == pytest.approx(1 + 500 * 0.0035 + 0.05)


@pytest.mark.parametrize("epochs", [1, 2, 20])
def test_a_single_phase_reads_what_is_told_to_be_faster(epochs: int) -> None:
    costs = replace(COSTS, store_s=COSTS.compute_s)
    decision = decide(costs, [head(epochs)], MISSING, SAMPLES, ROOM)
    weighed = weigh(costs, head(epochs), ["a", "b", "c", "head"], SAMPLES, MISSING, SAMPLES, ROOM, chosen=None)
    totals_s = [cut.total_s for cut in weighed.cuts]
    assert bool(decision.cuts) == (min(totals_s) < weighed.compute_s)
    if decision.cuts:
        assert decision.cuts == {"head": totals_s.index(min(totals_s)) + 1}
        assert min(totals_s) == pytest.approx(weighed.compute_s - decision.saved_s + decision.build_s)


def test_the_speed_of_a_disk_is_bytes_over_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.5, 10.6, 10.6])
    monkeypatch.setattr(costs_module.time, "perf_counter", lambda: next(times))
    write, read = disk_speed(tmp_path / "new", bytes=1000)
    assert write == pytest.approx(2000) and read == pytest.approx(10000)
    assert list(tmp_path.iterdir()) == [], "who stores something makes the folder, as all who share it may use it"


def test_what_was_written_is_not_read_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(costs_module.os, "fsync", lambda _: calls.append("safe"))
    monkeypatch.setattr(costs_module.os, "posix_fadvise", lambda _, *what: calls.append(what), raising=False)
    monkeypatch.setattr(costs_module.os, "POSIX_FADV_DONTNEED", 4, raising=False)
    monkeypatch.setattr(Path, "read_bytes", lambda _: calls.append("read"))
    disk_speed(tmp_path, bytes=1000)
    assert calls == ["safe", (0, 0, 4), "read"], "what is not safe yet stays in memory"


def test_a_full_disk_leaves_nothing_of_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(costs_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        disk_speed(tmp_path, bytes=1000)
    assert list(tmp_path.iterdir()) == []
