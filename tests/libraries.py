"""Libraries of a tiny network and few pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digits import PREPROCESSING, digits, streams_of, tiny_config

from lit_transfer.activations import build as build_module
from lit_transfer.activations import shelf as shelf_module
from lit_transfer.activations.library import Library
from lit_transfer.activations.prefix import Recipe, plain_recipe
from lit_transfer.activations.shelf import Shelf
from lit_transfer.activations.views import Views, plain_views
from lit_transfer.config import Activations
from lit_transfer.data.streams import Samples
from lit_transfer.model.backbone import Backbone, build_backbone
from lit_transfer.recipe import Model

CUT = 4
PLAIN = plain_recipe(torch.device("cpu"))
ALONE = (0, 1)


def build_tiny() -> Backbone:
    """A tiny network in training mode."""
    torch.manual_seed(0)
    backbone = build_backbone(Model(backbone="timm/test_efficientnet", weights="none"), image_size=PREPROCESSING.size)
    for tensor in backbone.state_dict().values():
        if tensor.ndim == 1:  # weights of BatchNorm that do nothing would hide that they are not there
            tensor.add_(0.1 * torch.rand_like(tensor))
    return backbone


def few_pictures(folder: Path) -> dict[str, Samples]:
    """48 samples of train, 24 of val."""
    return streams_of(tiny_config(digits(folder / "digits", count=96), folder))


def make_parts_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 records, so that a shelf has several parts."""
    monkeypatch.setattr(shelf_module, "ROWS_PER_PART", 16)
    monkeypatch.setattr(build_module, "ROWS_PER_PART", 16)


def opened(
    backbone: Backbone,
    streams: dict[str, Samples],
    folder: Path,
    views: Views | None = None,
    prefix: str = "plain",
    dtype: str = "float32",
    **settings: Any,
) -> Library:
    """The library of a store in `folder/store`, of both streams; without views of the plain pictures."""
    plain = plain_views(PREPROCESSING)
    inputs = {"train": (streams["train"], views or plain), "val": (streams["val"], plain)}
    given: Any = {"folder": str(folder / "store"), "prefix": prefix, "dtype": dtype} | settings
    return Library(backbone, PREPROCESSING, Activations(**given), inputs, workers=0)


def fill(library: Library, cuts: set[int] | None = None, recipe: Recipe = PLAIN) -> Library:
    """Compute what is missing of some cuts."""
    library.fill(cuts or {CUT}, recipe, share=ALONE, progress=False)
    return library


def shelves(library: Library, cut: int = CUT) -> dict[str, Shelf]:
    """Of the plain pictures, by stream."""
    return {name: stream.shelves[0] for name, stream in library.streams(cut, PLAIN).items()}
