"""The pictures of a sample whose activations are stored: the plain one, the first epochs' augmented ones, or flips and
quarter turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_transfer.config import Augment
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.loading import DRAWS
from lit_transfer.data.plan import Rows, uniforms
from lit_transfer.model.augment import affine, colourful, eval_input, moves, train_input


@dataclass(frozen=True)
class View:
    """One picture of a sample.

    Args:
        name: for people: `plain`, `d4/5`, `epoch/2`.
        key: all that makes the picture from the canvas, as plain values.
        input: uint8 canvases [B, 3, C, C] and their rows [B] -> network input [B, 3, S, S]; fit for a worker.
    """

    name: str
    key: dict[str, Any]
    input: Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class Views:
    """The pictures of a training sample that a phase takes, and which of them at each place of the plan.

    Args:
        views: all of them.
        which: (epoch of the run, rows [B]) -> place in `views` of each row [B]; a pure function, fit for a worker.
    """

    views: tuple[View, ...]
    which: Callable[[int, Rows], NDArray[np.int64]]


def plain_views(preprocessing: Preprocessing) -> Views:
    """The picture as validation sees it, in every epoch."""
    return Views((_turned(0, preprocessing, "plain"),), _first)


def train_views(
    setting: int | Literal["d4"] | None, augment: Augment, preprocessing: Preprocessing, seed: int, epochs: range
) -> Views | str:
    """The pictures that training takes in some epochs of the run, or why they cannot be stored.

    Args:
        setting: `activations.views`.
        augment: of the phase.
        preprocessing: of the run.
        seed: of the run.
        epochs: of the run, that are still to come.
    """
    if not moves(augment) and not colourful(augment):
        return plain_views(preprocessing)
    if setting is None:
        return (
            "augment draws new pictures each epoch, which cannot be stored; set activations.views to a count or d4, or "
            "augment_strength 0 in this phase"
        )
    if setting == "d4":
        return _d4_views(augment, preprocessing, seed)
    places = {epoch % setting: place for place, epoch in enumerate(epochs[:setting])}
    views = tuple(_drawn(epoch, augment, preprocessing, seed) for epoch in places)
    return Views(views, partial(_of_epoch, setting, places))


def _drawn(epoch: int, augment: Augment, preprocessing: Preprocessing, seed: int) -> View:
    """The pictures that training without a store has in an epoch."""
    key = {"view": "drawn", "seed": seed, "epoch": epoch, "augment": asdict(augment)}
    return View(f"epoch/{epoch}", key, partial(_drawn_input, epoch, augment, preprocessing, seed))


def _drawn_input(
    epoch: int, augment: Augment, preprocessing: Preprocessing, seed: int, canvas: Tensor, rows: Rows
) -> Tensor:
    uniform = torch.from_numpy(uniforms(seed, epoch, rows, DRAWS)).to(canvas.device)
    return train_input(canvas, uniform, augment, preprocessing)


def _d4_views(augment: Augment, preprocessing: Preprocessing, seed: int) -> Views | str:
    """Flips and quarter turns, without the interpolation of `train_input`, which here moves whole pixels anyway."""
    rest = replace(augment, flip_h=0.0, flip_v=0.0, quarter_turns=False)
    if moves(rest) or colourful(rest):
        return (
            "activations.views d4 stores flips and quarter turns, but augment has more (such as shift or brightness); "
            "set those to 0, or views to a count"
        )
    elements = sorted({int(e) for e in d4_elements(_corners(), augment)})
    views = tuple(_turned(element, preprocessing, f"d4/{element}") for element in elements)
    return Views(views, partial(_drawn_d4, augment, seed, elements))


def _first(epoch: int, rows: Rows) -> NDArray[np.int64]:
    return np.zeros(len(rows), np.int64)


def _of_epoch(count: int, places: dict[int, int], epoch: int, rows: Rows) -> NDArray[np.int64]:
    return np.full(len(rows), places[epoch % count], np.int64)


def _drawn_d4(augment: Augment, seed: int, elements: list[int], epoch: int, rows: Rows) -> NDArray[np.int64]:
    drawn = d4_elements(torch.from_numpy(uniforms(seed, epoch, rows, DRAWS)), augment)
    return np.searchsorted(elements, drawn.numpy())


def d4_elements(uniform: Tensor, augment: Augment) -> Tensor:
    """Which of the 8 flips and quarter turns `train_input` makes of random numbers [B, DRAWS]: 0 to 7, [B]."""
    matrix = affine(uniform, augment, share=1.0)[:, :, :2].round()
    swaps = matrix[:, 0, 1] != 0  # columns of the output are rows of the picture
    across = torch.where(swaps, matrix[:, 1, 0], matrix[:, 0, 0])
    down = torch.where(swaps, matrix[:, 0, 1], matrix[:, 1, 1])
    return 4 * swaps.long() + 2 * (down < 0).long() + (across < 0).long()


def turned(images: Tensor, element: int) -> Tensor:
    """Images [B, 3, S, S] flipped and turned: element 4 swaps rows and columns, then 2 flips rows, 1 columns."""
    if element & 4:
        images = images.transpose(2, 3)
    return images.flip([axis for bit, axis in ((2, 2), (1, 3)) if element & bit])


def _turned(element: int, preprocessing: Preprocessing, name: str) -> View:
    """The plain picture flipped and turned; element 0 is the plain one, whatever it is called."""
    key: dict[str, Any] = {"view": "d4", "element": element} if element else {"view": "plain"}
    return View(name, key, partial(_turned_input, element, preprocessing))


def _turned_input(element: int, preprocessing: Preprocessing, canvas: Tensor, rows: Rows) -> Tensor:
    return turned(eval_input(canvas, preprocessing), element)


def _corners() -> Tensor:
    """Random numbers that make every choice of flips and turns."""
    ends: Iterable[tuple[float, float, float]] = (
        (x, y, turn / 4) for x in (0.0, 1 - 2**-24) for y in (0.0, 1 - 2**-24) for turn in range(4)
    )
    draws = torch.zeros(16, DRAWS)
    draws[:, :3] = torch.tensor(list(ends))
    return draws
