"""Classical heads side by side: a table, and one picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from lit_transfer.files import write_text
from lit_transfer.report.plots import COLOURS, STYLE, save_figure


@dataclass(frozen=True, kw_only=True)
class HeadRow:
    """What is told of a head.

    Args:
        head: its kind.
        settings: that cross-validation chose.
        score: of them in cross-validation, NaN if it was not fitted.
        figures: by split and name, such as `val/auroc`.
        seconds: that cross-validation and fitting took.
        note: what else must be known of it.
        chosen: whether it is the run's.
    """

    head: str
    settings: str = ""
    score: float = float("nan")
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    note: str = ""
    chosen: bool = False


def head_table(rows: Sequence[HeadRow], metric: str, *, names: Sequence[str] = ()) -> list[dict[str, object]]:
    """Rows for a table or a CSV; the chosen head has a star.

    Args:
        rows: of heads.
        metric: that settings were chosen by.
        names: of the figures to show; all by default.
    """
    notes = any(row.note for row in rows)
    return [
        {
            "head": row.head + " *" * row.chosen,
            f"cv/{metric}": row.score,
            **{key: value for key, value in row.figures.items() if not names or key.partition("/")[2] in names},
            "seconds": row.seconds,
            "settings": row.settings,
            **({"note": row.note} if notes else {}),
        }
        for row in rows
    ]


def write_heads(rows: Sequence[HeadRow], metric: str, path: Path) -> None:
    """Write all figures of all heads as CSV; the chosen one has 1 in `chosen`."""
    lines = [
        {"head": row.head, "chosen": int(row.chosen)}
        | {key: value for key, value in line.items() if key != "head" and value == value}  # what is undefined is empty
        for row, line in zip(rows, head_table(rows, metric), strict=True)
    ]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, file.getvalue())


@STYLE
def plot_heads(rows: Sequence[HeadRow], metric: str, path: Path) -> None:
    """A figure of merit of each fitted head, the best on validation above: in cross-validation and on each split."""
    shown = [row for row in rows if row.seconds is not None]
    splits = [name for name in ("val", "test") if any(f"{name}/{metric}" in row.figures for row in shown)]
    told = "val" if "val" in splits else "cv"
    values = {"cv": [row.score for row in shown]} | {
        split: [row.figures.get(f"{split}/{metric}", float("nan")) for row in shown] for split in splits
    }
    order = sorted(range(len(shown)), key=lambda i: values[told][i])
    figure = Figure(figsize=(8.4, 1.6 + 0.46 * len(shown)))
    axes = figure.add_subplot()
    looks = {
        "cv": ("cross-validation", "o", COLOURS[5], 120),  # the largest below, or the same figure would hide it
        "val": ("validation", "D", COLOURS[0], 48),
        "test": ("test", "s", COLOURS[1], 22),
    }
    for name, own in values.items():
        label, marker, colour, area = looks[name]
        axes.scatter(
            [own[i] for i in order], range(len(order)), marker=marker, color=colour, s=area, label=label, zorder=3
        )
    for y, i in enumerate(order):
        ends = [own[i] for own in values.values()]
        axes.plot([min(ends), max(ends)], [y, y], color="#bbbbbb", linewidth=1.2, zorder=2)
    axes.set_yticks(range(len(order)), [shown[i].head.replace("_", " ") + " *" * shown[i].chosen for i in order])
    axes.set(xlabel=metric.replace("_", " "), title=f"Heads by {metric.replace('_', ' ')}; the one with * is the run's")
    axes.margins(y=0.1)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    save_figure(figure, path)
