"""What is stored is what the network gives, under a key of all that decides it; anything else is not used."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import PREPROCESSING
from libraries import CUT, PLAIN, fill, opened, shelves
from shelves import names
from torch import Tensor

from lit_transfer.activations.library import Library
from lit_transfer.activations.shelf import Shelf
from lit_transfer.activations.views import Views, train_views
from lit_transfer.config import Augment
from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.plan import Batch
from lit_transfer.data.streams import Samples
from lit_transfer.errors import UserError
from lit_transfer.model.augment import eval_input
from lit_transfer.model.backbone import Backbone

FLIPS = Augment(flip_h=0.5, flip_v=0.5, quarter_turns=True)


def outputs(backbone: Backbone, samples: Samples, cut: int = CUT) -> Tensor:
    """What the network gives for a stream in evaluation, batch by batch as it is stored."""
    canvas = SampleDataset(samples, PREPROCESSING, None)[Batch(0, samples.rows)]["image"]
    filled = torch.cat([canvas, canvas[:1].expand(-len(canvas) % PLAIN.batch, -1, -1, -1)])
    images = eval_input(filled, PREPROCESSING).contiguous(memory_format=torch.channels_last).split(PLAIN.batch)
    with torch.no_grad():
        network = copy.deepcopy(backbone).eval()
        return torch.cat([network.run(part, 0, cut) for part in images])[: len(canvas)]


# What is stored


@pytest.mark.parametrize("cuts", [{CUT}, {1, CUT, 7}], ids=str)
def test_records_are_what_the_network_gives(library: Library, cuts: set[int]) -> None:
    fill(library, cuts)
    for cut in cuts:
        for name, stream in library.streams(cut, PLAIN).items():
            samples = library.inputs[name][0]
            order = np.random.default_rng(0).permutation(samples.rows)
            wanted = outputs(library.backbone, samples, cut)[torch.from_numpy(stream.places(order))]
            assert torch.equal(stream.read(order, epoch=3), wanted)
            assert all(shelf.counts()["wasted"] == 0 and shelf.missing() == [] for shelf in stream.shelves)
    assert all(module.training for module in library.backbone.modules())


def test_each_row_is_read_in_the_view_that_the_plan_draws(
    backbone: Backbone, streams: dict[str, Samples], tmp_path: Path, small_parts: None
) -> None:
    views = train_views("d4", FLIPS, PREPROCESSING, 5, range(3))
    assert isinstance(views, Views)
    library = fill(opened(backbone, streams, tmp_path, views))
    stream, rows = library.streams(CUT, PLAIN)["train"], streams["train"].rows
    canvas = SampleDataset(streams["train"], PREPROCESSING, None)[Batch(0, rows)]["image"]
    network = copy.deepcopy(backbone).eval()
    with torch.no_grad():
        of_views = torch.stack([network.run(view.input(canvas, rows), 0, CUT) for view in views.views])
    for epoch in range(2):
        wanted = of_views[torch.from_numpy(views.which(epoch, rows)), torch.arange(len(rows))]
        torch.testing.assert_close(stream.read(rows, epoch), wanted, rtol=1e-4, atol=1e-5)
    assert library.missing(CUT, PLAIN) == 0
    assert library.missing(CUT, replace(PLAIN, folded=True)) == library.missing(CUT, None) == 8 * 48 + 24


def test_two_that_want_the_same_do_it_once(library: Library) -> None:
    """The second begins in the middle, and finds what the first has done."""
    real = Shelf.write

    def write_as_the_second(shelf: Shelf, *arguments: Any) -> None:
        real(shelf, *arguments)
        if not done:
            done.append(True)
            library.fill({CUT}, PLAIN, share=(1, 2), progress=False)

    done: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shelf, "write", write_as_the_second)
        fill(library)
    counts = [shelf.counts() for shelf in shelves(library).values()]
    assert [(c["built_records"], c["wasted"]) for c in counts] == [(48, 0), (24, 0)]


@pytest.mark.parametrize(
    ("factor", "largest", "remedy"), [(1e7, r"\d\.\d+e\+\d+", " and bfloat16 can"), (float("inf"), "(inf|nan)", "")]
)
def test_what_float16_cannot_hold_is_not_stored(
    backbone: Backbone, streams: dict[str, Samples], tmp_path: Path, factor: float, largest: str, remedy: str
) -> None:
    """No fault of the user: a run may compute it."""
    last = [module for stage in backbone.stage_modules(CUT - 1) for module in stage.modules()]
    norms = [module for module in last if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        norms[-1].weight.mul_(factor)
    library = opened(backbone, streams, tmp_path, dtype="float16")
    with pytest.raises(OSError) as raised:
        fill(library)
    told = rf"those at blocks\.3 reach {largest}, which activations\.dtype float16 cannot hold{remedy}"
    assert raised.value.errno == errno.ERANGE and re.fullmatch(told, raised.value.strerror or "")
    assert library.missing(CUT, PLAIN) == 72 and not [*library.store.folder.rglob("*.lease")]
    if remedy:
        fill(opened(backbone, streams, tmp_path, dtype="bfloat16"))


def test_a_disk_that_is_full_while_it_is_filled_keeps_nothing_unfinished(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = os.fsync, []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 3:  # what it is, and two parts
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fill(library)
    assert names(shelves(library)["train"]) == ["part-00000.safetensors", "part-00001.safetensors"]


def test_looking_for_what_is_missing_makes_no_folder(library: Library) -> None:
    assert library.missing(CUT, PLAIN) == library.missing(CUT, None) == 72
    assert library.recipe([CUT]) is None
    assert not Path(library.store.folder).exists()


# What is not used


def test_a_half_built_shelf_is_completed(library: Library, backbone: Backbone) -> None:
    fill(library)
    path = shelves(library)["train"].folder / "part-00001.safetensors"
    before = path.read_bytes()
    path.unlink()
    assert library.recipe([CUT]) == PLAIN and library.missing(CUT, PLAIN) == 16
    fill(library)
    assert path.read_bytes() == before
    assert shelves(library)["train"].counts()["built"] == 4, "the others are kept"


def test_a_description_that_was_changed_is_refused(library: Library) -> None:
    fill(library)
    path = shelves(library)["val"].folder / "shelf.json"
    about = json.loads(path.read_text())
    about["description"]["content"]["dataset"] = "0" * 64
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"shelf.json is not what the name of its folder stands for"):
        library.streams(CUT, PLAIN)


# Room


def test_room_is_made_of_what_nobody_uses_but_never_of_what_is_wanted(
    library: Library, backbone: Backbone, streams: dict[str, Samples], tmp_path: Path
) -> None:
    """The limit has room for one cut, and not for another beside it."""
    fill(library, {5})
    stored = sum(shelf.shared.stored_bytes() for shelf in shelves(library, 5).values())
    limited = opened(backbone, streams, tmp_path, limit_gb=stored * 1.5 / 1e9)
    assert limited.room_bytes([7], PLAIN) == int(stored * 1.5)
    assert limited.room_bytes([5], PLAIN) == int(stored * 1.5) - stored
    held = shelves(library, 5)["train"]
    with held.in_use():
        assert limited.room_bytes([7], PLAIN) < stored * 1.5 - held.full_bytes
        assert not limited.make_room([7], PLAIN)
    (held.folder / "part-00001.safetensors").unlink()
    assert limited.make_room([5], PLAIN) and limited.missing(5, PLAIN) == 16, "its own shelves are not evicted"
    assert limited.make_room([7], PLAIN) and limited.missing(5, PLAIN) > 16
    assert not limited.make_room([4], PLAIN)


def test_what_is_there_needs_no_room(
    library: Library, backbone: Backbone, streams: dict[str, Samples], tmp_path: Path
) -> None:
    fill(library)
    limited = opened(backbone, streams, tmp_path, limit_gb=1e-9)
    assert limited.make_room([CUT], PLAIN) and limited.missing(CUT, PLAIN) == 0
