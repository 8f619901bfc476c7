from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lit_transfer import tracking
from lit_transfer.config import Config
from lit_transfer.errors import UserError
from lit_transfer.phases.table import differences
from lit_transfer.reading import load, parse
from lit_transfer.tracking import ENVIRONMENT, MetricsFile, Recorder, Run, commit, open_run, wandb_logger


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows), "every row has the header's columns"
    return rows


def config(runs: Path, name: str = "run", **sections: Any) -> Config:
    plain = {
        "name": name,
        "runs_dir": str(runs),
        "data": {"train": {"manifest": "x", "split": "train"}},
        "model": {"backbone": "timm/net"},
        "phases": [{"name": "a", "max_epochs": 1, "lr": 0.1}],
    }
    return parse(Config, plain | sections)


@pytest.fixture(autouse=True)
def nobody_has_opened_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "null")


def opened(settings: Config, fingerprint: dict[str, Any], **changes: Any) -> Run:
    """As another process would open it, which is handed nothing."""
    os.environ[ENVIRONMENT] = "null"
    return open_run(settings, fingerprint, differences, **changes)


def test_values_of_one_step_share_a_row_and_new_metrics_add_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    metrics.add("head", 0, 1, {"train/loss": 0.5})
    assert read(path) == [{"phase": "head", "epoch": "0", "step": "1", "train/loss": "0.5"}]
    metrics.add("head", 0, 2, {"train/loss": 0.25})
    metrics.add("head", 0, 2, {"val/loss": 1 / 3})
    metrics.add("thaw", 1, 3, {"train/loss": float("nan")})
    assert read(path) == [
        {"phase": "head", "epoch": "0", "step": "1", "train/loss": "0.5", "val/loss": ""},
        {"phase": "head", "epoch": "0", "step": "2", "train/loss": "0.25", "val/loss": "0.333333"},
        {"phase": "thaw", "epoch": "1", "step": "3", "train/loss": "nan", "val/loss": ""},
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_whole_after_every_call(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    names = ["a", "b", "a", "c", "b,d", 'e"f']
    for step in range(12):
        metrics.add("head", 0, step // 2, {names[step % 6]: step})
        rows = read(path)
        assert len(rows) == step // 2 + 1
        assert rows[-1][names[step % 6]] == str(step)
    assert read(path) == [dict.fromkeys(rows[0], "") | row for row in metrics.rows]


def test_rows_of_columns_that_are_known_are_not_paid_for_by_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch of a head takes milliseconds, and so would writing the whole file for it."""
    replaced: list[Path] = []
    real = tracking.replacing
    monkeypatch.setattr(tracking, "replacing", lambda path: replaced.append(path) or real(path))
    metrics = MetricsFile(tmp_path / "metrics.csv")
    for step in range(1, 20):
        metrics.add("head", step, step, {"train/loss": step, "lr": 0.1})
        metrics.add("head", step, step, {"val/loss": 1 / step, "train/loss": 2 * step})
    assert len(replaced) == 2
    rows = read(metrics.path)
    assert rows == metrics.rows
    assert [(row["step"], row["train/loss"]) for row in rows] == [(str(s), str(2 * s)) for s in range(1, 20)]


def written(path: Path) -> MetricsFile:
    metrics = MetricsFile(path)
    for phase, epoch, step in (
        ("head", 0, 2),
        ("head", 1, 4),
        ("thaw", 2, 6),
        ("thaw", 3, 8),
        ("last", 4, 10),
    ):
        metrics.add(phase, epoch, step, {"train/loss": step / 10})
    return metrics


@pytest.mark.parametrize(
    ("phase", "step", "finished", "kept"),
    [
        ("thaw", 6, ["head"], [2, 4, 6]),
        ("thaw", 4, ["head"], [2, 4]),
        ("head", 0, [], []),
        ("last", 10, ["head", "thaw"], [2, 4, 6, 8, 10]),
    ],
)
def test_a_resumed_run_forgets_what_it_will_write_again(
    tmp_path: Path, phase: str, step: int, finished: list[str], kept: list[int]
) -> None:
    path = tmp_path / "metrics.csv"
    written(path)
    metrics = MetricsFile(path)
    metrics.drop_after(phase, step, finished)
    assert [int(row["step"]) for row in read(path)] == kept
    metrics.add(phase, 9, 99, {"train/loss": 1.0, "val/loss": 2.0})
    assert [int(row["step"]) for row in read(path)] == [*kept, 99]
    assert read(path)[-1]["val/loss"] == "2"


def test_a_row_that_a_full_disk_cut_short_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    written(path)
    path.write_bytes(path.read_bytes()[:-6])
    metrics = MetricsFile(path)
    metrics.drop_after("last", 10, ["head", "thaw"])
    metrics.add("last", 4, 10, {"train/loss": 1.0})
    assert [row["step"] for row in read(path)] == ["2", "4", "6", "8", "10"]


def test_a_new_run_writes_its_config_and_record(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = open_run(settings, {"seed": 0}, differences)
    assert not run.resumed and run.folder == tmp_path / "run"
    assert re.fullmatch(r"run-[0-9a-f]{8}", run.id)
    assert load(run.folder / "config.yaml") == settings
    record = json.loads((run.folder / "run.json").read_text())
    assert record == run.record and record["fingerprint"] == {"seed": 0}
    assert set(record) == {"id", "created", "commit", "versions", "fingerprint"}
    assert all(re.match(r"\d+\.\d+", version) for version in record["versions"].values())
    assert run.checkpoints("head") == run.folder / "checkpoints" / "head" and run.summary() is None


def test_the_same_settings_open_the_run_again(tmp_path: Path) -> None:
    fingerprint = {"data": {"digest": "a"}, "phases": [{"lr": 0.1, "shape": (1, 2)}]}
    first = opened(config(tmp_path), fingerprint)
    again = opened(config(tmp_path), fingerprint)
    assert again.resumed and again.record == json.loads(json.dumps(first.record))
    assert opened(config(tmp_path, "other"), fingerprint).id != first.id
    (first.folder / "summary.json").write_text('{"test/accuracy": 0.5}')
    assert again.summary() == {"test/accuracy": 0.5}


def test_other_settings_are_refused_with_the_differences(tmp_path: Path) -> None:
    opened(config(tmp_path), {"seed": 0, "phases": [{"lr": 0.1}]})
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(UserError) as caught:
        opened(config(tmp_path, seed=1), {"seed": 1, "phases": [{"lr": 0.2}]})
    assert re.search(
        r"run holds a run with other settings \(seed: 0 -> 1; phases\[0\]\.lr: 0\.1 -> 0\.2\)",
        str(caught.value),
    )
    assert "choose another name, remove the directory, or go on under the new ones with --allow-" in str(caught.value)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert load(tmp_path / "run" / "config.yaml").seed == 0


@pytest.mark.parametrize("resumed", [False, True])
def test_ranks_are_handed_what_the_first_process_decided(tmp_path: Path, resumed: bool) -> None:
    settings = config(tmp_path)
    if resumed:
        opened(settings, {"seed": 0})
    first = opened(settings, {"seed": 0})
    rank = open_run(settings, {"seed": 0}, differences)  # a child: the environment is inherited
    assert (rank.resumed, first.resumed) == (resumed, resumed), "though run.json is there by now"
    assert rank.id == first.id and rank.folder == first.folder and rank.record == first.record
    assert len(os.environ[ENVIRONMENT]) < 500, "no fingerprint: what the environment holds has a limit"
    other = open_run(config(tmp_path, "other"), {"seed": 0}, differences)
    assert other.id != first.id and not other.resumed, "it is handed over for one directory only"


def test_a_directory_without_a_record_is_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("half a run")
    run = opened(config(tmp_path), {"seed": 0})
    assert not run.resumed and load(run.folder / "config.yaml").name == "run"


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_commit_says_which_code_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "package" / "tracking.py"
    module.parent.mkdir()
    module.write_text("one")
    monkeypatch.setattr(tracking, "__file__", str(module))
    assert commit() is None, "no repository"
    git(tmp_path, "init")
    (tmp_path / "other").write_text("x")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "x")
    assert commit() is None, "installed inside somebody else's repository"
    git(tmp_path, "add", "package/tracking.py")
    git(tmp_path, "commit", "-m", "y")
    clean = commit()
    assert clean is not None and re.fullmatch("[0-9a-f]{40}", clean)
    module.write_text("two")
    assert commit() == clean + "+changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None, "no git"


@pytest.mark.parametrize(
    ("mode", "key", "offline"),
    [
        ("auto", "", True),
        ("auto", "k", False),
        ("online", "", False),
        ("offline", "k", True),
        ("off", "k", None),
    ],
)
def test_wandb_is_offline_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, key: str, offline: bool | None
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(tracking, "WandbLogger", lambda **settings: settings)
    settings = config(tmp_path, tracking={"wandb": mode, "project": "p", "tags": ["t"]})
    run = opened(settings, {"seed": 0, "data": {"train": {"digest": "d1"}}})
    made: Any = wandb_logger(settings, run)
    if offline is None:
        assert made is None
        return
    assert (made["offline"], made["id"], made["project"], made["tags"]) == (offline, run.id, "p", ["t"])
    assert made["config"]["commit"] == run.record["commit"] and made["config"]["seed"] == 0
    assert made["config"]["dataset_digest"] == "d1"


def test_allowed_changes_take_the_place_of_the_settings_and_the_record_keeps_the_earlier_ones(tmp_path: Path) -> None:
    first = opened(config(tmp_path), {"seed": 0, "lr": 0.1})
    for seed in (1, 2):
        run = opened(config(tmp_path, seed=seed), {"seed": seed, "lr": 0.1}, allow_changes=True)
        assert run.resumed and run.id == first.id
    record = json.loads((run.folder / "run.json").read_text())
    assert record == run.record and record["fingerprint"] == {"seed": 2, "lr": 0.1}
    assert [earlier["fingerprint"]["seed"] for earlier in record["earlier"]] == [0, 1]
    assert [earlier["changes"] for earlier in record["earlier"]] == [["seed: 0 -> 1"], ["seed: 1 -> 2"]]
    assert load(run.folder / "config.yaml").seed == 2
    again = opened(config(tmp_path, seed=2), {"seed": 2, "lr": 0.1}, allow_changes=True)
    assert again.record == run.record, "nothing has changed"
    with pytest.raises(UserError, match="seed: 2 -> 0"):
        opened(config(tmp_path), {"seed": 0, "lr": 0.1})


def recorder(folder: Path, **settings: Any) -> Recorder:
    """Of a phase behind 2 epochs and 11 steps; 10 samples, 4 a step, so 3 steps an epoch."""
    place = {"phase": "a", "first_epoch": 2, "first_step": 11}
    size = {"samples": 10, "global_batch": 4, "steps_per_epoch": 3, "log_every_steps": 100}
    return Recorder(MetricsFile(folder / "metrics.csv"), None, **{**place, **size, **settings})


RATES = {"stem": 0.1, "head": 0.5}


def test_a_step_is_a_row_every_so_many_steps_and_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    for every, steps in ((100, ["14", "17"]), (5, ["14", "15", "17"])):
        folder = tmp_path / str(every)
        folder.mkdir()
        curve = recorder(folder, log_every_steps=every)
        for step in range(1, 8):
            curve.mark()
            curve.batch_came()
            if curve.step_ended(step):
                curve.write_step(step, step / 10, RATES)
        rows = read(folder / "metrics.csv")
        assert [row["step"] for row in rows] == steps, "of the run"
        assert rows[0]["train/loss"] == "0.3" and (rows[0]["lr/stem"], rows[0]["lr/head"]) == ("0.1", "0.5")
        assert [row["epoch"] for row in rows] == ["2", *["3"] * (len(rows) - 1)]
        assert curve.totals["images"] == 2 * 10 + 4


def test_waiting_is_counted_for_every_part_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: now[0])
    curve = recorder(tmp_path, log_every_steps=1)

    def passes(seconds: float) -> None:
        now[0] += seconds

    curve.mark()
    for part in range(2):
        passes(1)
        curve.batch_came()
        passes(3)
        if part == 0:
            curve.part_ended()
    assert curve.step_ended(1)
    curve.write_step(1, 0.5, RATES)
    passes(100)  # validation
    with curve.saving():
        passes(5)
    curve.mark()
    assert (curve.totals["train_seconds"], curve.totals["wait_seconds"]) == (8, 2)
    assert curve.totals["checkpoint_seconds"] == 5 and curve.seconds == 113
    (row,) = read(tmp_path / "metrics.csv")
    assert float(row["images_per_s"]) == 4 / 8 and float(row["data_wait_share"]) == 2 / 8


def test_a_resumed_phase_counts_the_whole_of_its_work(tmp_path: Path) -> None:
    first, second = recorder(tmp_path), recorder(tmp_path)
    work = {"train_seconds": 10.0, "wait_seconds": 2.0, "images": 40.0}
    first.totals |= work | {"seconds": 30.0}
    second.go_on_from(first.state())
    assert {key: second.totals[key] for key in work} == work
    assert 30 <= second.seconds < 40
