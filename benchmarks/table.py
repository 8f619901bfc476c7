"""The tables of `benchmarks/README.md`, from the files in `benchmarks/results/`; and how those are written.

    .venv/bin/python benchmarks/table.py

A file is `<name>-<hardware>.json`: `hardware`, `versions`, the `commit` that wrote it, `ratios` by name, and what they
come from, `measured`; `lower_bounds` names the ratios that may be higher. That of `views.py` has no ratios, but a table
of its own.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lit_transfer.files import write_json, write_text
from lit_transfer.tracking import commit

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- made by table.py: begin -->", "<!-- made by table.py: end -->"
ELPV_BEGIN, ELPV_END = "<!-- elpv, made by table.py: begin -->", "<!-- elpv, made by table.py: end -->"
VIEWS_BEGIN, VIEWS_END = "<!-- views, made by table.py: begin -->", "<!-- views, made by table.py: end -->"
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "timm", "pillow", "scikit-learn")


@dataclass(frozen=True)
class Figure:
    """A figure to report.

    Args:
        name: in the files.
        what: for people.
        aim_cpu: at least, or at most; None is none.
        aim_gpu: the same.
        more_is_better: which of the two.
    """

    name: str
    what: str
    aim_cpu: float | None
    aim_gpu: float | None
    more_is_better: bool = True

    def aim(self, machine: str) -> str:
        """In words, for a machine as `hardware` names it."""
        aim = self._aim(machine)
        return "reported" if aim is None else f"{aim:g} or {'more' if self.more_is_better else 'less'}"

    def is_met(self, machine: str, value: float) -> bool:
        """Whether a value is as good as the aim, or there is none."""
        aim = self._aim(machine)
        return aim is None or (value >= aim if self.more_is_better else value <= aim)

    def _aim(self, machine: str) -> float | None:
        return self.aim_cpu if machine.startswith("cpu-") else self.aim_gpu


FIGURES = (
    Figure("frozen_phase_20_epochs", "frozen phase of 20 epochs, without / with the store, building included", 18, 15),
    Figure("stored_epoch", "training steps of an epoch, without / with the store, once built", 500, 100),
    Figure("loop_over_bare", "training steps of a stored epoch, our loop / a bare loop", 1.25, 1.25, False),
    Figure("heads_16_over_1", "16 heads at once / one head", 2.0, 1.2, False),
    Figure("prefix_forward", "prefix forward in steady state, fp32 eager / ours", 3, 4),
    Figure("thawed_step_over_parts", "thawed step with a stored prefix / its parts, the worst stage", 1.15, 1.3, False),
    Figure("build_efficiency", "building the store / what decoding and the forward pass allow", 0.92, 0.90),
    Figure("time_to_auc_093_worst_rival", "time to validation AUC 0.93 on ELPV, the fastest rival / ours", 5, 3),
    Figure("peak_memory", "peak memory of a frozen phase, without / with the store", None, None),
    Figure("elpv_accuracy", "accuracy on ELPV over 5 splits, all cells", 0.8842, 0.8842),
    Figure("elpv_auroc", "area under the ROC curve on ELPV over 5 splits, all cells", 0.9442, 0.9442),
)


VIEW_FIGURES = {  # name: for people, the key of a run's summary, and digits to show
    "accuracy": ("test accuracy", "test/accuracy", 4),
    "auroc": ("test ROC AUC", "test/auroc", 4),
    "val_auroc": ("validation ROC AUC", "val/auroc", 4),
    "seconds": ("seconds in all", "seconds/total", 0),
    "building_s": ("of them building", None, 0),
}


CELL_TYPES = ("all", "mono", "poly")
ELPV_FIGURES = {"accuracy": "accuracy", "auroc": "ROC AUC", "f1": "F1, mean of both classes"}
PUBLISHED = (  # name, cells, split, accuracy, ROC AUC; as their authors or later papers give them
    ("Deitsch 2019, VGG-19 at 300 pixels", "2,624", "75/25", "0.8842", "0.9442"),
    ("Deitsch 2019, KAZE/VGG features, SVM", "2,624", "75/25", "0.8244", "0.8851"),
    ("Akram 2019, light CNN", "2,624", "75/25", "0.9302", "-"),
    ("Zhang 2023, searched, 1.85 M weights", "not stated", "not stated", "0.9174", "-"),
    ("Wang 2023, ResNet152 and Xception", "2,223 sure ones", "80/20", "0.9617", "-"),
    ("Demirci 2024, VGG-16, weighted loss", "2,223 sure ones", "5 folds", "0.9154", "-"),
)


def hardware() -> str:
    """What a benchmark runs on, fit for a file's name: the GPU, or `cpu`, the processor and the cores it may use."""
    if torch.cuda.is_available():
        return _slug(torch.cuda.get_device_name())
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"cpu-{_slug(model[1] if model else platform.machine())}-{len(os.sched_getaffinity(0))}-cores"


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def write_result(
    name: str, ratios: Mapping[str, float], measured: Mapping[str, Any], lower_bounds: Sequence[str] = ()
) -> Path:
    """Write what a benchmark found on this machine to `results/`, and print its figures with their aims."""
    unknown = set(ratios) - {figure.name for figure in FIGURES}
    assert not unknown, f"{unknown} are in no row of the table"
    machine = hardware()
    path = RESULTS / f"{name}-{machine}.json"
    versions = {package: version(package) for package in PACKAGES}
    about = {"hardware": machine, "versions": versions, "commit": commit()}
    write_json(path, about | {"ratios": ratios, "lower_bounds": lower_bounds, "measured": measured})
    for figure in FIGURES:
        if figure.name in ratios:
            told = _cell(figure, machine, (ratios[figure.name], figure.name in lower_bounds))
            print(f"{figure.name} {told}; aim {figure.aim(machine)}")
    return path


def shown(value: float) -> str:
    """Of 4 digits that count."""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.4g}".rstrip(".")


def machines(folder: Path) -> dict[str, dict[str, tuple[float, bool]]]:
    """The ratios of all files of each machine, each with whether it is but a lower bound."""
    found: dict[str, dict[str, tuple[float, bool]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        for name, value in result["ratios"].items():
            found.setdefault(result["hardware"], {})[name] = (value, name in result.get("lower_bounds", []))
    return found


def table(folder: Path) -> str:
    """All figures in Markdown: a row each, with its aims and a column for each machine."""
    columns = machines(folder)
    lines = [_row("", "aim, CPU", "aim, GPU", *columns), _row("---", "---", "---", *("---:" for _ in columns))]
    for figure in FIGURES:
        cells = [_cell(figure, machine, ratios.get(figure.name)) for machine, ratios in columns.items()]
        lines.append(_row(f"{figure.what} `[{figure.name}]`", figure.aim("cpu-"), figure.aim("gpu"), *cells))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(figure: Figure, machine: str, ratio: tuple[float, bool] | None) -> str:
    if ratio is None:
        return "not measured"
    value, is_bound = ratio
    text, fault = (f"at least {shown(value)}", "not shown to be met") if is_bound else (shown(value), "missed")
    return text if figure.is_met(machine, value) else f"{text} ({fault})"


def elpv_tables(folder: Path) -> str:
    """The published protocol on each machine, in Markdown."""
    parts = []
    for path in sorted(folder.glob("elpv-*.json")):
        result = json.loads(path.read_text())
        parts += [f"On {result['hardware']}:", elpv_table(result["measured"]["splits"])]
    return "\n\n".join(parts) or "Not measured."


def elpv_table(splits: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: mean and standard deviation over splits of ours, then what others report."""
    titles = ELPV_FIGURES.values()
    lines = [_row("", "cells", "split", *titles), _row("---", "---", "---", *("---:" for _ in titles))]
    for how, name in (("single", "EfficientNet-Lite0"), ("averaged", "the same, averaged over 8 views")):
        for kind in CELL_TYPES:
            values = [[split[how][kind][figure] for split in splits] for figure in ELPV_FIGURES]
            lines.append(_row(name, kind, f"75/25, {len(splits)} times", *(_mean_and_deviation(v) for v in values)))
    return "\n".join([*lines, *(_row(*row, "-") for row in PUBLISHED)])


def _mean_and_deviation(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} +- {deviation:.4f}"


def views_tables(folder: Path) -> str:
    """What views cost on each machine: its table in Markdown, and its picture."""
    parts = []
    for path in sorted(folder.glob("views-*.json")):
        result = json.loads(path.read_text())
        picture = f"![Test figures of views against seconds](results/{path.stem}.png)"
        parts += [f"On {result['hardware']}:", views_table(result["measured"]["runs"]), picture]
    return "\n\n".join(parts) or "Not measured."


def views_table(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """In Markdown, a row each setting: mean (least to most) of its runs."""
    titles = [title for title, _, _ in VIEW_FIGURES.values()]
    lines = [_row("", "seeds", *titles), _row("---", "---:", *("---:" for _ in titles))]
    for setting, rows in runs.items():
        cells = [_range([row[name] for row in rows], digits) for name, (_, _, digits) in VIEW_FIGURES.items()]
        lines.append(_row(setting, str(len(rows)), *cells))
    return "\n".join(lines)


def _range(values: Sequence[float], digits: int) -> str:
    mean, least, most = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"


def with_tables(page: str, folder: Path) -> str:
    """A page with all tables between their marks."""
    page = _between(page, BEGIN, END, table(folder))
    page = _between(page, ELPV_BEGIN, ELPV_END, elpv_tables(folder))
    return _between(page, VIEWS_BEGIN, VIEWS_END, views_tables(folder))


def _between(page: str, begin: str, end: str, text: str) -> str:
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Put the tables into README.md, and print that of figures."""
    page = HERE / "README.md"
    write_text(page, with_tables(page.read_text(), RESULTS))
    print(table(RESULTS))


if __name__ == "__main__":
    main()
