"""The picture of what the store is worth shows the numbers that were measured, and they survive their file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_transfer.activations.costs import CutCost, Weighing
from lit_transfer.activations.prefix import Recipe
from lit_transfer.phases.choice import Choice
from lit_transfer.report.cuts import plot_cuts

SHALLOW = CutCost("blocks.0", 3.0, 20.0, 40.0, 348_000_000, 348_000_000, chosen=False)
MIDDLE = CutCost("top", 0.0, 2.0, 10.0, 14_000_000, 0, chosen=False)
DEEP = CutCost("head", 8.0, 0.25, 0.0, 1_100_000, 1_100_000, chosen=True)
WEIGHED = Weighing(8660, 48.0, 2e8, (SHALLOW, MIDDLE, DEEP))
WHY = "reads stored activations; at head: building 8 s, which saves 48 s of this and later phases"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look into."""
    figures: list[Figure] = []
    monkeypatch.setattr("lit_transfer.report.cuts.save_figure", lambda figure, path: figures.append(figure))
    return figures


def spans(axes: Axes) -> list[list[tuple[float, float]]]:
    """Start and length of each cut's bar, a list for each kind of bar."""
    return [[(bar.get_x(), bar.get_width()) for bar in bars] for bars in axes.containers]


def told(axes: Axes) -> list[str]:
    """Texts beside bars."""
    return [text.get_text() for text in axes.texts]


def test_times_of_each_cut_stand_end_to_end_against_computing(drawn: list[Figure]) -> None:
    plot_cuts(WEIGHED, "first", WHY, Path("unused.png"))
    times = drawn[0].axes[0]
    assert spans(times) == [[(0, 3), (0, 0), (0, 8)], [(3, 20), (0, 2), (8, 0.25)], [(23, 40), (2, 10), (8.25, 0)]]
    assert told(times) == ["63 s", "12 s", "8.2 s  chosen"]
    assert [list(line.get_xdata()) for line in times.get_lines()] == [[48, 48]]
    assert [(label.get_text(), label.get_fontweight()) for label in times.get_yticklabels()] == [
        ("blocks.0", "normal"),
        ("top", "normal"),
        ("head", "bold"),
    ]
    assert drawn[0].get_suptitle().replace("\n", " ") == f"Phase first {WHY}"
    assert "computing in each epoch: 48 s" in [text.get_text() for text in drawn[0].legends[0].get_texts()]


def test_a_cut_that_this_phase_alone_would_not_choose_is_said_to_be_shared(drawn: list[Figure]) -> None:
    for compute_s in (48.0, 5.0):
        plot_cuts(replace(WEIGHED, compute_s=compute_s), "first", WHY, Path("unused.png"))
    alone, shared = (figure.axes[0].get_title() for figure in drawn)
    assert alone == "Time of this phase with each cut"
    assert shared == f"{alone}; later phases share the chosen one"


def test_bytes_of_each_cut_stand_against_the_room(drawn: list[Figure]) -> None:
    plot_cuts(WEIGHED, "first", WHY, Path("unused.png"))
    sizes = drawn[0].axes[1]
    assert [width for _, width in spans(sizes)[0]] == pytest.approx([348, 14, 1.1])
    assert (sizes.get_xlabel(), sizes.get_title()) == ("MB", "Records; room for 200 MB")
    assert told(sizes) == ["348 MB, no room", "14 MB, there", "1.1 MB"]


def test_a_phase_that_computes_has_no_chosen_cut(drawn: list[Figure]) -> None:
    plot_cuts(replace(WEIGHED, cuts=(SHALLOW, MIDDLE)), "first", WHY, Path("unused.png"))
    assert not any("chosen" in text for text in told(drawn[0].axes[0]))
    assert "computing in each epoch, chosen: 48 s" in [text.get_text() for text in drawn[0].legends[0].get_texts()]


@pytest.mark.parametrize("cuts", [(DEEP,), (SHALLOW,) * 40])
def test_it_is_a_picture_with_one_cut_and_with_many(cuts: tuple[CutCost, ...], tmp_path: Path) -> None:
    plot_cuts(Weighing(1, 1e-3, -5.0, cuts), "$first$", WHY * 3, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").stat().st_size > 10_000


def test_a_decision_and_its_numbers_survive_json() -> None:
    choice = Choice(9, (7,), Recipe(device="cpu", batch=32, bf16_from="blocks.1"), WHY, WEIGHED)
    assert Choice.from_plain(json.loads(json.dumps(choice.to_plain()))) == choice


def test_a_decision_of_an_earlier_version_has_no_numbers() -> None:
    plain = Choice(None, (), None, WHY, WEIGHED).to_plain()
    del plain["weighed"]
    assert Choice.from_plain(plain) == Choice(None, (), None, WHY, None)
