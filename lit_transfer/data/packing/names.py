"""Names of classes: their order, and that no two of them are one."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

from lit_transfer.errors import UserError


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which `class2` stands before `class10`."""
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def in_order(names: Iterable[str]) -> list[str]:
    """Names by value if all are numbers, else in natural order."""
    listed = list(names)
    if all_numbers(listed):
        return sorted(listed, key=float)
    return sorted(listed, key=natural_key)


def all_numbers(names: Sequence[str]) -> bool:
    """Whether every name reads as a finite number."""
    return all(number(name) is not None for name in names)


def number(text: str) -> float | None:
    """The finite number that a text spells, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def refuse_twins(names: Sequence[str], where: str) -> None:
    """`UserError` for two names that differ only in Unicode form or outer white space, or are one number."""
    numeric = all_numbers(names)
    seen: dict[str | float | None, str] = {}
    for name in names:
        same = number(name) if numeric else unicodedata.normalize("NFC", name).strip()
        if same in seen:
            raise UserError(f"{where} has two classes with one name, {seen[same]!a} and {name!a}; merge or rename one.")
        seen[same] = name
