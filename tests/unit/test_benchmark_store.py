"""The parts of `benchmarks/store.py` run and give what they promise, on a tiny network and few pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from digits import digits, fine_tuning

from lit_transfer.reading import to_plain


@pytest.fixture
def store(import_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark, in a folder whose quickstart is tiny."""
    head = {"name": "head", "max_epochs": 1, "lr": 0.01}
    plain = to_plain(fine_tuning(digits(tmp_path / "digits", count=120), tmp_path, [head]))
    plain["phases"] = {"global_batch": 8, "weight_decay": 0.05}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(plain))
    monkeypatch.chdir(tmp_path)
    return import_benchmark("store")


def test_a_frozen_phase_is_timed_with_its_steps(store: ModuleType, tmp_path: Path) -> None:
    seconds, steps_s = store.frozen_phase(tmp_path / "phase", "require", 1.0, 3)
    assert 0 < steps_s < seconds


def test_loops_are_compared_over_the_same_tensors(store: ModuleType, tmp_path: Path) -> None:
    ratios, measured = store.compare_loops(tmp_path / "loops", pairs=1, fraction=1.0)
    assert set(ratios) == {"loop_over_bare", "heads_16_over_1"} and min(ratios.values()) > 0
    assert (measured["samples"], measured["batch"], measured["steps"]) == (60, 8, 8)


def test_a_thawed_step_has_parts_from_every_stage_on(store: ModuleType, tmp_path: Path) -> None:
    ratios, measured = store.thawed_steps(tmp_path / "thawed", pairs=1, steps=3)
    assert len(measured) == 6, "all stages but the first"
    assert ratios == {"thawed_step_over_parts": max(stage["ratio"] for stage in measured.values())}
