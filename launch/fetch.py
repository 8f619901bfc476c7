"""`lit-transfer fetch --config FILE [--section.key VALUE ...]`: bring every weight a config needs.

Run it where there is a network. The weights are loaded once, so that what does not match shows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lit_transfer.blocks import FeaturesConfig
from lit_transfer.config import Config
from lit_transfer.launch import run
from lit_transfer.launch.options import find_config
from lit_transfer.model.sources import build_net
from lit_transfer.reading import load_any
from lit_transfer.recipe import Model


def main(argv: Sequence[str]) -> int:
    """Fetch, verify and print where the weights lie, with size and digest; returns the exit status."""
    path, overrides = find_config(argv, "lit-transfer fetch", __doc__, Config)
    assert path is not None, "it is needed"
    config = load_any(path, overrides)
    if isinstance(config, FeaturesConfig):
        for block in config.backbones:
            fetch(block.model, block.size)
    else:
        fetch(config.model, config.image.size)
    return 0


def fetch(model: Model, image_size: int | None) -> None:
    """Load the weights of a network, and print where they lie."""
    source = build_net(model, image_size=image_size).source
    print(f"backbone  {model.backbone}")
    print(f"weights   {model.weights}")
    if source is None:
        print("nothing to fetch: the weights start random")
        return
    print(f"origin    {source.origin}")
    if source.path is not None:
        print(f"file      {source.path.resolve()}")
        print(f"size      {source.path.stat().st_size / 1e6:.1f} MB")
        print(f"sha256    {source.sha256()}")
    print(f"licence   {source.licence or 'not stated'}")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
