"""Runs that read stored activations, beside the same runs that compute them."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from digits import digits, finished_run
from stored_runs import (
    EXACT,
    FLIPS,
    FROZEN,
    HEAD,
    MOVING,
    OFF,
    TOP,
    assert_same,
    choices,
    configured,
    counts,
    cuts,
    parts,
    ran,
    storing_pays,
    written,
)

from lit_transfer.activations.costs import Decision
from lit_transfer.activations.data import StoredDataset
from lit_transfer.activations.library import Library
from lit_transfer.activations.module import StoredData
from lit_transfer.activations.prefix import Recipe
from lit_transfer.config import Config
from lit_transfer.data.loading import SampleDataset, loader
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.module import ImageData
from lit_transfer.launch import main


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """64 samples of train and 32 of val: all batches have 32, for other shapes round otherwise."""
    return digits(tmp_path_factory.mktemp("stored") / "digits", count=128)


# Phases, settings of the store, other sections, and parts that are built: of train and val at each cut.
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], int]] = {
    "thaw": ([HEAD, TOP, {**TOP, "name": "deeper", "train": {"from": "blocks.3"}, "max_epochs": 1}], {}, {}, 3 * 2),
    "a head on what was thawed": ([TOP, HEAD], {}, {}, 2 * 2),
    "views of 2 epochs, then of 2 others": (
        [HEAD, {**TOP, "max_steps": 3, "max_epochs": None}],
        {"views": 4},
        {"augment": MOVING},
        2 * (2 + 1),
    ),
    "ema, until, dropout and statistics of the batch": (
        [
            {**TOP, "norm": "batch", "ema_decay": 0.8, "max_epochs": 3, "until": {"metric": "val/loss", "patience": 1}}
            | {"validate_every_steps": 1, "restore_best": True, "schedule": "warmup_cosine"}
        ],
        {},
        {"model": {"backbone": "timm/test_efficientnet", "weights": "none", "head": {"hidden": [8], "dropout": 0.3}}},
        2,
    ),
    "accumulate": ([{**TOP, "global_batch": 64, "accumulate": 2, "clip_norm": 0.1}], {}, {}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_from_the_store_is_the_run_without_to_the_bit(manifest: Manifest, tmp_path: Path, case: str) -> None:
    phases, activations, sections, built = CASES[case]
    off = configured(manifest, tmp_path, "off", phases, OFF | activations, **sections)
    stored = configured(manifest, tmp_path, "stored", phases, EXACT | activations, **sections)
    assert_same(ran(stored), ran(off))
    frozen = {"head": FROZEN, "top": FROZEN - 2, "deeper": 4}
    assert cuts(stored) == {phase["name"]: frozen[phase["name"]] for phase in phases}
    assert cuts(off) == {}
    assert counts(tmp_path) == {"built": built, "wasted": 0, "corrupted": 0}


def test_one_pass_serves_later_phases_and_runs(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, missing = Library.fill, []

    def watched(library: Library, cuts: set[int], recipe: Recipe, **settings: Any) -> None:
        missing.append({cut: library.missing(cut, recipe) for cut in cuts})
        fill(library, cuts, recipe, **settings)

    monkeypatch.setattr(Library, "fill", watched)
    first = configured(manifest, tmp_path, "first", [HEAD, TOP], EXACT)
    expected = ran(first)
    assert missing == [{FROZEN: 96, FROZEN - 2: 96}, {FROZEN: 0}, {FROZEN - 2: 0}, {FROZEN - 2: 0}]
    assert choices(first)["head"]["tapped"] == [FROZEN - 2]
    again = configured(manifest, tmp_path, "again", [HEAD, TOP], EXACT)
    assert_same(ran(again), expected)
    assert counts(tmp_path)["built"] == 4, "two cuts of two streams"


@pytest.mark.parametrize(
    ("activations", "augment", "tolerance"),
    [({}, {}, 2e-3), ({"dtype": "bfloat16"}, {}, 2e-2), (EXACT | {"views": "d4"}, FLIPS, 1e-4)],
    ids=["fast in float16", "fast in bfloat16", "d4"],
)
def test_other_ways_to_store_stay_near(
    manifest: Manifest, tmp_path: Path, activations: dict[str, Any], augment: dict[str, Any], tolerance: float
) -> None:
    """By plain gradient descent, whose steps are as far apart as its gradients are."""
    phases = [{**phase, "optimizer": "sgd"} for phase in (HEAD, TOP)]
    views = {"views": activations.get("views")}
    off = ran(configured(manifest, tmp_path, "off", phases, OFF | views, augment=augment))
    given = configured(manifest, tmp_path, "stored", phases, {"store": "require"} | activations, augment=augment)
    assert 0 < ran(given).apart(off) < tolerance
    assert cuts(given) == {"head": FROZEN, "top": FROZEN - 2}


@pytest.mark.parametrize("by_workers", [False, True], ids=["on a CPU", "elsewhere"])
def test_workers_read_pictures_and_on_other_devices_than_a_cpu_records(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_workers: bool
) -> None:
    """Where they read is no matter: both as without a store."""
    off = configured(manifest, tmp_path, "off", [{**TOP, "max_epochs": 1}], OFF | {"views": 2}, augment=MOVING)
    given = configured(manifest, tmp_path, "stored", [{**TOP, "max_epochs": 1}], EXACT | {"views": 2}, augment=MOVING)
    given = replace(given, data=replace(given.data, workers=1))
    expected, made = ran(off), set()

    def noted(dataset: SampleDataset, sampler: Any, workers: int) -> Any:
        made.add((type(dataset), workers))
        return loader(dataset, sampler, workers)

    for module in ("lit_transfer.activations.build", "lit_transfer.data.module"):
        monkeypatch.setattr(f"{module}.loader", noted)
    if by_workers:
        monkeypatch.setattr(StoredData, "_workers", ImageData._workers)
    assert_same(ran(given), expected)
    assert made == {(SampleDataset, 1), (StoredDataset, int(by_workers))}


# Automatic


def test_auto_computes_a_tiny_run_and_says_so(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    off, auto = (configured(manifest, tmp_path, name, [TOP], {"store": name}) for name in ("off", "auto"))
    assert_same(ran(auto), ran(off))
    assert "phase top: computes its frozen stages in each epoch, 0 s in all" in capsys.readouterr().out
    assert cuts(auto) == {"top": None} and not (tmp_path / "store").exists()


def test_auto_stores_where_that_pays_and_says_why(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storing_pays(monkeypatch)
    exact = EXACT | {"store": "auto"}
    off, auto = (configured(manifest, tmp_path, name, [HEAD, TOP], exact | {"store": name}) for name in ("off", "auto"))
    assert_same(ran(auto), ran(off))
    assert cuts(auto) == {"head": FROZEN, "top": FROZEN - 2}
    # 7 s for each of 2 epochs of 64 + 32 samples, and 5 s in the later phase.
    told = "at head: building 0 s (96 records, 0 MB), which saves 2304 s of this and later phases"
    assert told in capsys.readouterr().out


def pictures(config: Config) -> set[str]:
    """Of the run as a whole."""
    return {path.name for path in (config.run_dir / "report").glob("*.png")}


def test_what_was_measured_stays_with_the_decision_and_is_drawn(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storing_pays(monkeypatch)
    config = configured(manifest, tmp_path, "auto", [HEAD, TOP], EXACT | {"store": "auto"})
    finished_run(config)
    head, top = (choices(config)[name]["weighed"] for name in ("head", "top"))
    assert head["samples"] == 2 * 96 and head["compute_s"] == pytest.approx(2 * 96 * FROZEN)
    assert [cut["stage"] for cut in head["cuts"] if cut["chosen"]] == ["head"] and len(head["cuts"]) == FROZEN
    assert head["cuts"][-1]["bytes"] == head["cuts"][-1]["missing_bytes"] == 96 * 256 * 4
    assert [cut["run_on_s"] for cut in head["cuts"]] == pytest.approx([2 * 96 * left for left in range(6, -1, -1)])
    assert [cut["chosen"] for cut in top["cuts"]] == [False] * 4 + [True] and top["cuts"][-1]["missing_bytes"] == 0
    assert pictures(config) == {"activations_head.png", "activations_top.png"}


def test_of_what_was_not_measured_there_is_no_picture(manifest: Manifest, tmp_path: Path) -> None:
    config = configured(manifest, tmp_path, "required", [HEAD], EXACT)
    finished_run(config)
    assert cuts(config) == {"head": FROZEN} and choices(config)["head"]["weighed"] is None
    assert pictures(config) == set()


def test_auto_stores_in_the_place_of_what_nobody_uses(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storing_pays(monkeypatch)
    settings = EXACT | {"store": "auto", "limit_gb": 96 * 256 * 4 * 1.5 / 1e9}
    for seed in (0, 1):  # another network each time
        config = configured(manifest, tmp_path, f"seed-{seed}", [HEAD], settings, seed=seed)
        ran(config)
        assert cuts(config) == {"head": FROZEN}
    assert len(parts(tmp_path)) in (2, 3), "of four, one or both of the first run made room"


def test_measuring_leaves_the_network_as_it_was(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained stage left in eval mode would train otherwise; what is measured is that of this computer."""
    phases = [{**TOP, "norm": "batch"}]
    off, auto = (configured(manifest, tmp_path, name, phases, {"store": name}) for name in ("off", "auto"))
    expected = ran(off)
    monkeypatch.setattr("lit_transfer.phases.choice._WORTH_MEASURING_S", 0.0)
    monkeypatch.setattr("lit_transfer.phases.choice.decide", lambda *_: Decision({}, 0.0, 0.0))
    assert_same(ran(auto), expected)
    assert cuts(auto) == {"top": None} and "building" in choices(auto)["top"]["why"]


def test_an_augmentation_that_cannot_be_stored_is_computed_and_explained(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [TOP, {**TOP, "name": "mixed", "cutmix": 1.0, "augment_strength": 0.0}]
    off, auto = (
        configured(manifest, tmp_path, name, phases, {"store": name}, augment=MOVING) for name in ("off", "auto")
    )
    assert_same(ran(auto), ran(off))
    out = capsys.readouterr().out
    assert "phase top computes its frozen stages in each epoch: augment draws new pictures each epoch" in out
    assert "phase mixed computes its frozen stages in each epoch: cutmix cuts pictures" in out


# What require refuses


@pytest.mark.parametrize(
    ("row", "sections", "reason"),
    [
        ({}, {"augment": MOVING}, "augment draws new pictures each epoch"),
        ({}, {"augment": MOVING, "views": "d4"}, "activations.views d4 stores flips and quarter turns"),
        ({"cutmix": 1.0}, {}, "cutmix cuts pictures"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_any_work(
    manifest: Manifest, tmp_path: Path, row: Any, sections: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    activations = {"store": "require", "views": sections.pop("views", None)}
    config = configured(manifest, tmp_path, "refused", [{**TOP, **row}], activations, **sections)
    file = written(config, tmp_path)
    for verb in ("plan", "train"):
        assert main([verb, "--config", file]) == 2
        assert f"phase 'top': activations.store is require, but {reason}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("row", "sections", "reason"),
    [
        ({}, {"augment": MOVING}, "augment draws new pictures each epoch"),
        ({"mixup": 0.4}, {}, "mixup mixes pictures, and would mix activations at the cut"),
    ],
)
def test_heads_that_auto_would_not_store_for_are_refused_before_any_work(
    manifest: Manifest, tmp_path: Path, row: Any, sections: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    many = {**HEAD, "name": "many", "lr": None, "heads": {"lr": [0.1, 0.01]}, **row}
    config = configured(manifest, tmp_path, "refused", [HEAD, many], {"store": "auto"}, **sections)
    assert main(["train", "--config", written(config, tmp_path)]) == 2
    assert f"phase 'many': heads trains on stored features, but {reason}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_phase_without_frozen_stages_asks_for_nothing(manifest: Manifest, tmp_path: Path) -> None:
    phases = [{**TOP, "train": "all", "max_steps": 1, "max_epochs": None, "cutmix": 1.0}]
    config = configured(manifest, tmp_path, "all", phases, {"store": "require"}, augment=MOVING)
    ran(config)
    assert cuts(config) == {} and not (tmp_path / "store").exists()


def test_mixup_mixes_stored_activations_only_where_they_are_required(manifest: Manifest, tmp_path: Path) -> None:
    phases = [{**TOP, "mixup": 0.4}]
    auto, off, stored = (
        configured(manifest, tmp_path, name, phases, EXACT | {"store": name}) for name in ("auto", "off", "require")
    )
    expected = ran(off)
    assert_same(ran(auto), expected)
    given = ran(stored)
    assert cuts(stored) == {"top": FROZEN - 2} and given.ends == expected.ends and given.apart(expected) > 0


def test_signals_are_given_back_after_a_head_was_trained_without_a_trainer(manifest: Manifest, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ran(configured(manifest, tmp_path, "signals", [HEAD], EXACT))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
