"""The runs that `benchmarks/views.py` compares, and what of them may be taken as done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lit_transfer.errors import UserError
from lit_transfer.reading import load, to_plain

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def views(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("views")


def configs(views: ModuleType, folder: Path, changes: list[str]) -> list[dict[str, Any]]:
    return [trial.conditions()["config"] for trial in views.trials_of(CONFIG, folder, [3, 4], changes, 1)]


def test_runs_differ_only_in_what_is_stored_seed_and_folder(views: ModuleType, tmp_path: Path) -> None:
    found = configs(views, tmp_path, ["--phases.thaw_epochs", "2"])
    stored = [(config["activations"].pop("store"), config["activations"].pop("views")) for config in found]
    assert stored == [("require", 1), ("require", 4), ("require", 8), ("require", "d4"), ("off", None)] * 2
    assert [config.pop("seed") for config in found] == [3] * 5 + [4] * 5
    assert len({config.pop("runs_dir") for config in found}) == 10
    assert len({config["activations"].pop("folder") for config in found}) == 10, "each has an empty store"
    assert all(config == found[0] for config in found)
    plain = to_plain(load(CONFIG))
    assert found[0]["augment"] == plain["augment"] and found[0]["model"] == plain["model"]
    assert found[0]["phases"]["thaw_epochs"] == 2, "a change goes before the recipe"


def test_a_finished_run_counts_only_under_the_same_conditions(views: ModuleType, tmp_path: Path) -> None:
    trial, *_ = views.trials_of(CONFIG, tmp_path, [0], [], 1)
    assert views.finished(trial) is None
    trial.folder.mkdir()
    result = {"conditions": trial.conditions(), "figures": {"seed": 0, "accuracy": 0.5}}
    (trial.folder / "result.json").write_text(json.dumps(result))
    assert views.finished(trial) == views.figures_of(trial) == {"seed": 0, "accuracy": 0.5}
    for changes, jobs in ((["--image.size", "64"], 1), ([], 2)):
        other, *_ = views.trials_of(CONFIG, tmp_path, [0], changes, jobs)
        with pytest.raises(UserError, match="views_1-seed_0 has figures of other settings, jobs or hardware"):
            views.finished(other)


def test_the_picture_has_every_setting(views: ModuleType, tmp_path: Path) -> None:
    row = {"accuracy": 0.8, "auroc": 0.9, "seconds": 9.0, "building_s": 2.0}
    views.plot_views({setting: [row, row | {"accuracy": 0.9}] for setting in views.VIEWS}, tmp_path / "views.png")
    assert (tmp_path / "views.png").stat().st_size > 10_000


def test_threads_are_shared_by_what_runs_at_once(
    import_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = import_benchmark("processes")
    monkeypatch.setattr(processes.torch, "get_num_threads", lambda: 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert [processes.threads_each(jobs) for jobs in (1, 2, 9)] == [5, 2, 1]
    found = list(processes.at_a_time(2, _told, ["a", "b"]))
    assert [(item, threads) for item, threads, _ in found] == [("a", "2"), ("b", "2")], "in the order of the items"
    assert len({os.getpid(), *(pid for *_, pid in found)}) == 3, "a fresh process each"


def _told(item: str) -> tuple[str, str | None, int]:
    return item, os.environ.get("OMP_NUM_THREADS"), os.getpid()
