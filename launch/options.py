"""Command-line options that several verbs share."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from lit_transfer.config import Config
from lit_transfer.errors import require
from lit_transfer.reading import load


def read_config(argv: Sequence[str], program: str, doc: str | None) -> Config:
    """The config of `--config FILE`, with the `--section.key VALUE` of the others; `--help` lists all keys."""
    arguments = list(argv)
    if not arguments or "--help" in arguments or "-h" in arguments:
        parser = ArgumentParser(prog=program, description=doc)
        parser.add_argument("--config", metavar="FILE", help="YAML file; the options below override its keys")
        parser.add_class_arguments(Config)
        parser.print_help()
        sys.exit(0)
    require("--config" in arguments, f"{program} needs --config FILE; configs/ has examples.")
    place = arguments.index("--config")
    require(place + 1 < len(arguments), "--config needs a file.")
    path = arguments[place + 1]
    return load(path, arguments[:place] + arguments[place + 2 :])
