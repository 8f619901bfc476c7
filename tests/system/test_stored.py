"""Runs that read stored activations, beside the same runs that compute them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from digits import digits
from packing import damage
from stored_runs import EXACT, HEAD, TOP, Left, assert_same, choices, configured, counts, cuts, ran, storing_pays

from lit_transfer.activations.shelf import Shelf
from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.errors import UserError
from lit_transfer.launch import main
from lit_transfer.phases.checkpoint import PhaseFiles
from lit_transfer.reading import to_plain

OFF = {"store": "off"}
MOVING = {"flip_h": 0.5, "rotate_degrees": 20, "brightness": 0.2}
FLIPS = {"flip_h": 0.5, "flip_v": 0.5, "quarter_turns": True}
FROZEN = 7  # stages of the tiny network
STAGES = "stem, blocks.0 to blocks.4, top"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """64 samples of train and 32 of val: all batches have 32, for other shapes round otherwise."""
    return digits(tmp_path_factory.mktemp("stored") / "digits", count=128)


CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "thaw": ([HEAD, TOP, {**TOP, "name": "deeper", "train": {"from": "blocks.3"}, "max_epochs": 1}], {}, {}),
    "views": ([HEAD, {**TOP, "max_steps": 3, "max_epochs": None}], {"views": 4}, {"augment": MOVING}),
    "ema, until, dropout and statistics of the batch": (
        [
            {**TOP, "norm": "batch", "ema_decay": 0.8, "max_epochs": 3, "until": {"metric": "val/loss", "patience": 1}}
            | {"validate_every_steps": 1, "restore_best": True, "schedule": "warmup_cosine"}
        ],
        {},
        {"model": {"backbone": "timm/test_efficientnet", "weights": "none", "head": {"hidden": [8], "dropout": 0.3}}},
    ),
    "accumulate": ([{**TOP, "global_batch": 64, "accumulate": 2, "clip_norm": 0.1}], {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_from_the_store_is_the_run_without_to_the_bit(manifest: Manifest, tmp_path: Path, case: str) -> None:
    phases, activations, sections = CASES[case]
    off = configured(manifest, tmp_path, "off", phases, OFF | activations, **sections)
    stored = configured(manifest, tmp_path, "stored", phases, EXACT | activations, **sections)
    assert_same(ran(stored), ran(off))
    frozen = {"head": FROZEN, "top": FROZEN - 2, "deeper": 4}
    assert cuts(stored) == {phase["name"]: frozen[phase["name"]] for phase in phases}
    assert cuts(off) == {}
    assert counts(tmp_path)["wasted"] == counts(tmp_path)["corrupted"] == 0


def test_one_pass_serves_later_phases_and_runs(manifest: Manifest, tmp_path: Path) -> None:
    first = configured(manifest, tmp_path, "first", [HEAD, TOP], EXACT)
    expected = ran(first)
    assert counts(tmp_path)["built"] == 4, "two cuts of two streams"
    assert choices(first)["head"]["tapped"] == [FROZEN - 2]
    again = configured(manifest, tmp_path, "again", [HEAD, TOP], EXACT)
    assert_same(ran(again), expected)
    assert counts(tmp_path)["built"] == 4


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


def test_workers_read_the_store(manifest: Manifest, tmp_path: Path) -> None:
    """Pictures, when it is built, and records, when it is read."""
    off = configured(manifest, tmp_path, "off", [{**TOP, "max_epochs": 1}], OFF | {"views": 2}, augment=MOVING)
    given = configured(manifest, tmp_path, "stored", [{**TOP, "max_epochs": 1}], EXACT | {"views": 2}, augment=MOVING)
    given = replace(given, data=replace(given.data, workers=1))
    assert_same(ran(given), ran(off))


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


def test_measuring_leaves_the_network_as_it_was(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained stage left in eval mode would train otherwise; what is measured is that of this computer."""
    phases = [{**TOP, "norm": "batch"}]
    off, auto = (configured(manifest, tmp_path, name, phases, {"store": name}) for name in ("off", "auto"))
    expected = ran(off)
    monkeypatch.setattr("lit_transfer.phases.choice._WORTH_MEASURING_S", 0.0)
    monkeypatch.setattr("lit_transfer.activations.costs.Decision.pays", False)
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


# What goes wrong


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_computed_for_or_ends_the_run_with_a_sentence(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storing_pays(monkeypatch)
    off, auto, required = (
        configured(manifest, tmp_path, name, [TOP], {"store": name}) for name in ("off", "auto", "require")
    )
    expected = ran(off)
    monkeypatch.setattr(Shelf, "write", full_disk)
    assert_same(ran(auto), expected)
    told = f"activations cannot be stored in {tmp_path / 'store'}: No space left on device"
    assert f"phase top computes its frozen stages in each epoch: {told}" in capsys.readouterr().out
    assert cuts(auto) == {"top": None}, "a restart goes on so"
    with pytest.raises(UserError, match=f"^{told}, but activations.store is require; make room, .*, or use auto.$"):
        ran(required)


@pytest.mark.parametrize("place", ["in a file", "too small"])
def test_a_store_that_cannot_be_made_is_no_store(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    storing_pays(monkeypatch)
    (tmp_path / "file").write_text("")
    settings = {"folder": str(tmp_path / "file" / "store")} if place == "in a file" else {"limit_gb": 1e-6}
    reason = "Not a directory" if place == "in a file" else "there is no room below activations.limit_gb 1e-06"
    off, auto, required = (
        configured(manifest, tmp_path, name, [TOP], {"store": name} | settings) for name in ("off", "auto", "require")
    )
    assert_same(ran(auto), ran(off))
    assert cuts(auto) == {"top": None}
    with pytest.raises(UserError, match=f"activations cannot be stored in .*: {reason}.* use auto.$"):
        ran(required)


def test_measuring_a_disk_that_cannot_be_written_computes(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("lit_transfer.phases.choice._WORTH_MEASURING_S", 0.0)
    auto = configured(manifest, tmp_path, "auto", [TOP], {"folder": str(tmp_path / "file" / "store")})
    ran(auto)
    assert "phase top computes its frozen stages in each epoch: activations cannot be" in capsys.readouterr().out


def test_later_phases_are_left_out_where_only_this_one_fits(manifest: Manifest, tmp_path: Path) -> None:
    """What they need is stored when they begin, in the place of what nobody uses any more."""
    head_bytes, top_bytes = 96 * 256 * 4, 96 * 48 * 4 * 4
    limit_gb = (head_bytes + top_bytes) * 0.7 / 1e9
    small = configured(manifest, tmp_path, "small", [HEAD, TOP], EXACT | {"limit_gb": limit_gb})
    assert_same(ran(small), ran(configured(manifest, tmp_path, "off", [HEAD, TOP], OFF)))
    assert choices(small)["head"]["tapped"] == [] and cuts(small) == {"head": FROZEN, "top": FROZEN - 2}


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "store").glob("*/part-*.safetensors"))


def test_a_corrupted_record_is_computed_again(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (configured(manifest, tmp_path, name, [TOP], EXACT) for name in ("first", "second"))
    expected = ran(first)
    for path in parts(tmp_path):
        path.write_bytes(path.read_bytes()[:-2] + b"\x12\x34")
    assert_same(ran(second), expected)
    assert "2 stored records are damaged; they are computed again" in capsys.readouterr().out
    assert counts(tmp_path) == {"built": 4, "wasted": 0, "corrupted": 2}


def test_a_record_that_is_not_what_its_picture_gives_stops_the_run(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run could compute: the store is used by others."""
    write = Shelf.write
    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "write", lambda shelf, part, values, damaged: write(shelf, part, values * 1.1, damaged))
        with pytest.raises(UserError, match=r"differs by 0\.1 of its norm from what its picture gives"):
            ran(configured(manifest, tmp_path, "first", [TOP], EXACT))
    storing_pays(monkeypatch)
    with pytest.raises(UserError, match=r"differs by 0\.1 of its norm"):
        ran(configured(manifest, tmp_path, "second", [TOP], EXACT | {"store": "auto"}))


def test_damaged_pictures_are_replaced_and_listed_as_without_a_store(tmp_path: Path) -> None:
    manifest = digits(tmp_path / "digits", count=128)
    for split, place in (("train", 5), ("val", 3)):
        damage(manifest, int(manifest.rows(split)[place]))
    off, stored = (configured(manifest, tmp_path, name, [TOP], a) for name, a in (("off", OFF), ("stored", EXACT)))
    off, stored = (replace(c, data=replace(c.data, max_bad_fraction=0.1)) for c in (off, stored))
    assert_same(ran(stored), ran(off))
    lists = [(config.run_dir / "quarantine.jsonl").read_text() for config in (off, stored)]
    assert lists[0] == lists[1] and len(lists[0].splitlines()) == 2
    strict = replace(stored, name="strict", data=replace(stored.data, max_bad_fraction=0.0))
    with pytest.raises(UserError, match=r"1 of the 64 samples of data.train are damaged"):
        ran(strict)


# Stopped and killed


class Killed(Exception):
    pass


def killed_after(config: Config, checkpoints: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until so many checkpoints are written."""
    real, left = PhaseFiles.write_last, checkpoints

    def write(files: PhaseFiles, *arguments: Any) -> None:
        nonlocal left
        real(files, *arguments)
        left -= 1
        if left == 0:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PhaseFiles, "write_last", write)
        ran(config)


@pytest.fixture(scope="module")
def uninterrupted(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """The run of the next tests, whole."""
    return ran(to_be_killed(manifest, tmp_path_factory.mktemp("whole")))


def to_be_killed(manifest: Manifest, folder: Path, **activations: Any) -> Config:
    settings = EXACT | {"views": 4} | activations
    return configured(
        manifest, folder, "run", [{**TOP, "max_epochs": 3}], settings, augment=MOVING, checkpoint={"every_steps": 1}
    )


@pytest.mark.parametrize("pruned", [False, True])
def test_a_phase_goes_on_from_what_it_began_with(
    manifest: Manifest, tmp_path: Path, uninterrupted: Left, monkeypatch: pytest.MonkeyPatch, pruned: bool
) -> None:
    """Also where `auto` would now compute, and where the store is gone: then only views to come are built."""
    config = to_be_killed(manifest, tmp_path, store="auto")
    with monkeypatch.context() as patch:
        storing_pays(patch)
        killed_after(config, 3, monkeypatch)
    assert cuts(config) == {"top": FROZEN - 2} and counts(tmp_path)["built"] == 3 + 1
    decided = choices(config)
    if pruned:
        shutil.rmtree(tmp_path / "store")
    assert_same(ran(config), uninterrupted)
    assert choices(config) == decided
    assert counts(tmp_path)["built"] == (2 + 1 if pruned else 3 + 1)


def test_a_phase_that_began_to_compute_does_not_read_later(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Left
) -> None:
    config = to_be_killed(manifest, tmp_path, store="auto")
    killed_after(config, 3, monkeypatch)
    storing_pays(monkeypatch)
    assert_same(ran(config), uninterrupted)
    assert cuts(config) == {"top": None} and not (tmp_path / "store").exists()


def written(config: Config, folder: Path) -> str:
    file = folder / f"{config.name}.yaml"
    file.write_text(yaml.safe_dump(to_plain(config)))
    return str(file)


def test_what_a_killed_build_has_stored_is_kept(manifest: Manifest, tmp_path: Path) -> None:
    """SIGKILL in the middle of the third part of four; the same command builds the other two, and ends the same."""
    from test_kill import assert_same_run, run_jobs

    configs = [configured(manifest, tmp_path, name, [HEAD, TOP], EXACT) for name in ("whole", "killed")]
    whole, killed = (
        replace(config, activations=replace(config.activations, folder=str(tmp_path / config.name)))
        for config in configs
    )
    jobs = [
        {"config": written(whole, tmp_path), "moment": None},
        {"config": written(killed, tmp_path), "moment": ["part", "head", 2]},
    ]
    run_jobs(tmp_path, jobs)
    assert_same_run(killed.run_dir, whole.run_dir, ("head", "top"))
    events = [
        json.loads(line) for log in (tmp_path / "killed").glob("*/log-*") for line in log.read_text().splitlines()
    ]
    assert [event["event"] for event in events] == ["built"] * 4
    assert len({event["pid"] for event in events}) == 2, "some before, some after"
    assert list((tmp_path / "killed").glob("*/.*")) == [], "what was half-written is gone"
