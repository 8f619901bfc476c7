"""`lit-transfer fetch --config FILE [--section.key VALUE ...]`: bring every weight a config needs.

Run it where there is a network. The weights are loaded once, so that what does not match shows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lit_transfer.launch import run
from lit_transfer.launch.options import read_config
from lit_transfer.model.sources import build_net


def main(argv: Sequence[str]) -> int:
    """Fetch, verify and print where the weights lie, with size and digest; returns the exit status."""
    config = read_config(argv, "lit-transfer fetch", __doc__)
    source = build_net(config.model, image_size=config.image.size).source
    print(f"backbone  {config.model.backbone}")
    print(f"weights   {config.model.weights}")
    if source is None:
        print("nothing to fetch: the weights start random")
        return 0
    print(f"origin    {source.origin}")
    if source.path is not None:
        print(f"file      {source.path.resolve()}")
        print(f"size      {source.path.stat().st_size / 1e6:.1f} MB")
        print(f"sha256    {source.sha256()}")
    print(f"licence   {source.licence or 'not stated'}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
