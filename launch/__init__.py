"""What people run: `lit-transfer VERB ...` is the `main` of the module of that name in this folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from lit_transfer.errors import UserError, nearest

VERBS = {
    "prepare": "pictures -> WebDataset shards and a manifest",
    "fetch": "bring every weight a config needs to this machine",
    "find-lr": "try learning rates on a phase of a config, and suggest some",
    "plan": "print what a run would do, without a GPU",
    "train": "run the phases of a config",
    "features": "write what backbones give for a dataset, fit classical heads to it, keep the best",
    "evaluate": "measure a finished run on a split or a dataset",
    "predict": "name the pictures you give",
    "store": "list, verify or prune the activations that runs have stored",
}


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Call a verb's main; a fault of the input is printed as one sentence, with exit status 2."""
    try:
        return main(argv)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")  # in one piece: other ranks may write, too
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        sys.stderr.close()
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `lit-transfer` command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print("usage: lit-transfer VERB ...\n")
        print("\n".join(f"  {name:<9} {what}" for name, what in VERBS.items()))
        print("\nlit-transfer VERB --help says more.")
        return 0
    if verb not in VERBS:
        print(f"error: '{verb}' is not a verb of lit-transfer.{nearest(verb, list(VERBS))}", file=sys.stderr)
        return 2
    return run(importlib.import_module(f"lit_transfer.launch.{verb.replace('-', '_')}").main, arguments[1:])
