"""Pictures of a result, each written under a temporary name and then renamed."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_roc

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
MAX_CURVES = len(LOOKS)
HEADLINE = ("accuracy", "balanced_accuracy", "auroc", "average_precision", "f1", "kappa")
ERRORS = ("mae", "rmse")
Curve = tuple[float, str, Tensor, Tensor]


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure whole or not at all; the suffix of `path` is the format."""
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, bbox_inches="tight", pad_inches=0.12)


@STYLE
def plot_confusion(matrix: Tensor, names: Sequence[str], path: str | Path) -> None:
    """Confusion matrix `[K, K]` (rows true): colour is the share of the true class, text is the count."""
    counts = matrix.double()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    k = len(names)
    side = min(13.0, 2.6 + (0.55 if k <= 20 else 0.16) * k)
    figure = Figure(figsize=(side + 0.8, side))
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", fraction=0.046, pad=0.03)
    size = 9.0 if k <= 30 else max(5.5, 300 / k)
    ticks = range(0, k, math.ceil(k / 120))
    shown = [_short(names[i]) for i in ticks]
    axes.set_xticks(ticks, shown, rotation=0 if k <= 4 else 90, fontsize=size)
    axes.set_yticks(ticks, shown, fontsize=size)
    axes.grid(False)
    if k <= 20:
        for i, j in torch.cartesian_prod(torch.arange(k), torch.arange(k)).tolist():
            colour = "white" if shares[i, j] > 0.55 else "#222222" if counts[i, j] else "#bbbbbb"
            axes.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=colour, fontsize=size)
    right, total = int(counts.diagonal().sum()), int(counts.sum())
    axes.set(xlabel="predicted", ylabel="true", title=f"Confusion matrix: {right} of {total} right")
    save_figure(figure, path)


@STYLE
def plot_roc(
    probabilities: Tensor,
    target: Tensor,
    names: Sequence[str],
    path: str | Path,
    threshold: float | None = None,
) -> None:
    """ROC curves: of class 1 if there are two, with its threshold marked; else of each against the rest.

    Above 12 classes the smallest areas are drawn; the mean is over all. A class without both kinds of samples
    has no curve.

    Args:
        probabilities: `[N, K]`.
        target: int64 `[N]` (-1 missing), or float `[N, K]` of a multilabel dataset (NaN missing).
        names: of the K classes or labels.
        path: of the picture.
        threshold: of a binary decision.
    """
    binary = target.ndim == 1 and len(names) == 2
    columns = _against_rest(probabilities, target, names)[1 if binary else 0 :]
    curves = [(float(binary_auroc(scores.double(), truth)), name, scores, truth) for name, scores, truth in columns]
    shown = sorted(curves, key=lambda curve: curve[0])[:MAX_CURVES]
    figure = Figure(figsize=(6.2, 5.6) if binary else (8.4, 5.6))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
    for (area, name, scores, truth), (colour, style) in zip(shown, LOOKS, strict=False):
        fpr, tpr, _ = binary_roc(scores.double(), truth)
        axes.plot(
            fpr.numpy(),
            tpr.numpy(),
            color=colour,
            linestyle=style,
            linewidth=1.6,
            label=f"{area:.3f}  {_short(name)}",
        )
    if binary and curves and threshold is not None:
        _mark_threshold(axes, *curves[0][2:], threshold)
    if not binary and curves:
        _draw_mean(axes, curves)
    title = "ROC" if len(shown) == len(curves) else f"ROC: the {len(shown)} smallest areas of {len(curves)}"
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal", title=title)
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    if curves:
        place = {"loc": "lower right"} if binary else {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
        axes.legend(title="area under the curve", **place)
    else:
        axes.text(0.5, 0.4, "no class has both kinds of samples", ha="center")
    save_figure(figure, path)


def _draw_mean(axes: Axes, curves: Sequence[Curve]) -> None:
    grid = np.linspace(0, 1, 201)
    rates = [binary_roc(scores.double(), truth)[:2] for _, _, scores, truth in curves]
    mean = np.mean([np.interp(grid, fpr, tpr) for fpr, tpr in rates], axis=0)
    area = np.mean([curve[0] for curve in curves])
    axes.plot(grid, mean, color="black", linewidth=2.4, label=f"{area:.3f}  mean of {len(curves)}")


def _mark_threshold(axes: Axes, scores: Tensor, truth: Tensor, threshold: float) -> None:
    said = (scores.double() >= threshold).double()
    fpr, tpr = float(said[truth == 0].mean()), float(said[truth == 1].mean())
    axes.plot(fpr, tpr, "o", color=COLOURS[1], markersize=8)
    text = f"threshold {threshold:.3g}: {tpr:.1%} found,\n{fpr:.1%} false alarms"
    place, side = ((10, -6), "left") if fpr < 0.5 else ((-10, -10), "right")
    axes.annotate(text, (fpr, tpr), place, textcoords="offset points", va="top", ha=side, color=COLOURS[1])


def _against_rest(probabilities: Tensor, target: Tensor, names: Sequence[str]) -> list[tuple[str, Tensor, Tensor]]:
    """Name, scores and int truth of the labelled samples, for each class or label that has both kinds."""
    hot = target if target.ndim == 2 else torch.nn.functional.one_hot(target.clamp(min=0), len(names))
    seen = ~target.isnan() if target.ndim == 2 else (target >= 0)[:, None].expand_as(hot)
    columns = [(name, probabilities[seen[:, k], k], hot[seen[:, k], k].long()) for k, name in enumerate(names)]
    return [column for column in columns if 0 < column[2].sum() < len(column[2])]


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


@STYLE
def plot_predictions(task: str, probabilities: Tensor, target: Tensor, names: Sequence[str], path: str | Path) -> None:
    """regression: predicted against true values, a panel for each target. multilabel: average precision of
    each label, with the share of positives, which is what chance gives. Shapes as in `metrics`.
    """
    if task == "regression":
        _plot_scatter(probabilities, target, names, path)
        return
    assert task == "multilabel", task
    columns = _against_rest(probabilities, target, names)
    bars = [(float(binary_average_precision(s.double(), t)), float(t.double().mean()), n) for n, s, t in columns]
    bars.sort()
    figure = Figure(figsize=(7.5, 1.6 + 0.3 * len(bars)))
    axes = figure.add_subplot()
    axes.barh(range(len(bars)), [bar[0] for bar in bars], color=COLOURS[5], height=0.7)
    for y, (precision, share, _) in enumerate(bars):
        axes.vlines(share, y - 0.35, y + 0.35, color="#222222", label="_" if y else "share of positives")
        axes.text(precision + 0.01, y, f"{precision:.2f}", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [_short(bar[2]) for bar in bars])
    axes.set(xlim=(0, 1.08), xlabel="average precision", title="Average precision of each label")
    axes.grid(axis="y", visible=False)
    if bars:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right")
    save_figure(figure, path)


def _plot_scatter(values: Tensor, target: Tensor, names: Sequence[str], path: str | Path) -> None:
    across = min(len(names), 3)
    down = -(-len(names) // across)
    figure = Figure(figsize=(0.8 + 4.2 * across, 4.4 * down))
    for k, name in enumerate(names):
        axes = figure.add_subplot(down, across, k + 1)
        seen = ~target[:, k].isnan()
        true, predicted = target[seen, k].numpy(), values[seen, k].numpy()
        ends = [true.min(initial=np.inf), true.max(initial=-np.inf)]
        axes.plot(ends, ends, color="#999999", linewidth=1, linestyle=":")
        axes.scatter(true, predicted, s=14, alpha=0.5 if len(true) < 1000 else 0.15, color=COLOURS[0])
        axes.set(xlabel="true", ylabel="predicted", title=f"{_short(name)} (n = {len(true)})")
    save_figure(figure, path)


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


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
