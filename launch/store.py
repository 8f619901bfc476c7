"""`lit-transfer store list | verify | prune`: look after the activations that runs have stored."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from lit_transfer.activations.shelf import Shelf
from lit_transfer.activations.store import ActivationStore, default_folder
from lit_transfer.errors import UserError, require
from lit_transfer.launch import run
from lit_transfer.launch.options import Parser
from lit_transfer.report import table

DAY_S = 86400


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="lit-transfer store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|verify|prune")
    listing = commands.add_parser("list", help="what is stored, which was used last, and what runs use now")
    check = commands.add_parser("verify", help="read all of it against its checksums; status 1 if any is wrong")
    check.add_argument("--remove", action="store_true", help="remove the parts that are wrong; runs build them again")
    prune = commands.add_parser("prune", help="remove what no run uses now")
    prune.add_argument("--limit_gb", type=float, metavar="N", help="what was used longest ago, down to N * 10^9 bytes")
    prune.add_argument("--unused_days", type=float, metavar="N", help="what was not used for N days")
    prune.add_argument("--all", action="store_true", help="everything")
    for command in (listing, check, prune):
        command.add_argument(
            "--folder", type=Path, default=default_folder(), metavar="DIR", help="default: %(default)s"
        )
    options: argparse.Namespace = parser.parse_args(argv)
    return options


def main(argv: Sequence[str]) -> int:
    """Exit status 0, 1 if `verify` finds something wrong, or 2 for a fault of the input."""
    options = _arguments(argv or ["--help"])
    folder: Path = options.folder
    store = ActivationStore(folder, limit_bytes=0)
    try:
        require(folder.is_dir(), f"--folder {folder} is not there; runs make it when they store something.")
        if options.command == "verify":
            return verify(store, remove=options.remove)
        if options.command == "prune":
            return prune(store, options)
        rows = [row(shelf) for shelf in store.shelves()]
    except BrokenPipeError:  # of our output; no fault of the folder
        raise
    except OSError as error:
        told = f"{error.strerror} ({error.filename})"
        raise UserError(f"{folder} cannot be looked after: {told}; ask the user who made that.") from error
    print(table(rows) if rows else f"nothing is stored in {folder}")
    return 0


def row(shelf: Shelf) -> dict[str, object]:
    """A shelf as a line of a table."""
    content = shelf.description.get("content", {})
    counts = shelf.counts()
    which = [content.get("view"), content.get("epoch"), content.get("element")]
    return {
        "shelf": shelf.key[:12],
        "backbone": content.get("backbone"),
        "cut": content.get("cut"),
        "dataset": str(content.get("dataset", "-"))[:12],
        "view": "/".join(str(word) for word in which if word is not None),
        "type": str(shelf.dtype).removeprefix("torch."),
        "records": shelf.records,
        "MB": shelf.shared.stored_bytes() / 1e6,
        "parts": f"{shelf.parts - len(shelf.missing())}/{shelf.parts}",
        "last used": datetime.fromtimestamp(shelf.shared.last_used_s()).strftime("%Y-%m-%d %H:%M"),
        "in use": "yes" if shelf.shared.is_in_use() else "no",
        "wasted": counts["wasted"],
        "corrupted": counts["corrupted"],
    }


def verify(store: ActivationStore, *, remove: bool) -> int:
    """Print what is wrong, shelf by shelf; 1 if anything is."""
    faults: list[dict[str, object]] = []
    checked = 0
    for shelf in store.shelves():
        there = sorted(set(range(shelf.parts)) - set(shelf.missing()))
        checked += len(there)
        for part in there:
            if wrong := shelf.verify(part):
                faults.append({"shelf": shelf.key[:12], "part": part, "wrong records": spans(wrong)})
                if remove:
                    shelf.discard(part)
    for folder in store.strays():
        faults.append({"shelf": folder.name[:12], "part": None, "wrong records": "all: shelf.json is not its own"})
        if remove:
            store.remove_stray(folder)
    if not faults:
        print(f"all is as it was written: {checked} parts in {store.folder}")
        return 0
    done = "removed, but for what a run is at" if remove else "--remove removes them, but for what a run is at"
    print(
        f"{table(faults)}\n\n{len(faults)} faults beside {checked} parts that were read: {done}; runs build them again"
    )
    return 1


def spans(places: Sequence[int]) -> str:
    """Ascending numbers as ranges: `3, 7-9`."""
    starts = [p for i, p in enumerate(places) if i == 0 or places[i - 1] != p - 1]
    stops = [p for i, p in enumerate(places) if i == len(places) - 1 or places[i + 1] != p + 1]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))


def prune(store: ActivationStore, options: argparse.Namespace) -> int:
    """Remove shelves and print which."""
    limit_gb, days = options.limit_gb, options.unused_days
    require(
        options.all + (limit_gb is not None) + (days is not None) == 1,
        "lit-transfer store prune needs one of --limit_gb N, --unused_days N and --all.",
    )
    given = next((value for value in (limit_gb, days) if value is not None), 0)
    require(0 <= given < math.inf, f"{given} is not a number of at least 0; give one, or --all.")
    before = {shelf.key: row(shelf) for shelf in store.shelves()}
    removed = store.prune(
        limit_bytes=None if limit_gb is None else round(limit_gb * 1e9),
        unused_s=0 if options.all else None if days is None else days * DAY_S,
    )
    if removed:
        print(table([before.get(key, {"shelf": key[:12]}) for key, _ in removed]))
    kept = [shelf for shelf in store.shelves() if shelf.shared.is_in_use()]
    print(f"removed {len(removed)} shelves, {sum(size for _, size in removed) / 1e6:.1f} MB; {len(kept)} are in use")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
