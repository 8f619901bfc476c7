"""Runs whose store fails them: no room, damaged records and pictures, and runs that are stopped or killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits, prepared
from packing import damage
from stored_runs import (
    EXACT,
    FROZEN,
    HEAD,
    MOVING,
    OFF,
    TOP,
    Left,
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
from test_kill import assert_same_run, run_jobs

from lit_transfer.activations.costs import Decision
from lit_transfer.activations.library import Library
from lit_transfer.activations.prefix import Recipe, plain_recipe
from lit_transfer.activations.shelf import Shelf
from lit_transfer.activations.store import ActivationStore
from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.errors import UserError
from lit_transfer.phases.checkpoint import PhaseFiles
from lit_transfer.phases.run import build_data, run_phases


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """64 samples of train and 32 of val: all batches have 32, for other shapes round otherwise."""
    return digits(tmp_path_factory.mktemp("stored") / "digits", count=128)


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


def test_without_room_for_its_own_cut_a_phase_reads_a_shallower_one_that_is_there(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit_gb = 96 * 256 * 4 * 0.9 / 1e9  # less than the features take
    ran(configured(manifest, tmp_path, "top", [TOP], EXACT))
    small = configured(manifest, tmp_path, "small", [HEAD], EXACT | {"limit_gb": limit_gb})
    assert_same(ran(small), ran(configured(manifest, tmp_path, "off", [HEAD], OFF)))
    assert cuts(small) == {"head": FROZEN - 2}
    told = "phase head: reads the activations at blocks.4; there is no room for those at head"
    assert told in capsys.readouterr().out


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


@pytest.mark.parametrize("row", [HEAD, TOP], ids=lambda row: row["name"])
def test_what_a_phase_reads_is_not_evicted_while_it_runs(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]
) -> None:
    store, left, real = ActivationStore(tmp_path / "store", limit_bytes=0), [], PhaseFiles.write_last

    def write(files: PhaseFiles, *arguments: Any) -> None:
        real(files, *arguments)
        assert store.prune(unused_s=0) == [] and not store.make_room(1)
        left.append(len(store.shelves()))

    monkeypatch.setattr(PhaseFiles, "write_last", write)
    ran(configured(manifest, tmp_path, "run", [row], EXACT))
    assert left and set(left) == {2}
    assert len(store.prune(unused_s=0)) == 2, "until it ends"


def test_a_store_is_the_groups_also_where_the_disk_was_measured_first(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_transfer.phases.choice._WORTH_MEASURING_S", 0.0)
    monkeypatch.setattr("lit_transfer.phases.choice.decide", lambda *_: Decision({"head": FROZEN}, 0.0, 1.0))
    config = configured(manifest, tmp_path, "run", [HEAD], {"store": "auto", "group_writable": True})
    config = replace(config, activations=replace(config.activations, folder=str(tmp_path / "team" / "store")))
    umask = os.umask(0o077)
    try:
        ran(config)
    finally:
        os.umask(umask)
    assert cuts(config)["head"] is not None
    found = [tmp_path / "team", *(tmp_path / "team").rglob("*")]
    assert {path.stat().st_mode & 0o7777 for path in found if path.is_dir()} == {0o2775}
    assert {path.stat().st_mode & 0o7777 for path in found if path.is_file()} == {0o664}


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


def test_a_phase_that_goes_on_on_another_machine_stores_under_its_name(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Left
) -> None:
    """What it computes has the bits of that machine; who is on the first one must not take them for its own."""
    config = to_be_killed(manifest, tmp_path)
    killed_after(config, 3, monkeypatch)
    path = config.run_dir / "checkpoints" / "top" / "activations.json"
    decided = json.loads(path.read_text())
    decided["recipe"]["device"] = "cpu of another kind"
    path.write_text(json.dumps(decided))
    assert_same(ran(config), uninterrupted)
    shelves = ActivationStore(tmp_path / "store", limit_bytes=0).shelves()
    assert {shelf.description["recipe"]["device"] for shelf in shelves} == {plain_recipe(torch.device("cpu")).device}


def test_a_phase_does_not_go_on_at_another_cut(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded elsewhere, the numbers would not give the same weights: a shallower one that is there is no way out."""
    deeper = {**TOP, "train": {"last": 3}, "max_epochs": 3}
    ran(configured(manifest, tmp_path, "deeper", [deeper], EXACT | {"views": 4}, augment=MOVING))
    there = {*(tmp_path / "store").iterdir()}
    config = to_be_killed(manifest, tmp_path)
    killed_after(config, 3, monkeypatch)
    for folder in {*(tmp_path / "store").iterdir()} - there:
        shutil.rmtree(folder)
    small = replace(config, activations=replace(config.activations, limit_gb=1e-6))
    with pytest.raises(UserError, match="there is no room below"):
        ran(small)


def stored_as(config: Config, store: Any) -> Config:
    return replace(config, activations=replace(config.activations, store=store))


def test_a_phase_that_began_to_read_does_not_compute_without_room(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = to_be_killed(manifest, tmp_path, store="auto")
    with monkeypatch.context() as patch:
        storing_pays(patch)
        killed_after(config, 3, monkeypatch)
    decided = choices(config)
    shutil.rmtree(tmp_path / "store")
    monkeypatch.setattr(Shelf, "write", full_disk)
    told = "No space left on device, but phase 'top' began with stored ones .*; make room, .* choose another --name.$"
    with pytest.raises(UserError, match=told):
        ran(config)
    assert choices(config) == decided


@pytest.mark.parametrize(("reads", "changed"), [(True, "off"), (False, "require")])
def test_whether_a_phase_reads_or_computes_changes_only_where_that_is_agreed_to(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: bool, changed: str
) -> None:
    config = to_be_killed(manifest, tmp_path, store="auto")
    with monkeypatch.context() as patch:
        if reads:
            storing_pays(patch)
        killed_after(config, 3, monkeypatch)
    assert cuts(config) == {"top": FROZEN - 2 if reads else None}
    other = stored_as(config, changed)
    with pytest.raises(UserError, match=rf"\(activations.store: auto -> {changed}\); .* with --allow-changed-plan.$"):
        prepared(other)
    opened: list[int] = []
    monkeypatch.setattr("lit_transfer.phases.run.build_data", noting_streams(opened))
    run_phases(*prepared(other, allow_changed_plan=True))
    assert opened == [0 if reads else 2], "streams that are read from the store"


def noting_streams(found: list[int]) -> Callable[..., Any]:
    def build(setup: Any, plan: Any, steps: range, before: Any, stored: dict[str, Any]) -> Any:
        assert steps.start == 3, "it goes on from its step"
        found.append(len(stored))
        return build_data(setup, plan, steps, before, stored)

    return build


def test_a_phase_that_began_to_compute_does_not_read_later(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Left
) -> None:
    config = to_be_killed(manifest, tmp_path, store="auto")
    killed_after(config, 3, monkeypatch)
    storing_pays(monkeypatch)
    assert_same(ran(config), uninterrupted)
    assert cuts(config) == {"top": None} and not (tmp_path / "store").exists()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in a terminal; a shell's background job ignores it from its start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_ends_the_build_of_a_later_phase(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phase before, trained by the plain loop, has left a handler that waits for the next step."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    found, fill = [], Library.fill

    def interrupted(library: Library, cuts: set[int], recipe: Recipe, **settings: Any) -> None:
        found.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
        if len(found) == 3:  # the first phase calls it twice
            os.kill(os.getpid(), signal.SIGINT)
        fill(library, cuts, recipe, **settings)

    monkeypatch.setattr(Library, "fill", interrupted)
    config = configured(manifest, tmp_path, "run", [HEAD, TOP], EXACT)
    with pytest.raises(KeyboardInterrupt):
        ran(config)
    assert found == [handlers] * 3
    done = [(config.run_dir / "checkpoints" / name / "done.json").is_file() for name in ("head", "top")]
    assert done == [True, False]


def test_what_a_killed_build_has_stored_is_kept(manifest: Manifest, tmp_path: Path) -> None:
    """SIGKILL in the middle of the third part of four; the same command builds the other two, and ends the same."""
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
