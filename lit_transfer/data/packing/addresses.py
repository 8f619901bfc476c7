"""What people write to name shards -> the shards: braces, stars, folders, prefixes of buckets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from lit_transfer.data import reach
from lit_transfer.data.packing.scan import is_of_macos
from lit_transfer.errors import UserError, require


def expand(patterns: Sequence[str]) -> list[str]:
    """The shards that paths, addresses, {000..012}, * and folders stand for, each once, in order.

    Raises:
        UserError: a pattern that matches nothing, an address that is not read, or one that holds credentials.
    """
    found: list[str] = []
    for pattern in patterns:
        try:
            for address in braceexpand(pattern):
                shards = [shard for shard in _listed(address) if not is_of_macos(shard)]
                require(bool(shards), f"'{reach.shown(address)}' matches no shards; correct it.")
                found += shards
        except UnbalancedBracesError:
            raise UserError(
                f"'{reach.shown(pattern)}' has a brace without its other half; write {{000..012}}."
            ) from None
    return list(dict.fromkeys(found))


def _listed(address: str) -> list[str]:
    remote = reach.is_remote(address)
    require(
        not remote or reach.shown(address) == address,
        f"'{reach.shown(address)}' is given with credentials, which a manifest would keep; take them from the "
        "environment or ~/.netrc.",
    )
    if not remote:
        path = reach.local_path(address)
        if path.is_dir():
            return reach.list_files(str(path), ".tar")
        if re.search(r"[*?\[]", str(path)) and not path.exists():
            root = Path(path.anchor)
            found = root.glob(str(path.relative_to(root)))
            return sorted(str(file) for file in found if file.is_file())
        return [str(path)]
    if address.endswith("/"):
        return reach.list_files(address, ".tar")
    if "*" in address:
        below = address.partition("*")[0].rpartition("/")[0] + "/"
        return [shard for shard in reach.list_files(below, "") if _fits(shard.split("/"), address.split("/"))]
    return [address]


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether folders and file fit those of a pattern one by one, `**` any number of folders: as `Path.glob` has it."""
    if not patterns or not names:
        return not (patterns or names)
    if patterns[0] == "**":
        return any(_fits(names[i:], patterns[1:]) for i in range(len(names)))
    return fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])
