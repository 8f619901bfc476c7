"""What augmentation by stored views costs: accuracy, ROC AUC and time on the quickstart's solar cells.

    .venv/bin/python benchmarks/views.py [--jobs 2] [--seeds 0 1 2] [--config FILE] [--section.key VALUE ...]

Needs `make quickstart`'s dataset. The same recipe is trained with `activations.views` 1, 4, 8 and d4, and with pictures
drawn anew in each epoch, which no store can hold (`activations.store: off`): everything else is the same. Unless
changed it is the quickstart at 192 pixels, thawed from blocks.5 for 8 epochs, so that 15 runs need no GPU. Of k views
epoch e of the run takes view e modulo k. The head's epoch is epoch 0, so with 8 views the thawed epochs 1 to 8 have
the training pictures of `drawn`, but for epoch 8, which has those of epoch 0 again.

Each run has a process and an empty store of its own. Its seconds are those of its phases, building the store included
and the evaluation at the end not; `building` is what passed in a phase until the store could be read: deciding how to
compute, computing, writing and checking. A run that is finished is not run again, one that was cut off begins anew.
The result goes to benchmarks/results/views-<hardware>.json, and a picture of it to views-<hardware>.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from processes import at_a_time, threads_each
from table import RESULTS, VIEW_FIGURES, hardware, views_table, write_result

from lit_transfer import launch
from lit_transfer.config import Config
from lit_transfer.errors import require
from lit_transfer.files import write_json
from lit_transfer.launch import train
from lit_transfer.phases import run
from lit_transfer.phases.stored import Stored, open_stored
from lit_transfer.reading import load, to_plain
from lit_transfer.report.plots import COLOURS, STYLE, save_figure

Row = dict[str, float]  # of a run: its seed and figures

RECIPE = ["--phases.thaw_from", "blocks.5", "--phases.thaw_epochs", "8", "--image.size", "192"]
VIEWS = {f"views {views}": ["--activations.store", "require", "--activations.views", views] for views in "148"}
VIEWS["views d4"] = ["--activations.store", "require", "--activations.views", "d4"]
VIEWS["drawn"] = ["--activations.store", "off", "--activations.views", "null"]
LOOKS = [*zip("os^Dv", COLOURS, strict=False)]


@dataclass(frozen=True)
class Trial:
    """A run of the comparison.

    Args:
        setting: a key of `VIEWS`.
        seed: of the run.
        folder: all that it leaves.
        arguments: of `lit-transfer train`.
        jobs: runs at a time.
    """

    setting: str
    seed: int
    folder: Path
    arguments: list[str]
    jobs: int

    def conditions(self) -> dict[str, Any]:
        """All that decides its figures, as plain values."""
        config = to_plain(load(self.arguments[1], self.arguments[2:], Config))
        return {"hardware": hardware(), "jobs": self.jobs, "config": config}


def trials_of(config: Path, folder: Path, seeds: Sequence[int], changes: Sequence[str], jobs: int) -> list[Trial]:
    """All runs, the settings of a seed beside each other: what else the machine does then touches all of them."""
    found = []
    for seed in seeds:
        for setting, views in VIEWS.items():
            own = folder / f"{setting.replace(' ', '_')}-seed_{seed}"
            arguments = ["--config", str(config), *RECIPE, "--tracking.wandb", "off", "--trainer.progress", "false"]
            arguments += ["--trainer.devices", "1", *changes, "--seed", str(seed), "--runs_dir", str(own)]
            arguments += ["--name", "run", "--activations.folder", str(own / "activations"), *views]
            found.append(Trial(setting, seed, own, arguments, jobs))
    return found


def finished(trial: Trial) -> Row | None:
    """Figures of a trial that was trained before, or None.

    Raises:
        UserError: its folder holds one under other conditions.
    """
    path = trial.folder / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    require(
        result["conditions"] == json.loads(json.dumps(trial.conditions())),
        f"{trial.folder} has figures of other settings, jobs or hardware; remove it, or name another --folder.",
    )
    figures: Row = result["figures"]
    return figures


def figures_of(trial: Trial) -> Row:
    """Of a trial; trained unless that is done."""
    figures = finished(trial)
    if figures is None:
        shutil.rmtree(trial.folder, ignore_errors=True)  # what was cut off: its seconds would not be whole
        figures = {"seed": trial.seed, **_trained(trial)}
        write_json(trial.folder / "result.json", {"conditions": trial.conditions(), "figures": figures})
        shutil.rmtree(trial.folder / "activations", ignore_errors=True)
    return figures


def _trained(trial: Trial) -> Row:
    """Train in this process; what is printed goes to `log.txt`."""
    trial.folder.mkdir(parents=True)
    building: list[float] = []
    opening = mock.patch.object(run, "open_stored", partial(_timed, building))
    with opening, (trial.folder / "log.txt").open("w") as log, redirect_stdout(log):
        status = train.main(trial.arguments)
    if status:
        sys.exit(status)
    summary = json.loads((trial.folder / "run" / "summary.json").read_text())
    found = {name: summary[key] for name, (_, key, _) in VIEW_FIGURES.items() if key}
    return found | {"building_s": sum(building)}


@contextmanager
def _timed(building: list[float], *args: Any) -> Iterator[Stored]:
    start = time.perf_counter()
    with open_stored(*args) as stored:
        building.append(time.perf_counter() - start)
        yield stored


@STYLE
def plot_views(runs: dict[str, list[Row]], path: Path) -> None:
    """Accuracy and ROC AUC on the test part against seconds: mean and range; hollow, the seconds less building."""
    figure = Figure(figsize=(11, 4.4))
    for axes, name in zip(figure.subplots(1, 2), ("accuracy", "auroc"), strict=True):
        for (marker, colour), (setting, rows) in zip(LOOKS, runs.items(), strict=True):
            _draw(axes, rows, name, marker, colour, setting)
        axes.set(xlabel="seconds of training (hollow: less building the store)", xlim=(0, None))
        axes.set_title(f"{VIEW_FIGURES[name][0]}: mean and range over seeds")
        axes.margins(y=0.12)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    save_figure(figure, path)


def _draw(axes: Axes, rows: Sequence[Row], name: str, marker: str, colour: str, label: str) -> None:
    seconds, values = [row["seconds"] for row in rows], [row[name] for row in rows]
    x, y = statistics.mean(seconds), statistics.mean(values)
    once_built = x - statistics.mean(row["building_s"] for row in rows)
    axes.plot([once_built, x], [y, y], ":", color=colour, lw=1.2)
    axes.plot(once_built, y, marker, color=colour, mfc="white", ms=7)
    x_range, y_range = ([[mean - min(v)], [max(v) - mean]] for mean, v in ((x, seconds), (y, values)))
    axes.errorbar(x, y, xerr=x_range, yerr=y_range, fmt=marker, ms=7, color=colour, lw=1.6, label=label)


def main(argv: Sequence[str]) -> int:
    """Train what is not trained yet, print the table, write the result and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the threads")
    parser.add_argument("--folder", type=Path, default=Path("runs/views"), help="of the runs")
    options, changes = parser.parse_known_args(argv)
    trials = trials_of(options.config, options.folder, options.seeds, changes, options.jobs)
    print(f"{sum(finished(trial) is not None for trial in trials)} of {len(trials)} runs are done", flush=True)
    runs: dict[str, list[Row]] = {setting: [] for setting in VIEWS}
    for trial, figures in zip(trials, at_a_time(options.jobs, figures_of, trials), strict=True):
        runs[trial.setting].append(figures)
        print(f"{trial.setting}, seed {trial.seed}: {figures}", flush=True)
    threads = threads_each(options.jobs)
    measured = {"config": str(options.config), "changes": [*RECIPE, *changes], "jobs": options.jobs}
    plot_views(runs, RESULTS / f"views-{hardware()}.png")
    write_result("views", {}, measured | {"threads": threads, "runs": runs})
    print(views_table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(launch.run(main, sys.argv[1:]))
