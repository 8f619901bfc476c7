"""`lit-transfer prepare [--config FILE] [--source SRC --out DIR] [--key VALUE ...]`: pack pictures.

An image folder, a CSV or TSV, or a map-style dataset becomes WebDataset shards and a manifest.

prepare --index SHARD [SHARD ...]   a manifest for shards of others; --index --help has its keys
prepare --verify DIR                compare a dataset with its manifest; status 1 if it differs
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.index import Index, index
from lit_transfer.data.packing.items import Pack
from lit_transfer.data.packing.pack import Packed, pack
from lit_transfer.data.packing.verify import Verified, Verify, verify
from lit_transfer.data.schema import Label
from lit_transfer.launch import run
from lit_transfer.launch.options import read_config
from lit_transfer.report import table

INDEX_DOC = """`lit-transfer prepare --index SHARD [SHARD ...] [--config FILE] [--key VALUE ...]`: write a manifest.

The shards, which others wrote, are streamed once and stay as they are.
"""
VERIFY_DOC = "`lit-transfer prepare --verify DIR_OR_ADDRESS [--workers N]`: compare a dataset with its manifest."

MIXED = 0.8
"""Share of the classes that a shard of mixed samples would hold, below which shards count as sorted."""

SettingsT = TypeVar("SettingsT")


def main(argv: Sequence[str]) -> int:
    """Pack, index or verify what the arguments say, and print a summary; 0, 1 for a dataset that differs."""
    start = time.perf_counter()
    if "--verify" in argv:
        checked = verify(_settings(argv, VERIFY_DOC, Verify), progress=True)
        print(verdict(checked, time.perf_counter() - start))
        return int(bool(checked.faults))
    if "--index" in argv:
        indexed = index(_settings(_gathered(argv, "--index"), INDEX_DOC, Index), progress=True)
        print(summary(indexed, "indexed", time.perf_counter() - start))
        return 0
    packed = pack(_settings(argv, __doc__, Pack), progress=True)
    print(summary(packed, "packed", time.perf_counter() - start))
    return 0


def _settings(argv: Sequence[str], doc: str | None, cls: type[SettingsT]) -> SettingsT:
    settings: SettingsT = read_config(argv, "lit-transfer prepare", doc, cls, needs_file=False)
    return settings


def _gathered(argv: Sequence[str], option: str) -> list[str]:
    """The arguments, with all values behind an option as one list: a shell expands a pattern to several."""
    first = argv.index(option) + 1
    last = next((i for i in range(first, len(argv)) if argv[i].startswith("-")), len(argv))
    return [*argv[: first - 1], f"{option}={json.dumps(list(argv[first:last]))}", *argv[last:]]


def summary(packed: Packed, done: str, seconds: float) -> str:
    """A few lines on what the dataset holds and what deserves a look."""
    manifest = packed.manifest
    lines = [f"already {done}: {manifest.name}" if packed.reused else f"{done} {manifest.name} in {seconds:.1f} s"]
    lines.append(f"  task      {manifest.task}")
    for label in manifest.labels:
        lines.append(f"  label     {label.name}" + (f": {_told(manifest, label)}" if label.classes else ""))
    lines.append("  samples   " + ", ".join(f"{split} {count}" for split, count in manifest.splits.items()))
    lines.append(f"  shards    {len(manifest.shards)}, {sum(s.bytes for s in manifest.shards) / 2**20:.1f} MiB")
    lines.append(f"  rejected  {packed.rejected}" + (" (see rejected.csv)" if packed.rejected else ""))
    if packed.ignored:
        lines.append(f"  ignored   {packed.ignored} files that are no pictures")
    lines += [f"  warning   {told}" for told in _unmixed(manifest)]
    for column, what in (("group", "groups stand"), ("hash", "pictures stand, byte for byte,")):
        if straddling := manifest.straddling(column):
            lines.append(f"  warning   {straddling} {what} in more than one split")
    lines.append(f"  digest    {manifest.digest}")
    return "\n".join(lines)


def _told(manifest: Manifest, label: Label) -> str:
    """The classes, with their samples over all shards, if they are few also the missing ones."""
    names = label.display
    counts = manifest.class_counts(label.name).sum(axis=0).tolist()
    if len(names) > 8:
        return f"{', '.join(names[:6])}, ... ({len(names)} classes of {min(counts[:-1])} to {max(counts[:-1])} samples)"
    told = zip((*names, "missing"), counts, strict=True)
    return ", ".join(f"{name} {count}" for name, count in told if name in names or count)


def _unmixed(manifest: Manifest) -> Iterator[str]:
    """Labels by whose classes the shards are sorted, at least in part."""
    for label in manifest.labels:
        if label.classes:
            found, mixed = manifest.mixing(label.name)
            if found < MIXED * mixed:
                yield (
                    f"a shard holds {found:.1f} of the {len(label.classes)} classes of '{label.name}' on average, "
                    f"mixed ones would hold {mixed:.1f}; leave data.order.block_shards null, or a batch has few classes"
                )


def verdict(checked: Verified, seconds: float) -> str:
    """A table of what is wrong, or that nothing is."""
    manifest = checked.manifest
    samples, size = sum(manifest.splits.values()), checked.bytes / 2**20
    read = f"{len(manifest.shards)} shards, {samples} samples, {size:.1f} MiB in {seconds:.1f} s"
    if not checked.faults:
        return f"{manifest.name} is what its manifest says: {read}\n  digest    {manifest.digest}"
    rows = [{"shard": fault.shard, "member": fault.member, "what is wrong": fault.wrong} for fault in checked.faults]
    return f"{table(rows)}\n\n{manifest.name} is not what its manifest says: {read}; copy it again, or pack it anew"


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
