"""What the records of a shelf are, and the key that it is named by."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_transfer.activations.part import DTYPES
from lit_transfer.activations.sharing import ABOUT
from lit_transfer.errors import UserError, require

FORMAT = 1
"""Of the files; part of every key."""
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Contents:
    """What the records of a shelf are.

    Args:
        description: all that decides their values, as JSON can hold it.
        records: how many.
        shape: of one.
        dtype: of them.
    """

    description: dict[str, Any]
    records: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"records of {self.dtype} cannot be stored; use one of {', '.join(_NAMES)}.")

    def to_plain(self) -> dict[str, Any]:
        """As `shelf.json` holds it."""
        dtype = str(self.dtype).removeprefix("torch.")
        counts = {"records": self.records, "shape": list(self.shape), "dtype": dtype, "format": FORMAT}
        return {"description": self.description, **counts}

    @property
    def key(self) -> str:
        """sha256 of all of it."""
        text = json.dumps(self.to_plain(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def read_contents(folder: Path) -> Contents | None:
    """What a shelf's `shelf.json` says; None where there is none.

    Raises:
        UserError: it is not what the folder's name is the hash of.
    """
    try:
        plain = json.loads((folder / ABOUT).read_text())
        shape, dtype = tuple(plain["shape"]), _NAMES[plain["dtype"]]
        found = Contents(plain["description"], plain["records"], shape, dtype)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError):
        found = None
    if found is None or found.key != folder.name:
        raise UserError(
            f"{folder / ABOUT} is not what the name of its folder stands for: it was changed or damaged; "
            "remove that folder, and it is computed again."
        )
    return found
