"""Diagrams of what a network said of a split: confusion matrix, ROC, reliability, precision, scatter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_roc

from lit_transfer.objectives.calibration import BINS, Reliability
from lit_transfer.report.plots import COLOURS, LOOKS, STYLE, save_figure

MAX_CURVES = len(LOOKS)
Curve = tuple[float, str, Tensor, Tensor]


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
    shown = [short(names[i]) for i in ticks]
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
            label=f"{area:.3f}  {short(name)}",
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
def plot_reliability(binned: Reliability, path: str | Path, confidence: str, accuracy: str) -> None:
    """Reliability diagram (Guo et al. 2017, figure 1): how often predictions of a bin came true, against how sure
    they were, with the gap between the two; below, how many there are.

    Args:
        binned: the predictions.
        path: of the picture.
        confidence: what the confidence is, for people.
        accuracy: likewise, how often they came true.
    """
    filled = binned.counts > 0
    counts = binned.counts[filled].numpy()
    sure, right = (sums[filled].numpy() / counts for sums in (binned.confidences, binned.hits))
    middles = (torch.arange(BINS)[filled].numpy() + 0.5) / BINS
    figure = Figure(figsize=(6.2, 7))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bar = {"width": 0.92 / BINS, "zorder": 2}
    upper.bar(middles, right, color=COLOURS[5], label=accuracy, **bar)
    gap = {"color": "#D55E0055", "edgecolor": COLOURS[1], "hatch": "///", "linewidth": 0.8}
    upper.bar(middles, sure - right, bottom=right, label=f"gap to the {confidence}", **gap, **bar)
    upper.plot([0, 1], [0, 1], color="#666666", linewidth=1.2, linestyle=":", zorder=3)
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel=accuracy)
    upper.set_title(f"Reliability: calibration error {binned.error:.4f} over {BINS} bins")
    upper.legend(loc="upper left")
    lower.bar(middles, counts, color="#888888", **bar)
    lower.set(xlabel=confidence, ylabel="predictions")
    save_figure(figure, path)


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
    axes.set_yticks(range(len(bars)), [short(bar[2]) for bar in bars])
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
        axes.set(xlabel="true", ylabel="predicted", title=f"{short(name)} (n = {len(true)})")
    save_figure(figure, path)


def short(name: str) -> str:
    """A name that fits beside an axis."""
    return name if len(name) <= 24 else name[:23] + "…"
