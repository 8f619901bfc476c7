"""What is wrong on a shelf is seen, said, and built again."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from shelves import fill, new_shelf, path, rows, values
from torch._utils import ExceptionWrapper

from lit_transfer.activations import part as part_file
from lit_transfer.activations.part import CorruptRecord
from lit_transfer.activations.shelf import Shelf


@pytest.fixture
def small(tmp_path: Path) -> Shelf:
    """One part of 3 records; the second is damaged."""
    made = new_shelf(tmp_path, 3, (2,))
    numbers = values(made)
    numbers[1] = 0
    made.write(0, numbers, {1: "cannot be decoded"})
    return made


def test_a_damaged_sample_says_why(small: Shelf) -> None:
    assert small.damaged() == {1: "cannot be decoded"}


def test_a_record_without_values_is_wrong_where_it_should_have_some(small: Shelf) -> None:
    small.discard(0, sound=[0, 2])  # another process has built it anew since
    assert small.verify(0, sound=[0, 2]) == small.missing() == []
    assert small.verify(0, sound=[0, 1]) == [1]
    small.discard(0, sound=[1])
    assert small.missing() == [0] and small.counts()["corrupted_records"] == 1


def test_a_list_of_damages_longer_than_one_read(tmp_path: Path) -> None:
    made = new_shelf(tmp_path, 256, (2,))
    given = {row: "x" * 100 for row in range(256)}
    made.write(0, values(made), given)
    assert made.damaged() == given and torch.equal(made.load(), values(made))


def test_no_changed_byte_goes_unseen(small: Shelf) -> None:
    sound, expected = path(small, 0).read_bytes(), small.load()
    for place in range(len(sound)):
        for bit in (1, 128):
            changed = bytearray(sound)
            changed[place] ^= bit
            path(small, 0).write_bytes(changed)
            assert small.verify(0) != []
            with pytest.raises(CorruptRecord, match=r"part-00000.safetensors is damaged: .*store verify --remove"):
                assert small.damaged() == {1: "cannot be decoded"}
                assert torch.equal(small.load(), expected)
                raise AssertionError(f"byte {place} does not matter")
    path(small, 0).write_bytes(sound)
    assert small.verify(0) == [] and torch.equal(small.load(), expected)


def test_no_cut_goes_unseen(small: Shelf) -> None:
    sound = path(small, 0).read_bytes()
    for size in [*range(len(sound)), len(sound) + 1]:
        path(small, 0).write_bytes((sound + b"0")[:size])
        assert small.verify(0) == [0, 1, 2]
        with pytest.raises(CorruptRecord):
            small.read([0])


def test_a_file_cut_off_while_it_is_open(small: Shelf) -> None:
    small.load()
    os.truncate(path(small, 0), path(small, 0).stat().st_size - 4)
    with pytest.raises(CorruptRecord, match="is damaged: it has"):
        small.load()


def test_only_the_wrong_records_are_named(tmp_path: Path) -> None:
    made = fill(new_shelf(tmp_path))
    data = bytearray(path(made, 1).read_bytes())
    for record in (3, 200):
        data[len(data) - 12 * (256 - record)] ^= 4
    path(made, 1).write_bytes(data)
    assert made.verify(0) == [] and made.verify(1) == [259, 456]
    assert torch.equal(made.read([258, 260]), values(made)[[258, 260]])
    with pytest.raises(CorruptRecord, match="records 259 are not"):
        made.read([258, 259])


def test_parts_and_shelves_that_change_places(tmp_path: Path) -> None:
    made, other = fill(new_shelf(tmp_path)), fill(new_shelf(tmp_path, 512))
    shutil.copy(path(made, 0), path(made, 1))
    assert made.verify(1) == [*range(256, 512)]
    shutil.copy(path(other, 0), path(made, 0))
    assert made.verify(0) == [*range(256)]


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    made = new_shelf(tmp_path)
    made.write(0, rows(made, 0), {})
    assert made.missing() == [1, 2] and made.missing_records() == 344 and made.verify(1) == []
    with pytest.raises(CorruptRecord, match=r"part-00001.* it is not there"):
        made.read([0, 300])


def test_too_many_open_files_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fill(new_shelf(tmp_path))

    def fails(number: int) -> None:
        monkeypatch.setattr(part_file.os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(number, "")))

    fails(errno.EMFILE)
    with pytest.raises(OSError):
        made.discard(0)
    assert made.missing() == []
    fails(errno.EIO)
    made.discard(0)
    assert made.missing() == [0]


def test_a_corrupted_part_is_removed_and_counted_and_built_again(tmp_path: Path) -> None:
    made = fill(new_shelf(tmp_path))
    made.discard(1)  # nothing is wrong, or another process has put it right
    assert made.missing() == []
    data = bytearray(path(made, 1).read_bytes())
    data[-1] ^= 1
    path(made, 1).write_bytes(data)
    made.discard(1)
    assert made.missing() == [1] and made.counts()["corrupted"] == made.counts()["corrupted_records"] == 1
    assert torch.equal(fill(made).load(), values(made))
    assert made.counts()["built"] == 4 and made.counts()["wasted"] == 0


def test_what_another_process_put_right_is_read_anew(tmp_path: Path) -> None:
    made = fill(new_shelf(tmp_path))
    sound = path(made, 1).read_bytes()
    path(made, 1).write_bytes(sound[:-1] + b"?")
    with pytest.raises(CorruptRecord):
        made.load()  # the file stays open
    path(made, 1).unlink()
    path(made, 1).write_bytes(sound)
    assert torch.equal(made.load(), values(made))


def test_a_part_that_is_being_built_is_not_removed(tmp_path: Path) -> None:
    made = fill(new_shelf(tmp_path))
    path(made, 0).write_bytes(b"")
    claim = made.shared.hold("part-00000")
    assert claim is not None
    with claim:
        made.discard(0)
        assert made.missing() == []


def test_its_error_comes_through_a_worker(tmp_path: Path) -> None:
    made = new_shelf(tmp_path)
    try:
        made.read([300])
    except CorruptRecord:
        wrapped = ExceptionWrapper(where="in a worker")
    with pytest.raises(CorruptRecord, match=r"^/.*part-00001.safetensors is damaged"):
        wrapped.reraise()
