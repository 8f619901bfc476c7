"""The ELPV data set of solar cells as a map-style dataset, from the package `elpv-dataset`.

2,624 grey electroluminescence pictures of 300 x 300 pixels; experts rated each cell with a defect probability
of 0, 1/3, 2/3 or 1. Deitsch et al., "Automatic classification of defective photovoltaic module cells in
electroluminescence images", Solar Energy 185, 2019. The pictures are licensed CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lit_transfer.errors import UserError


class Elpv:
    """Samples with `image` (PNG bytes), `label`, `type` (mono or poly), `probability` and `source`."""

    classes = ("functional", "defective")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines = (folder / "labels.csv").read_text().splitlines()
        self.rows = [line.split() for line in lines if line.strip()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, probability, kind = self.rows[index]
        return {
            "image": (self.folder / path).read_bytes(),
            "label": self.classes[float(probability) > 0.5],
            "type": kind,
            "probability": probability,
            "source": path,
        }


def elpv() -> Elpv:
    """The installed data set; `UserError` where the package is missing."""
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or found.origin is None:
        raise UserError("the package elpv-dataset is not installed; install it with `pip install lit_transfer[demo]`.")
    return Elpv(Path(found.origin).parent / "data")
