"""What was written on a shelf is what is read, or an error."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from shelves import DESCRIPTION, fill, names, new_shelf, path, rows, values

from lit_transfer.activations import part as part_file
from lit_transfer.activations.contents import Contents, read_contents
from lit_transfer.activations.shelf import Shelf
from lit_transfer.errors import UserError


@pytest.fixture
def small(tmp_path: Path) -> Shelf:
    """One part of 3 records; the second is damaged."""
    made = new_shelf(tmp_path, 3, (2,))
    numbers = values(made)
    numbers[1] = 0
    made.write(0, numbers, {1: "cannot be decoded"})
    return made


@pytest.mark.parametrize("dtype", part_file.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 1, 7)], ids=str)
def test_records_are_what_was_written(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = new_shelf(tmp_path, 600, shape, dtype)
    assert (made.parts, made.missing(), made.missing_records()) == (3, [0, 1, 2], 600)
    assert fill(made).missing() == [] and made.missing_records() == 0
    whole = made.load()
    assert whole.dtype == dtype and torch.equal(whole, values(made))
    places = [599, 0, 300, 300, 255, 256]
    assert torch.equal(made.read(places), whole[places])
    assert made.read([]).shape == (0, *shape)
    assert made.counts() == {"built": 3, "built_records": 600} | {
        f"{event}{unit}": 0 for event in ("wasted", "corrupted") for unit in ("", "_records")
    }


def test_values_in_another_memory_order_and_not_a_number(tmp_path: Path) -> None:
    made = new_shelf(tmp_path, 4, (2, 3, 3))
    given = values(made).contiguous(memory_format=torch.channels_last)
    given[1, 0, 0, 0], given[2, 1, 1, 1] = float("nan"), float("inf")
    made.write(0, given, {})
    assert torch.equal(made.load().nan_to_num(7.0), given.nan_to_num(7.0))


def test_a_part_is_a_safetensors_file(small: Shelf) -> None:
    with safe_open(path(small, 0), framework="pt") as file:
        assert torch.equal(file.get_tensor("records"), small.load())
        assert file.get_tensor("checksum").shape == (3,)
        assert file.metadata()["key"] == small.key and json.loads(file.metadata()["damaged"]) == {
            "1": "cannot be decoded"
        }


def test_the_second_of_two_builds_is_waste(tmp_path: Path) -> None:
    made = fill(new_shelf(tmp_path))
    before = path(made, 0).stat()
    made.write(0, rows(made, 0), {})
    assert os.path.samestat(before, path(made, 0).stat())
    assert made.counts()["wasted"] == 1 and made.counts()["wasted_records"] == 256
    assert names(made) == [path(made, part).name for part in range(3)]


def test_a_build_whose_unfinished_file_was_removed_is_waste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = new_shelf(tmp_path), os.fsync

    def removed(descriptor: int) -> None:
        real(descriptor)
        for file in made.folder.glob(".part-*"):
            file.unlink()

    monkeypatch.setattr(part_file.os, "fsync", removed)
    made.write(0, rows(made, 0), {})
    assert made.missing() == [0, 1, 2] and made.counts()["wasted"] == 1 and made.counts()["built"] == 0


@pytest.fixture
def no_more_than_1000_bytes() -> Iterator[None]:
    """A limit of this process stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, no_more_than_1000_bytes: None) -> None:
    made = new_shelf(tmp_path)
    with pytest.raises(OSError) as raised:
        made.write(0, rows(made, 0), {})
    assert raised.value.errno == errno.EFBIG
    assert names(made) == [] and made.missing() == [0, 1, 2] and made.counts()["built"] == 0


def test_who_may_compute_a_part(tmp_path: Path) -> None:
    made = new_shelf(tmp_path)
    claim = made.claim(0)
    assert claim is not None and made.claim(0) is None
    made.write(0, rows(made, 0), {})
    claim.release()
    assert made.claim(0) is None, "it is there"
    second = made.claim(1)
    assert second is not None
    second.release()
    third = made.claim(1)
    assert third is not None, "given up"
    third.release()


def test_a_part_that_appears_between_two_looks_is_not_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = new_shelf(tmp_path), type(new_shelf(tmp_path).shared).hold

    def hold(shared: object, name: str) -> object:
        made.write(0, rows(made, 0), {})
        return real(shared, name)  # type: ignore[arg-type]

    monkeypatch.setattr(type(made.shared), "hold", hold)
    assert made.claim(0) is None
    assert names(made) == [path(made, 0).name]


def test_what_dead_builders_left_is_removed(tmp_path: Path) -> None:
    made = new_shelf(tmp_path)
    mine = made.claim(2)
    assert mine is not None
    for name in (".part-00000.0123.safetensors", ".part-00001.0123.safetensors", ".part-00002.0123.safetensors"):
        (made.folder / name).touch()
    (made.folder / ".shelf.0123.json").touch()
    claim = made.claim(0)
    assert claim is not None
    assert names(made) == [
        ".part-00001.0123.safetensors",
        ".part-00002.0123.safetensors",
        ".shelf.0123.json",
        "part-00000.lease",
        "part-00002.lease",
    ]
    with made.in_use():
        assert names(made)[:2] == [".part-00002.0123.safetensors", "part-00000.lease"], "the live builder's stays"
    claim.release()
    mine.release()


def test_it_goes_to_other_processes(tmp_path: Path) -> None:
    made = fill(new_shelf(tmp_path))
    made.read([0])
    again = pickle.loads(pickle.dumps(made))
    assert again == made and torch.equal(again.load(), values(made))


def test_a_torn_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    made = fill(new_shelf(tmp_path))
    (log,) = made.folder.glob("log-*.jsonl")
    (made.folder / "log-another.jsonl").write_text(log.read_text() + '{"event": "wasted", "par\n[]\n3\n')
    assert made.counts()["built"] == 6 and made.counts()["wasted"] == 0


@pytest.mark.parametrize("group_writable", [False, True])
def test_who_may_write(tmp_path: Path, group_writable: bool) -> None:
    umask = os.umask(0o077)
    try:
        made = Shelf(tmp_path / "team" / "store", Contents(DESCRIPTION, 300, (2,), torch.float32), group_writable)
        fill(made)
        with made.in_use():
            found = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")}
            assert len(found) == 8, "2 folders above, its own, shelf.json, 2 parts, log, lease"
            modes = {p.is_dir(): set() for p in tmp_path.rglob("*")}
            for p in tmp_path.rglob("*"):
                modes[p.is_dir()].add(p.stat().st_mode & 0o7777)
    finally:
        os.umask(umask)
    assert modes == ({True: {0o2775}, False: {0o664}} if group_writable else {True: {0o700}, False: {0o600}})


def test_the_key_is_all_that_the_records_are() -> None:
    one = Contents(DESCRIPTION, 3, (2,), torch.float32)
    others = [
        Contents({**DESCRIPTION, "more": 1}, 3, (2,), torch.float32),
        Contents(DESCRIPTION, 4, (2,), torch.float32),
        Contents(DESCRIPTION, 3, (2, 1), torch.float32),
        Contents(DESCRIPTION, 3, (2,), torch.float16),
    ]
    assert len({each.key for each in [one, *others]}) == 5
    assert one.key == Contents(dict(reversed(DESCRIPTION.items())), 3, (2,), torch.float32).key


def test_what_a_shelf_says_of_itself(tmp_path: Path) -> None:
    made = fill(new_shelf(tmp_path))
    assert read_contents(made.folder) == made.contents and read_contents(tmp_path / "nothing") is None
    sound = (made.folder / "shelf.json").read_text()
    for wrong in (sound.replace("600", "601"), sound.replace("layer3", "layer4"), sound[:20], "[]", "null"):
        (made.folder / "shelf.json").write_text(wrong)
        with pytest.raises(UserError, match=r"is not what the name of its folder stands for.*remove that folder"):
            read_contents(made.folder)


def test_a_type_that_cannot_be_stored() -> None:
    told = r"records of torch.int64 cannot be stored; use one of float32, float16, bfloat16\."
    with pytest.raises(UserError, match=told):
        Contents(DESCRIPTION, 3, (2,), torch.int64)
