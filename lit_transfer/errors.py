"""Faults of the input, as sentences that say what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """A fault of the input: one sentence with value, rule and remedy. Printed without a traceback."""

    def __init__(self, sentence: str) -> None:
        # PyTorch makes a worker's error anew from the text of its traceback; the sentence is what follows the name.
        super().__init__(sentence.rpartition("UserError: ")[2].strip())


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def nearest(name: str, names: Sequence[str]) -> str:
    """` Did you mean 'x'?` for the most similar name, or an empty string."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
