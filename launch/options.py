"""Command-line options that several verbs share."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from lit_transfer.config import Config
from lit_transfer.errors import require
from lit_transfer.reading import load


def read_config(argv: Sequence[str], program: str, doc: str | None) -> Config:
    """The config of `--config FILE` with each `--section.key VALUE` applied; `--help` lists the keys."""
    arguments = list(argv)
    if not arguments or "--help" in arguments or "-h" in arguments:
        parser = ArgumentParser(prog=program, description=doc)
        parser.add_argument("--config", metavar="FILE", help="YAML file; the options below override its keys")
        parser.add_class_arguments(Config)
        parser.print_help()
        sys.exit(0)
    places = [i for i, argument in enumerate(arguments) if argument.partition("=")[0] == "--config"]
    require(len(places) == 1, f"{program} needs --config FILE once; configs/ has examples.")
    place = places[0]
    _, equals, path = arguments.pop(place).partition("=")
    if not equals:
        require(place < len(arguments), "--config needs a file.")
        path = arguments.pop(place)
    return load(path, arguments)
