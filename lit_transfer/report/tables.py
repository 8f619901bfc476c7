"""Tables of plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def number(value: object) -> str:
    """A cell's text: 4 significant digits for a float, a dash for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000 or value == 0:
        return f"{value:.0f}"
    return f"{value:#.4g}".rstrip(".")


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """Aligned plain text under a header and a rule; numbers stand right. All keys are columns by default."""
    columns = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else columns
    cells = [[number(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    texts = {c for c in columns if any(isinstance(row.get(c), str) for row in rows)}

    def line(values: Sequence[str]) -> str:
        padded = [v.ljust(w) if c in texts else v.rjust(w) for v, w, c in zip(values, widths, columns, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), "  ".join("─" * width for width in widths), *map(line, cells)])


def aligned(rows: Sequence[Mapping[str, object]]) -> str:
    """A table whose numbers stand right below their heading, thousands apart, floats with one decimal.

    Every row has the same keys.
    """
    columns: dict[str, list[str]] = {}
    for name in rows[0]:
        cells = [row[name] for row in rows]
        texts = [c if isinstance(c, str) else f"{c:,.1f}" if isinstance(c, float) else f"{c:,}" for c in cells]
        width = 0 if isinstance(cells[0], str) else max(map(len, [name, *texts]))
        columns[name.rjust(width)] = [text.rjust(width) for text in texts]
    return table([{name: texts[i] for name, texts in columns.items()} for i in range(len(rows))])


def summary_table(summary: Mapping[str, object]) -> str:
    """What is printed after a run, from the flat keys of summary.json: splits, phases, the rest."""
    groups: dict[str, dict[str, object]] = {}
    for key, value in summary.items():
        group, _, name = key.rpartition("/")
        groups.setdefault(group, {})[name] = value
    rest = groups.pop("", {})
    for split, samples in groups.pop("samples", {}).items():
        groups.setdefault(split, {})["samples"] = samples
    splits = [split for split in ("test", "val", "train") if split in groups]
    by_phase = [group for group in groups if group not in splits]
    blocks = [
        _block("metric", {split: groups[split] for split in splits}),
        _block("phase", {group: groups[group] for group in by_phase}),
        _block("run", {"value": {key: _plain(value) for key, value in rest.items()}}),
    ]
    return "\n\n".join(block for block in blocks if block)


def _block(first: str, columns: Mapping[str, Mapping[str, object]]) -> str:
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [{first: name} | {key: column.get(name) for key, column in columns.items()} for name in names]
    return table(rows, [first, *columns]) if rows else ""


def _plain(value: object) -> str:
    return ", ".join(map(number, value)) if isinstance(value, list) else number(value)
