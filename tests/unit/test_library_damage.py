"""What is wrong in a store is built again, or stops a run; what is wrong in the dataset is treated as without one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import PREPROCESSING
from libraries import ALONE, CUT, PLAIN, fill, opened, shelves
from packing import damage

from lit_transfer.activations.data import StoredDataset, StoredStream
from lit_transfer.activations.library import Library
from lit_transfer.activations.views import Views, train_views
from lit_transfer.config import Augment
from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.plan import PADDING, Batch
from lit_transfer.data.streams import Samples
from lit_transfer.errors import UserError
from lit_transfer.model.augment import eval_input
from lit_transfer.model.backbone import Backbone

FLIPS = Augment(flip_h=0.5, flip_v=0.5, quarter_turns=True)


@pytest.mark.parametrize("place", [0, -3], ids=["in the header", "in a record"])
def test_a_damaged_part_is_built_again_and_counted(library: Library, place: int) -> None:
    fill(library)
    shelf = shelves(library)["val"]
    sound = shelf.load()
    path = shelf.folder / f"part-{shelf.parts - 1:05d}.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert library.mend(CUT, PLAIN, ALONE) == (1 if place else 8)
    assert shelf.missing() == [shelf.parts - 1] and shelf.counts()["corrupted"] == 1
    fill(library)
    library.check(CUT, PLAIN)
    assert torch.equal(shelf.load(), sound) and library.mend(CUT, PLAIN, ALONE) == 0


def test_each_of_several_looks_at_its_share(library: Library) -> None:
    fill(library)
    for shelf in shelves(library).values():
        for part in range(shelf.parts):
            path = shelf.folder / f"part-{part:05d}.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    found = [library.mend(CUT, PLAIN, (rank, 2)) for rank in range(2)]
    assert found[0] > 0 < found[1] and sum(found) == 5 and library.missing(CUT, PLAIN) == 72


def test_a_wrong_record_with_a_right_checksum_stops_the_run(library: Library) -> None:
    fill(library)
    shelf = shelves(library)["val"]
    values = shelf.load()[:16]
    values[7] *= 1.01
    (shelf.folder / "part-00000.safetensors").unlink()
    shelf.write(0, values, {})
    assert library.mend(CUT, PLAIN, ALONE) == 0
    with pytest.raises(UserError, match=r"record 7 differs by 0.01 of its norm .* 1 of 24 do; remove that folder"):
        library.check(CUT, PLAIN)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_to_the_stored_type_is_no_difference(
    backbone: Backbone, streams: dict[str, Samples], tmp_path: Path, dtype: str
) -> None:
    exact, library = (fill(opened(backbone, streams, tmp_path, dtype=each)) for each in ("float32", dtype))
    kept, expected = (shelves(each)["val"].load() for each in (library, exact))
    assert kept.dtype == getattr(torch, dtype) and torch.equal(kept.float(), expected) == (dtype == "float32")
    library.check(CUT, PLAIN)


def test_damaged_pictures_are_marked_and_treated_as_without_a_store(
    library: Library, streams: dict[str, Samples]
) -> None:
    rows = {name: [int(streams[name].rows[place]) for place in (2, 12)] for name in ("train", "val")}
    for name, broken in rows.items():
        for row in broken:
            damage(streams[name].manifest, row)
    small = replace(PLAIN, batch=8)  # the second is not in the first batch of its part
    fill(library, recipe=small)
    library.check(CUT, small)
    for name, stream in library.streams(CUT, small).items():
        samples, shelf = streams[name], stream.shelves[0]
        marked = sorted(shelf.damaged())
        assert [int(samples.rows[place]) for place in marked] == rows[name]
        assert not shelf.read(marked).any()
        assert_same_items(library.backbone, stream, Batch(1, np.append(samples.rows[:23], PADDING), entries=23))


def test_a_picture_that_one_pass_could_not_read_is_damaged_in_every_view(
    backbone: Backbone, streams: dict[str, Samples], tmp_path: Path, small_parts: None
) -> None:
    """The zeros that stand for it are no activations, in whichever view an epoch takes it."""
    views = train_views("d4", FLIPS, PREPROCESSING, 5, range(3))
    assert isinstance(views, Views)
    library = opened(backbone, streams, tmp_path, views)
    fill(opened(backbone, streams, tmp_path))  # the plain picture, as long as all is well
    rows = streams["train"].rows
    damage(streams["train"].manifest, int(rows[3]))
    stream = fill(library).streams(CUT, PLAIN)["train"]
    assert [3 in shelf.damaged() for shelf in stream.shelves] == [False] + [True] * 7 and [*stream.damaged] == [3]
    for epoch in range(8):
        item = StoredDataset(stream, PREPROCESSING, 3)[Batch(epoch, rows[:16], entries=16)]
        assert len(item["damaged"]) == 1 and item["activations"].flatten(1).any(1).all()


def test_a_picture_that_can_be_read_again_is_computed_after_all(library: Library, streams: dict[str, Samples]) -> None:
    """The key knows only what was packed: a shard that is copied anew does not change it."""
    manifest, rows = streams["train"].manifest, streams["train"].rows[[2, 3, 20]].tolist()
    sound = {path: path.read_bytes() for path in manifest.path.iterdir() if path.is_file()}
    fill(library)
    shelf = shelves(library)["train"]
    expected = shelf.load()
    for part in range(shelf.parts):
        (shelf.folder / f"part-{part:05d}.safetensors").unlink()
    for row in rows:
        damage(manifest, row)
    fill(library)
    assert library.mend(CUT, PLAIN, (3, 4)) == 0, "no part is its share"
    assert sorted(shelf.damaged()) == [2, 3, 20], "it is not what was open before"
    assert library.mend(CUT, PLAIN, ALONE) == 0, "they still are"
    for path, data in sound.items():
        path.write_bytes(data)
    damage(manifest, rows[1])
    library.check(CUT, PLAIN)  # takes every record; those without values are no fault of the store
    assert [library.mend(CUT, PLAIN, (rank, 2)) for rank in range(2)] == [1, 1] and shelf.missing() == [0, 1]
    fill(library)
    kept = [place for place in range(48) if place != 3]
    assert [*shelf.damaged()] == [3] and torch.equal(shelf.load()[kept], expected[kept])
    library.check(CUT, PLAIN)


def assert_same_items(backbone: Backbone, stream: StoredStream, batch: Batch) -> None:
    """A batch from the store, in training and in validation, is that of pictures, but for these."""
    for seed in (3, None):
        given = StoredDataset(stream, PREPROCESSING, seed)[batch]
        wanted = SampleDataset(stream.samples, PREPROCESSING, seed)[batch]
        assert given.keys() ^ wanted.keys() == {"activations", "image"} and len(wanted["damaged"]) == 2
        assert int(wanted["valid"].sum()) == (23 if seed else 21)
        assert given.pop("damaged") == wanted.pop("damaged")
        assert all(torch.equal(given[key], wanted[key]) for key in given.keys() & wanted.keys())
        with torch.no_grad():
            outputs = copy.deepcopy(backbone).eval().run(eval_input(wanted["image"], PREPROCESSING), 0, CUT)
        torch.testing.assert_close(given["activations"], outputs, rtol=1e-4, atol=1e-5)
