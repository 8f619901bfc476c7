"""Libraries of a tiny network and few pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from digits import PREPROCESSING

from lit_transfer.activations.library import Library
from lit_transfer.activations.prefix import Recipe, plain_recipe
from lit_transfer.activations.shelf import Shelf
from lit_transfer.activations.views import Views, plain_views
from lit_transfer.config import Activations
from lit_transfer.data.streams import Samples
from lit_transfer.model.backbone import Backbone

CUT = 4
PLAIN = plain_recipe(torch.device("cpu"))
ALONE = (0, 1)


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
