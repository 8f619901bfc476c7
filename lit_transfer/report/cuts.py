"""What the activation store is worth to a phase: time and bytes of each cut, drawn from what was measured."""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_transfer.activations.costs import Weighing
from lit_transfer.report.diagrams import short
from lit_transfer.report.plots import COLOURS, STYLE, save_figure

PARTS = {
    "build_s": ("building, once", COLOURS[0]),
    "read_s": ("reading", COLOURS[4]),
    "run_on_s": ("running the frozen stages behind the cut", COLOURS[5]),
}
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
WIDTH = 138
"""Characters of a line of the title."""


@STYLE
def plot_cuts(weighed: Weighing, phase: str, why: str, path: Path) -> None:
    """Seconds that a phase takes with each cut, against computing; bytes of its records, against the room.

    Args:
        weighed: what was measured.
        phase: its name.
        why: the decision as a line for people.
        path: of the picture.
    """
    figure = Figure(figsize=(12, 2.6 + 0.36 * len(weighed.cuts)))
    times, sizes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    _draw_times(times, weighed)
    _draw_bytes(sizes, weighed)
    times.set_yticks(range(len(weighed.cuts)), [short(cut.stage) for cut in weighed.cuts])
    for label, cut in zip(times.get_yticklabels(), weighed.cuts, strict=True):
        label.set_fontweight("bold" if cut.chosen else "normal")
    times.set_ylim(len(weighed.cuts) - 0.4, -0.6)  # pictures enter above
    for axes in (times, sizes):
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter("{x:,g}")
    figure.suptitle(textwrap.fill(f"Phase {phase} {why}", WIDTH), x=0.01, ha="left", fontsize=11)
    figure.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


def _draw_times(axes: Axes, weighed: Weighing) -> None:
    """The parts of each cut's seconds end to end, their sum beside them."""
    totals = [cut.total_s for cut in weighed.cuts]
    starts = [0.0] * len(totals)
    for name, (label, colour) in PARTS.items():
        widths = [getattr(cut, name) for cut in weighed.cuts]
        axes.barh(range(len(widths)), widths, left=starts, color=colour, height=0.68, label=label, zorder=2)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    chosen = "" if any(cut.chosen for cut in weighed.cuts) else ", chosen"
    label = f"computing in each epoch{chosen}: {_seconds(weighed.compute_s)}"
    axes.axvline(weighed.compute_s, color=COLOURS[1], linewidth=2, label=label, zorder=3)
    for y, (cut, total) in enumerate(zip(weighed.cuts, totals, strict=True)):
        text = _seconds(total) + ("  chosen" if cut.chosen else "")
        _write_beside(axes, total, y, text, is_bold=cut.chosen)
    longest = max([weighed.compute_s, *totals])
    # Only what others read too can be chosen although computing is faster in this phase.
    is_shared = any(cut.chosen and total > weighed.compute_s for cut, total in zip(weighed.cuts, totals, strict=True))
    title = "Time of this phase with each cut" + ("; later phases share the chosen one" if is_shared else "")
    axes.set(xlim=(0, 1.16 * longest), ylabel="cut before", title=title)
    axes.set_xlabel(f"seconds for the {weighed.samples:,} samples of the phase")


def _draw_bytes(axes: Axes, weighed: Weighing) -> None:
    """What each cut stores, and whether what is missing of it fits."""
    largest = max(cut.bytes for cut in weighed.cuts)
    divisor, unit = next(pair for pair in UNITS if largest >= pair[0] or pair[1] == "B")
    values = [cut.bytes / divisor for cut in weighed.cuts]
    axes.barh(range(len(values)), values, color="#888888", height=0.68, zorder=2)
    for y, cut in enumerate(weighed.cuts):
        note = ", there" if not cut.missing_bytes else ", no room" if cut.missing_bytes > weighed.room_bytes else ""
        _write_beside(axes, values[y], y, _bytes(cut.bytes) + note, is_bold=cut.chosen)
    axes.set(xlim=(0, 1.8 * largest / divisor), xlabel=unit)
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"Records; room for {_bytes(max(0.0, weighed.room_bytes))}")


def _write_beside(axes: Axes, x: float, y: int, text: str, *, is_bold: bool) -> None:
    """A text at the end of a bar; a line behind it does not strike it through."""
    weight = "bold" if is_bold else "normal"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    beside = axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", bbox=box, zorder=4)
    beside.set(fontsize=9, fontweight=weight)


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s"


def _bytes(value: float) -> str:
    divisor, unit = next((pair for pair in UNITS if value >= pair[0]), UNITS[-1])
    return f"{value / divisor:.3g} {unit}"
