"""Pack an image folder, a CSV or TSV, or a map-style dataset into WebDataset shards and a manifest.

lit-transfer prepare --source SRC --out DIR [--key value ...]
lit-transfer prepare --config FILE.yaml [--key value ...]
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Sequence

from lit_transfer.data.packing.items import Pack
from lit_transfer.data.packing.pack import Packed, pack
from lit_transfer.errors import require
from lit_transfer.launch import run
from lit_transfer.reading import load, override, parse


def main(argv: Sequence[str]) -> int:
    """Pack what the arguments say and print a summary; 0, or a `UserError`."""
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{inspect.getdoc(Pack)}")
        return 0
    settings = read_settings(argv)
    start = time.perf_counter()
    packed = pack(settings, progress=True)
    print(summary(packed, time.perf_counter() - start))
    return 0


def read_settings(argv: Sequence[str]) -> Pack:
    """The settings of `--config FILE`, if given, with every `--key VALUE` applied."""
    arguments = list(argv)
    if "--config" not in arguments:
        return parse(Pack, override({}, arguments))
    place = arguments.index("--config")
    require(place + 1 < len(arguments), "--config needs a file.")
    return load(arguments[place + 1], arguments[:place] + arguments[place + 2 :], Pack)


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
