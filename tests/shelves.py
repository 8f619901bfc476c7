"""Shelves of small records."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_transfer.activations.contents import Contents
from lit_transfer.activations.sharing import ABOUT
from lit_transfer.activations.shelf import ROWS_PER_PART, Shelf
from lit_transfer.activations.store import ActivationStore

DESCRIPTION = {"content": {"cut": "layer3"}, "recipe": {"batch": 32}}
STORE_RECORDS = 300
STORE_BYTES = 8 * STORE_RECORDS * 4
"""Of a complete shelf of a store, but for headers and logs."""


def new_shelf(
    folder: Path, records: int = 600, shape: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float32
) -> Shelf:
    """Empty."""
    return Shelf(folder, Contents(DESCRIPTION, records, shape, dtype))


def values(shelf: Shelf) -> Tensor:
    """What all its records are."""
    numbers = torch.randn(shelf.records, *shelf.shape, generator=torch.Generator().manual_seed(0))
    return (numbers * 100).to(shelf.dtype)


def rows(shelf: Shelf, part: int) -> Tensor:
    """What those of a part are."""
    return values(shelf)[part * ROWS_PER_PART : (part + 1) * ROWS_PER_PART]


def fill(shelf: Shelf) -> Shelf:
    """Write the parts that are missing."""
    for part in shelf.missing():
        shelf.write(part, rows(shelf, part), {})
    return shelf


def path(shelf: Shelf, part: int) -> Path:
    """The file of a part."""
    return shelf.folder / f"part-{part:05d}.safetensors"


def names(shelf: Shelf) -> list[str]:
    """Its files, but for `shelf.json` and the log."""
    return sorted(p.name for p in shelf.folder.iterdir() if p.name[:3] not in ("log", "she"))


def about(name: str) -> dict[str, Any]:
    """What decides the records of a shelf of a store."""
    return {"content": {"backbone": "timm/net", "cut": name, "dataset": "d" * 64, "view": "d4", "element": 3}}


def contents(name: str) -> Contents:
    """What such a shelf is."""
    return Contents(about(name), STORE_RECORDS, (6,), torch.float32)


def open_shelf(kept: ActivationStore, name: str) -> Shelf:
    """Made if it is not there."""
    shelf = kept.shelf(contents(name))
    shelf.shared.make()
    return shelf


def filled(kept: ActivationStore, name: str, used_s: float | None = None) -> Shelf:
    """A complete shelf that was last used at a time."""
    made = open_shelf(kept, name)
    for part in made.missing():
        made.write(part, torch.ones(min(256, STORE_RECORDS - part * 256), 6), {})
    if used_s is not None:
        os.utime(made.folder / ABOUT, (used_s, used_s))
    return made


def cuts(kept: ActivationStore) -> list[str]:
    """The shelves of a store by their cuts, those used longest ago first."""
    return [shelf.description["content"]["cut"] for shelf in kept.shelves()]
