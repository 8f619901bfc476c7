"""`lit-transfer prepare [--config FILE] [--source SRC --out DIR] [--key VALUE ...]`: pack pictures.

An image folder, a CSV or TSV, or a map-style dataset becomes WebDataset shards and a manifest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from lit_transfer.data.packing.items import Pack
from lit_transfer.data.packing.pack import Packed, pack
from lit_transfer.launch import run
from lit_transfer.launch.options import read_config


def main(argv: Sequence[str]) -> int:
    """Pack what the arguments say and print a summary; 0, or a `UserError`."""
    settings: Pack = read_config(argv, "lit-transfer prepare", __doc__, Pack, needs_file=False)
    start = time.perf_counter()
    packed = pack(settings, progress=True)
    print(summary(packed, time.perf_counter() - start))
    return 0


def summary(packed: Packed, seconds: float) -> str:
    """A few lines on what the dataset holds and what deserves a look."""
    manifest = packed.manifest
    lines = [f"already packed: {manifest.path}" if packed.reused else f"packed {manifest.path} in {seconds:.1f} s"]
    lines.append(f"  task      {manifest.task}")
    for label in manifest.labels:
        lines.append(f"  label     {label.name}" + (f": {_short(label.display)}" if label.classes else ""))
    lines.append("  samples   " + ", ".join(f"{split} {count}" for split, count in manifest.splits.items()))
    lines.append(f"  shards    {len(manifest.shards)}, {sum(s.bytes for s in manifest.shards) / 2**20:.1f} MiB")
    lines.append(f"  rejected  {packed.rejected}" + (" (see rejected.csv)" if packed.rejected else ""))
    if packed.ignored:
        lines.append(f"  ignored   {packed.ignored} files that are no pictures")
    for column, what in (("group", "groups stand"), ("hash", "pictures stand, byte for byte,")):
        if straddling := manifest.straddling(column):
            lines.append(f"  warning   {straddling} {what} in more than one split")
    lines.append(f"  digest    {manifest.digest}")
    return "\n".join(lines)


def _short(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])}, ... ({len(names)} classes)"


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
