"""Where samples come from: an image folder, a CSV or TSV, or (in `datasets.py`) a map-style dataset."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from lit_transfer.data.decode import EXTENSIONS
from lit_transfer.data.packing.items import (
    Item,
    Listing,
    Pack,
    Source,
    check_splits,
    choose_labels,
    make_item,
    utf8,
)
from lit_transfer.data.packing.names import natural_key, refuse_twins
from lit_transfer.errors import UserError, require

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def open_folder(root: Path, pack: Pack) -> Source:
    """An image folder: a folder a class, below split folders if `train` and one other are there.

    Raises:
        UserError: no pictures, an empty class, two classes with one name, pictures beside class folders.
    """
    labels = ("label",)
    require(
        pack.labels in (None, ["label"]),
        f"labels {pack.labels}: an image folder has one label, named 'label'.",
    )
    top = [entry.name for entry in sorted(root.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    found = [name for name in top if name in SPLIT_FOLDERS]
    has_splits = "train" in found and len(found) > 1
    if has_splits:
        stray = [name for name in top if name not in SPLIT_FOLDERS]
        require(not stray, f"'{root / stray[0] if stray else ''}' stands beside split folders; move it elsewhere.")
        canonical = [SPLIT_FOLDERS[name] for name in found]
        require(len(set(canonical)) == len(found), f"'{root}' has two folders for one split: {', '.join(found)}.")
    paths, ignored = _walk(root)
    classes = _classes(root, paths, found if has_splits else []) if pack.task != "none" else []
    items, sizes = [], []
    for path in paths:
        parts = path.relative_to(root).parts
        split = SPLIT_FOLDERS[parts[0]] if has_splits else None
        label = parts[int(has_splits)] if classes else None
        source = utf8(path.relative_to(root).as_posix())
        items.append(
            Item(
                source=source,
                labels=(label,) if classes else (),
                split=split,
                group=None,
                weight=1.0,
                meta={},
                read=path.read_bytes,
            )
        )
        sizes.append(path.stat().st_size)
    require(bool(items), f"'{root}' holds no pictures; known endings are {' '.join(sorted(EXTENSIONS))}.")
    listing = Listing(items=items, labels=labels if classes else (), classes=None, ignored=ignored)
    return Source(fingerprint=_fingerprint(listing, sizes), listing=lambda: listing)


def open_table(file: Path, pack: Pack) -> Source:
    """A CSV or TSV with a column `path`, relative to the file.

    Raises:
        UserError: missing or doubled columns, ragged rows, a path twice, values that break a column's rule.
    """
    header, rows = read_table(file)
    require("path" in header, f"'{file}' has no column 'path'; its columns are {', '.join(header)}.")
    labels = choose_labels(pack, header, f"'{file}'")
    items, sizes, seen = [], [], dict[str, int]()
    for number, row in rows:
        where = f"'{file}' line {number}"
        path = row["path"] or ""
        require(bool(path), f"{where} has no path.")
        require(
            path not in seen,
            f"{where}: path '{path}' stands in line {seen.get(path)} already; keep one of them.",
        )
        seen[path] = number
        target = file.parent / path
        items.append(make_item(row, path, labels, target.read_bytes, where))
        sizes.append(target.stat().st_size if target.is_file() else -1)
    require(bool(items), f"'{file}' has no rows.")
    check_splits(items, f"'{file}'")
    listing = Listing(items=items, labels=labels, classes=None, ignored=0)
    return Source(fingerprint=_fingerprint(listing, sizes), listing=lambda: listing)


def read_table(file: Path) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    """Header and (line, row) pairs of a CSV (`.csv`) or TSV file in UTF-8; empty cells are None."""
    rows: list[tuple[int, dict[str, str | None]]] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter="," if file.suffix.lower() == ".csv" else "\t", strict=True)
            header = [name.strip() for name in next(reader, [])]
            for cells in reader:
                if not cells:
                    continue
                require(
                    len(cells) == len(header),
                    f"'{file}' line {reader.line_num} has {len(cells)} cells, the header {len(header)}.",
                )
                row = {name: cell if cell.strip() else None for name, cell in zip(header, cells, strict=True)}
                rows.append((reader.line_num, row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{file}' cannot be read as a UTF-8 table: {error}.") from None
    doubled = [name for name in header if header.count(name) > 1]
    require(not doubled, f"'{file}' has the column '{doubled[0] if doubled else ''}' twice; rename one.")
    return header, rows


def _walk(root: Path) -> tuple[list[Path], int]:
    """Pictures below a folder, sorted, and the number of other files; hidden ones are passed over."""
    pictures, ignored = [], 0
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if Path(name).suffix.lower() in EXTENSIONS and not name.startswith("."):
                pictures.append(Path(folder) / name)
            else:
                ignored += not name.startswith(".")
    return sorted(pictures, key=lambda path: path.relative_to(root).as_posix()), ignored


def _classes(root: Path, paths: Sequence[Path], split_folders: Sequence[str]) -> list[str]:
    """Names of the class folders; empty where the pictures are unlabelled."""
    names: set[str] = set()
    filled = {path.relative_to(root).parts[: 1 + bool(split_folders)] for path in paths}
    loose = False
    for above in [root / name for name in split_folders] or [root]:
        below = sorted(entry.name for entry in above.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        loose |= any(path.parent == above for path in paths)
        for name in below:
            require(
                (*above.relative_to(root).parts, name) in filled,
                f"class folder '{above / name}' holds no pictures; remove it or fill it.",
            )
        names |= set(below)
    require(
        not (loose and names),
        f"'{root}' has pictures beside class folders; move them into one, or all into a flat folder.",
    )
    refuse_twins(sorted(names), f"'{root}'")
    return sorted(names, key=natural_key)


def _fingerprint(listing: Listing, sizes: Sequence[int]) -> str:
    """sha256 over what was listed, to notice that a source changed; pictures count by their length alone."""
    sha = hashlib.sha256()
    for item, size in zip(listing.items, sizes, strict=True):
        line = [item.source, item.labels, item.split, item.group, item.weight, item.meta, size]
        sha.update(json.dumps(line).encode() + b"\n")
    return sha.hexdigest()
