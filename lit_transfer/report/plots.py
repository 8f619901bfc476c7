"""Curves of a run, pictures on a sheet, and the style of all; each file is written whole or not at all."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lit_transfer.files import replacing
from lit_transfer.phases.lr_finder import RangeTest

# Okabe and Ito's colours can be told apart with any colour vision; line styles double their number.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LOOKS = [(colour, line) for line, colour in product(("-", "--"), COLOURS)]
STYLE = mpl.rc_context(
    {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#e4e4e4",
        "legend.frameon": False,
        "legend.fontsize": 9,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 130,
        "text.parse_math": False,  # a class may be named "$5 bill$"
    }
)
HEADLINE = ("accuracy", "balanced_accuracy", "auroc", "average_precision", "f1", "kappa")
ERRORS = ("mae", "rmse")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure whole or not at all; the suffix of `path` is the format."""
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, bbox_inches="tight", pad_inches=0.12)


@STYLE
def plot_curves(metrics_csv: str | Path, path: str | Path) -> None:
    """Losses, the main validation figures and learning rates against the step; phases are shaded and named.

    `metrics_csv` has the columns phase, epoch and step and one for each metric, with empty cells between.
    """
    with Path(metrics_csv).open(newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = [name for name in (rows[0] if rows else {}) if any(row[name] for row in rows)]
    validation = [f"val/{name}" for name in HEADLINE if f"val/{name}" in metrics][:4]
    panels = {
        "loss": [name for name in ("train/loss", "val/loss") if name in metrics],
        "validation": validation or [f"val/{name}" for name in ERRORS if f"val/{name}" in metrics],
        "learning rate": [name for name in metrics if name.startswith("lr/")],
    }
    figure = Figure(figsize=(14, 4.2))
    for axes, (title, names) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.set(xlabel="step", title=title)
        if title == "learning rate":
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_formatter("{x:.0e}")
        _shade_phases(axes, rows)
        for name, (colour, _) in zip(names, LOOKS, strict=False):
            points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
            split, _, metric = name.partition("/")
            label = split if metric == "loss" else metric.replace("_", " ")
            marker = "o" if split == "val" else ""
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=4, lw=1.6, label=label)
        axes.margins(y=0.16)
        if names:
            axes.legend(loc="best", bbox_to_anchor=(0, 0, 1, 0.93))  # below the names of the phases
    save_figure(figure, path)


@STYLE
def plot_range_test(test: RangeTest, path: str | Path) -> None:
    """Loss of each step against its learning rate; the suggested and the planned rate are marked."""
    figure = Figure(figsize=(7.5, 4.6))
    axes = figure.add_subplot()
    axes.plot(test.rates, test.losses, ".", color=COLOURS[5], ms=5, label="loss of a step")
    axes.plot(test.rates, test.smoothed, color=COLOURS[0], lw=1.8, label="smoothed")
    if test.suggested is not None:
        rate = test.rates[test.suggested]
        axes.axvline(rate, color=COLOURS[1], lw=1.6, label=f"suggestion: {rate:.2g}")
    if test.rates[0] <= test.planned <= test.rates[-1]:
        axes.axvline(test.planned, color="#666666", lw=1.4, ls=":", label=f"in the config: {test.planned:.2g}")
    seen = test.losses[: test.lowest + 1]
    low, high = min(seen), max(seen)
    span = high - low or 0.1
    axes.set(ylim=(low - 0.1 * span, high + 0.5 * span))  # the growth at the end would hide the fall
    axes.set(xscale="log", xlabel=f"learning rate of {test.axis}", ylabel="training loss")
    axes.set_title(f"Learning-rate range test, {len(test.losses)} of {test.steps} steps")
    axes.xaxis.set_major_formatter("{x:.0e}")
    axes.legend(loc="upper left")
    save_figure(figure, path)


def _shade_phases(axes: Axes, rows: Sequence[Mapping[str, str]]) -> None:
    ends = {row["phase"]: int(row["step"]) for row in rows}
    starts = [0, *ends.values()]
    for i, ((phase, end), start) in enumerate(zip(ends.items(), starts, strict=False)):
        axes.axvspan(start, end, color=COLOURS[(i + 3) % 6], alpha=0.09, linewidth=0)
        middle, top = ((start + end) / 2, 0.98), axes.get_xaxis_transform()
        axes.text(*middle, phase, transform=top, ha="center", va="top", color="#666666")


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], path: str | Path, columns: int = 6) -> None:
    """Pictures in rows of `columns`, each above its caption; a line that is too wide is cut."""
    font = ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 15)
    lines = [caption.split("\n") for caption in captions]
    side, margin, line_height = 192, 12, 20
    height = side + 6 + line_height * max(map(len, lines), default=1) + margin
    down = max(1, -(-len(images) // columns))
    across = max(1, min(columns, len(images)))
    sheet = Image.new("RGB", (margin + across * (side + margin), margin + down * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, texts) in enumerate(zip(images, lines, strict=True)):
        x, y = margin + i % columns * (side + margin), margin + i // columns * height
        tile = ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
        sheet.paste(tile, (x + (side - tile.width) // 2, y + (side - tile.height) // 2))
        for row, text in enumerate(texts):
            draw.text((x, y + side + 4 + row * line_height), _fit(text, font, side), "#222222", font)
    if not images:
        draw.text((margin, margin), "nothing to show", "#222222", font)
    with replacing(Path(path)) as temporary:
        sheet.save(temporary)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
