"""Tables line up; pictures are whole files and show what they were given."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from lit_transfer.objectives.calibration import BINS, Reliability, reliability
from lit_transfer.report import (
    aligned,
    contact_sheet,
    plot_confusion,
    plot_curves,
    plot_predictions,
    plot_reliability,
    plot_roc,
    save_figure,
    summary_table,
    table,
)

NAN = float("nan")
ROC_NAMES = ["no", "yes"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look into."""
    figures: list[Figure] = []
    save = Figure.savefig

    def record(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


def draw(classes: int, rows: int = 60) -> tuple[Tensor, Tensor]:
    """Probabilities that know a little, and classes."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(rows) % classes
    logits = torch.randn(rows, classes, generator=generator)
    logits[torch.arange(rows), target] += 1
    return logits.softmax(1), target


def pixels(path: Path) -> np.ndarray:
    """`[H, W, 3]` of a picture."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def lines(figure: Figure, axes: int = 0) -> dict[str, np.ndarray]:
    """Points `[N, 2]` of each labelled line."""
    found = figure.axes[axes].get_lines()
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in found if str(line.get_label())[0] != "_"}


def test_table_lines_up() -> None:
    rows = [
        {"name": "cat", "n": 7, "f1": 0.912345},
        {"name": "elephant", "n": 1200, "f1": NAN, "mae": 12345.6},
    ]
    assert table(rows).split("\n") == [
        "name         n      f1    mae",
        "────────  ────  ──────  ─────",
        "cat          7  0.9123      -",
        "elephant  1200       -  12346",
    ]
    assert table(rows, ["f1"]).split("\n") == ["    f1", "──────", "0.9123", "     -"]
    assert table([], ["a"]) == "a\n─"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5000"), (123.456, "123.5"), (0.0, "0"), (1234.56, "1235"), (0.00001234, "1.234e-05"), (3, "3")],
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert table([{"x": value}]).split("\n")[-1].strip() == text


def test_aligned_numbers_stand_below_the_end_of_their_heading() -> None:
    rows = [{"a": "x", "count": 1234567, "n": 0.25}, {"a": "long", "count": 1, "n": 1234.0}]
    assert aligned(rows).split("\n") == [
        "a         count        n",
        "────  ─────────  ───────",
        "x     1,234,567      0.2",
        "long          1  1,234.0",
    ]


def test_summary_table() -> None:
    summary = {
        "val/accuracy": 0.9,
        "test/accuracy": 0.88123,
        "test/auroc": None,
        "samples/test": 100,
        "seconds/head": 31.2,
        "seconds/total": 40.0,
        "images_per_s/head": 123.4,
        "threshold": [0.25, 0.5],
        "dataset_digest": "abc",
    }
    metrics, phases, rest = (block.split("\n") for block in summary_table(summary).split("\n\n"))
    assert [line.split() for line in metrics] == [
        ["metric", "test", "val"],
        ["────────", "──────", "──────"],
        ["accuracy", "0.8812", "0.9000"],
        ["auroc", "-", "-"],
        ["samples", "100", "-"],
    ]
    assert [line.split() for line in phases[2:]] == [["head", "31.20", "123.4"], ["total", "40.00", "-"]]
    assert [line.split(maxsplit=1) for line in rest[2:]] == [
        ["threshold", "0.2500, 0.5000"],
        ["dataset_digest", "abc"],
    ]


def test_a_failed_save_leaves_the_earlier_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plot.png"
    path.write_text("earlier")

    def fail(figure: Figure, file: Path, **options: object) -> None:
        file.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(Figure(), path)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_confusion_rows_are_true_classes(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_confusion(torch.tensor([[3, 1], [0, 0]]), ["$5 bill", "_b"], tmp_path / "new" / "c.png")
    axes = drawn[0].axes[0]
    assert pixels(tmp_path / "new" / "c.png").shape[1] > 300
    cells = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "3", (1, 0): "1", (0, 1): "0", (1, 1): "0"}
    assert np.asarray(axes.images[0].get_array()).tolist() == [[0.75, 0.25], [0, 0]]
    assert (axes.get_ylabel(), axes.get_title()) == ("true", "Confusion matrix: 3 of 4 right")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["$5 bill", "_b"]


def test_style_does_not_leak(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plot_confusion(torch.eye(2), ROC_NAMES, tmp_path / "c.png")
    assert dict(mpl.rcParams) == before


def test_binary_roc_marks_the_threshold(tmp_path: Path, drawn: list[Figure]) -> None:
    scores = torch.tensor([0.1, 0.4, 0.6, 0.9, 0.7])
    target = torch.tensor([0, 1, 0, 1, -1])
    plot_roc(torch.stack([1 - scores, scores], 1), target, ROC_NAMES, tmp_path / "r.png", threshold=0.3)
    assert list(lines(drawn[0])) == ["0.750  yes"]
    mark = drawn[0].axes[0].get_lines()[-1]
    assert np.asarray(mark.get_xydata()).tolist() == [[0.5, 1.0]]


def test_roc_of_many_classes(tmp_path: Path, drawn: list[Figure]) -> None:
    p, target = draw(14, rows=280)
    target[target == 13] = -1
    plot_roc(p, target, [f"c{k}" for k in range(14)], tmp_path / "r.png")
    labels = list(lines(drawn[0]))
    assert len(labels) == 13 and labels[-1].endswith("mean of 13")
    areas = [float(label.split()[0]) for label in labels[:-1]]
    assert areas == sorted(areas) and areas[-1] < 1 and "12 smallest areas of 13" in drawn[0].axes[0].get_title()


def test_roc_without_any_curve(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_roc(draw(2)[0], torch.ones(60, dtype=torch.long), ROC_NAMES, tmp_path / "r.png", threshold=0.5)
    assert lines(drawn[0]) == {}


def test_roc_of_labels_leaves_missing_ones_out(tmp_path: Path, drawn: list[Figure]) -> None:
    p = torch.tensor([[0.1, 0.5], [0.9, 0.5], [0.5, 0.5]])
    plot_roc(p, torch.tensor([[0.0, 1.0], [1.0, 1.0], [NAN, NAN]]), ["a", "b"], tmp_path / "r.png")
    assert list(lines(drawn[0])) == ["1.000  a", "1.000  mean of 1"]


def test_reliability_shows_accuracy_gap_and_count_of_each_bin(tmp_path: Path, drawn: list[Figure]) -> None:
    scores = torch.tensor([[0.95], [0.97], [0.99], [0.98], [0.1]])
    binned = reliability("multilabel", scores, torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0]]))
    plot_reliability(binned, tmp_path / "r.png", "probability", "share")
    upper, lower = drawn[0].axes
    accuracy, gap = (bars.patches for bars in upper.containers)
    assert [bar.get_height() for bar in accuracy] == [1.0, 0.5]
    assert [bar.get_height() for bar in gap] == pytest.approx([0.1 - 1, 0.9725 - 0.5])
    assert [bar.get_y() for bar in gap] == [1.0, 0.5]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in accuracy]
    assert middles == pytest.approx([1.5 / BINS, (BINS - 0.5) / BINS])
    assert [bar.get_height() for bar in lower.patches] == [1, 4]
    assert f"calibration error {(0.9 + 4 * 0.4725) / 5:.4f}" in upper.get_title()
    assert (upper.get_ylabel(), lower.get_xlabel()) == ("share", "probability")


def test_reliability_of_nothing(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_reliability(Reliability(*torch.zeros(3, BINS, dtype=torch.float64)), tmp_path / "r.png", "a", "b")
    assert not drawn[0].axes[1].patches and (tmp_path / "r.png").stat().st_size > 0


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def test_curves(tmp_path: Path, drawn: list[Figure]) -> None:
    rows: list[dict[str, object]] = [
        {"phase": "head", "epoch": 0, "step": 10, "train/loss": 1.5, "lr/head": 0.01},
        {"phase": "head", "epoch": 0, "step": 20, "val/loss": 1.25, "val/auroc": 0.75, "val/mae": 3},
        {"phase": "thaw", "epoch": 0, "step": 30, "train/loss": 1.0, "lr/head": 0.0, "lr/backbone": 0.001},
    ]
    write_csv(tmp_path / "metrics.csv", rows)
    plot_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    loss, validation, rates = (lines(drawn[0], k) for k in range(3))
    assert loss["train"].tolist() == [[10, 1.5], [30, 1.0]] and loss["val"].tolist() == [[20, 1.25]]
    assert {name: points.tolist() for name, points in validation.items()} == {"auroc": [[20, 0.75]]}
    assert list(rates) == ["head", "backbone"] and drawn[0].axes[2].get_yscale() == "log"
    assert [(text.get_text(), text.get_position()[0]) for text in drawn[0].axes[0].texts] == [
        ("head", 10),
        ("thaw", 25),
    ]


def test_curves_of_a_regression_and_of_nothing(tmp_path: Path, drawn: list[Figure]) -> None:
    write_csv(tmp_path / "a.csv", [{"phase": "p", "epoch": 0, "step": 1, "val/rmse": 2.0, "val/r2": 0.1}])
    plot_curves(tmp_path / "a.csv", tmp_path / "a.png")
    assert list(lines(drawn[0], 1)) == ["rmse"]
    write_csv(tmp_path / "b.csv", [])
    plot_curves(tmp_path / "b.csv", tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 0


def test_scatter_shows_labelled_rows(tmp_path: Path, drawn: list[Figure]) -> None:
    target = torch.tensor([[1.0, NAN], [2.0, NAN], [NAN, NAN]])
    values = torch.tensor([[1.5, 0.0], [2.5, 0.0], [9.0, 0.0]])
    plot_predictions("regression", values, target, ["age", "height"], tmp_path / "p.png")
    age, height = drawn[0].axes
    assert np.asarray(age.collections[0].get_offsets()).tolist() == [[1, 1.5], [2, 2.5]]
    assert height.get_title() == "height (n = 0)"


def test_bars_of_labels(tmp_path: Path, drawn: list[Figure]) -> None:
    p = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.2, 0.2, 0.5]])
    target = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, NAN, 1.0]])
    plot_predictions("multilabel", p, target, ["easy", "hard", "always"], tmp_path / "p.png")
    axes = drawn[0].axes[0]
    bars = [(text.get_text(), bar.get_width()) for text, bar in zip(axes.get_yticklabels(), axes.patches, strict=True)]
    assert bars == [("hard", 0.5), ("easy", 1.0)]


@pytest.mark.parametrize(("count", "across", "down"), [(1, 1, 1), (7, 3, 3), (0, 1, 1)])
def test_contact_sheet(tmp_path: Path, count: int, across: int, down: int) -> None:
    images = [Image.new("L" if k % 2 else "RGB", (60 + 100 * k, 90), "#808080") for k in range(count)]
    captions = [f"true cat\npred a name that is far too long for its tile {k}" for k in range(count)]
    contact_sheet(images, captions, tmp_path / "s.png", columns=3)
    sheet = pixels(tmp_path / "s.png")
    assert sheet.shape[1] == 12 + across * 204
    assert sheet.shape[0] >= 12 + down * 192
    if count:  # the first tile is grey, its caption dark, and nothing runs into the margin at the right
        assert (sheet[12 + 96, 12 + 96] == 128).all()
        assert sheet[212:250, 12:204].min() < 80
        assert (sheet[:, -12:] == 255).all()


@pytest.mark.parametrize(
    "plot",
    [
        lambda path: plot_confusion(torch.eye(130), [f"class {k}" for k in range(130)], path),
        lambda path: plot_roc(*draw(3), ["_a", "b" * 99, r"$\no$"], path),
    ],
)
def test_awkward_names_draw_without_a_warning(tmp_path: Path, plot: Callable[[Path], None]) -> None:
    plot(tmp_path / "p.png")
    assert pixels(tmp_path / "p.png").shape[1] > 100
