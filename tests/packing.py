"""What the tests of packing share: pictures on disk, and reading back what was packed."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.items import Pack
from lit_transfer.data.packing.pack import pack


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path, **options)
    return path


def folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), per_class: int = 10) -> Path:
    for k, name in enumerate(classes):
        for i in range(per_class):
            draw(root / name / f"{i}.png", 100 * k + i)
    return root


def table(root: Path, header: str, rows: list[str], pictures: bool = True) -> Path:
    """A CSV whose first column is `path`; its pictures are drawn unless told otherwise."""
    root.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        if pictures:
            draw(root / next(csv.reader([row]))[0], i)
    file = root / "table.csv"
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return file


def packed(source: Path | str, out: Path, **options: Any) -> Manifest:
    return pack(Pack(source=str(source), out=str(out), **options)).manifest


def payload(manifest: Manifest, row: int) -> bytes:
    place = manifest.table.slice(row, 1).to_pylist()[0]
    with (manifest.path / manifest.shards[place["shard"]].name).open("rb") as file:
        file.seek(place["offset"])
        return file.read(place["size"])


def column(manifest: Manifest, name: str) -> dict[str, Any]:
    """A column's values by source."""
    return dict(zip(manifest.table["source"].to_pylist(), manifest.table[name].to_pylist(), strict=True))


def contents(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir()}


def nothing_left(root: Path, *allowed: str) -> None:
    assert sorted(path.name for path in root.iterdir()) == sorted(allowed)


def damage(manifest: Manifest, row: int) -> None:
    """Flip a bit of a sample's image."""
    place = manifest.table.slice(row, 1).to_pylist()[0]
    shard = manifest.path / manifest.shards[place["shard"]].name
    data = bytearray(shard.read_bytes())
    data[place["offset"] + place["size"] // 2] ^= 4
    shard.write_bytes(data)
