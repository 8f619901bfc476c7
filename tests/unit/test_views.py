"""The pictures that can be stored are those that training takes."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from digits import PREPROCESSING
from torch import Tensor

from lit_transfer.activations.views import View, Views, d4_elements, plain_views, train_views
from lit_transfer.config import Augment
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.loading import DRAWS
from lit_transfer.data.plan import Rows, uniforms
from lit_transfer.model.augment import eval_input, train_input

FLIPS = Augment(flip_h=0.5, flip_v=0.5, quarter_turns=True)
ROTATES = Augment(rotate_degrees=20, brightness=0.2)
MARGINS = [PREPROCESSING, replace(PREPROCESSING, canvas=32)]
ROWS = np.arange(100, 164)
SEED = 3
TOLERANCE = 1e-4
"""`train_input` interpolates at places that are whole only within rounding; a step of a pixel's value is 0.017."""


def canvases(preprocessing: Preprocessing, count: int = len(ROWS)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, *[preprocessing.canvas] * 2), generator=generator, dtype=torch.uint8)


def made(
    setting: Any, augment: Augment, epochs: range = range(3), preprocessing: Preprocessing = PREPROCESSING
) -> Views:
    views = train_views(setting, augment, preprocessing, SEED, epochs)
    assert isinstance(views, Views), views
    return views


def drawn(epoch: int, augment: Augment, canvas: Tensor, preprocessing: Preprocessing = PREPROCESSING) -> Tensor:
    """What training without a store gives the network."""
    return train_input(canvas, torch.from_numpy(uniforms(SEED, epoch, ROWS, DRAWS)), augment, preprocessing)


def taken(views: Views, epoch: int, canvas: Tensor, rows: Rows = ROWS) -> Tensor:
    """What training gives the network by its views."""
    inputs = torch.stack([view.input(canvas, rows) for view in views.views])
    return inputs[torch.from_numpy(views.which(epoch, rows)), torch.arange(len(rows))]


@pytest.mark.parametrize("preprocessing", MARGINS, ids=["margin", "no_margin"])
def test_d4_gives_the_pictures_of_training(preprocessing: Preprocessing) -> None:
    views, canvas = made("d4", FLIPS, preprocessing=preprocessing), canvases(preprocessing)
    assert {view.name for view in views.views} == {f"d4/{element}" for element in range(8)}
    met = set()
    for epoch in range(2):
        expected = drawn(epoch, FLIPS, canvas, preprocessing)
        torch.testing.assert_close(taken(views, epoch, canvas), expected, rtol=0, atol=TOLERANCE)
        met |= set(views.which(epoch, ROWS).tolist())
    assert met == set(range(8)), "each of them was compared"


@pytest.mark.parametrize(
    ("augment", "count"),
    [
        (Augment(flip_h=0.5), 2),
        (Augment(flip_v=0.3), 2),
        (Augment(flip_h=1.0), 1),
        (Augment(flip_h=0.5, flip_v=0.5), 4),
        (Augment(quarter_turns=True), 4),
        (Augment(flip_v=1.0, quarter_turns=True), 4),
        (FLIPS, 8),
    ],
    ids=str,
)
def test_d4_stores_only_what_is_drawn(augment: Augment, count: int) -> None:
    views, canvas = made("d4", augment), canvases(PREPROCESSING)
    assert len(views.views) == count
    torch.testing.assert_close(taken(views, 1, canvas), drawn(1, augment, canvas), rtol=0, atol=TOLERANCE)


def test_d4_counts_what_training_draws() -> None:
    """Each element as often as chance has it, and none where nothing is asked for."""
    uniform = torch.from_numpy(uniforms(SEED, 0, np.arange(4000), DRAWS))
    assert torch.bincount(d4_elements(uniform, FLIPS), minlength=8).min() > 400
    assert d4_elements(uniform, Augment()).unique().tolist() == [0]


@pytest.mark.parametrize("augment", [FLIPS, ROTATES, Augment(saturation=0.5)], ids=["flips", "rotates", "colours"])
def test_a_count_gives_the_pictures_of_the_first_epochs_in_turn(augment: Augment) -> None:
    views, canvas = made(3, augment, range(8)), canvases(PREPROCESSING)
    for epoch in range(8):
        assert torch.equal(taken(views, epoch, canvas), drawn(epoch % 3, augment, canvas))


@pytest.mark.parametrize(
    ("count", "epochs", "expected"),
    [(5, range(3), [0, 1, 2]), (5, range(3, 5), [3, 4]), (5, range(3, 7), [3, 4, 0, 1]), (2, range(9, 20), [1, 0])],
)
def test_only_views_that_a_phase_takes_are_made(count: int, epochs: range, expected: list[int]) -> None:
    views, canvas = made(count, ROTATES, epochs), canvases(PREPROCESSING)
    assert [view.name for view in views.views] == [f"epoch/{epoch}" for epoch in expected]
    for epoch in epochs:
        assert torch.equal(taken(views, epoch, canvas), drawn(epoch % count, ROTATES, canvas))


def test_a_view_of_part_of_the_rows_is_that_part_of_the_view() -> None:
    """A part of a shelf is computed in batches."""
    view, canvas = made(1, ROTATES).views[0], canvases(PREPROCESSING)
    assert torch.equal(view.input(canvas[10:20], ROWS[10:20]), view.input(canvas, ROWS)[10:20])


@pytest.mark.parametrize("setting", [None, 4, "d4"])
def test_without_augmentation_there_is_the_plain_picture(setting: Any) -> None:
    canvas = canvases(PREPROCESSING)
    for views in (made(setting, Augment()), plain_views(PREPROCESSING)):
        assert [view.name for view in views.views] == ["plain"]
        assert torch.equal(taken(views, 7, canvas), eval_input(canvas, PREPROCESSING))


def test_keys_say_what_makes_the_picture() -> None:
    """The plain picture is the same shelf under every setting; all others differ."""
    plain, d4, counted = plain_views(PREPROCESSING).views, made("d4", FLIPS).views, made(3, FLIPS).views
    assert d4[0].key == plain[0].key
    others = [*d4, *counted, *made(3, ROTATES).views]
    assert len({pickle.dumps(view.key) for view in others}) == len(others)
    moved = train_views(1, ROTATES, PREPROCESSING, SEED + 1, range(1))
    assert isinstance(moved, Views) and moved.views[0].key != made(1, ROTATES).views[0].key


@pytest.mark.parametrize("setting", [3, "d4"])
def test_views_reach_a_worker(setting: Any) -> None:
    views, canvas = made(setting, FLIPS), canvases(PREPROCESSING)
    copied: Views = pickle.loads(pickle.dumps(views))
    assert torch.equal(taken(copied, 2, canvas), taken(views, 2, canvas))
    plain: View = pickle.loads(pickle.dumps(plain_views(PREPROCESSING).views[0]))
    assert torch.equal(plain.input(canvas, ROWS), eval_input(canvas, PREPROCESSING))


def test_what_cannot_be_stored_says_why() -> None:
    for augment in (FLIPS, Augment(contrast=0.1)):
        assert train_views(None, augment, PREPROCESSING, SEED, range(1)) == (
            "augment draws new pictures each epoch, which cannot be stored; set activations.views to a count or d4, or "
            "augment_strength 0 in this phase"
        )
    for more in ({"shift": 0.1}, {"brightness": 0.1}, {"rotate_degrees": 3}, {"crop_area": 0.5}):
        given = train_views("d4", replace(FLIPS, **more), PREPROCESSING, SEED, range(1))
        assert isinstance(given, str) and "augment has more" in given
