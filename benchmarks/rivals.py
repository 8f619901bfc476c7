"""How long until the validation AUC on ELPV is 0.93? Ours and four rivals, from the same weights and pictures.

    .venv/bin/python benchmarks/rivals.py [--settings default|grid] [--only NAME ...] [--folder runs/rivals]

Needs `make quickstart`'s dataset. lit_transfer trains as --config says, with an empty activation store. The rivals
(`rivals_programs.py`) have its network, weights, pictures, resolution, batch, flips and turns, number of workers, and a
validation after each epoch. The clock runs from the end of the imports, before a picture or weight is read, to the end
of the validation that reaches the aim; building our store is on it. A rival has --limit times as long as lit_transfer
took and to the end of that epoch; if it is not there then, its ratio is a lower bound.

- BackboneFinetuning: Lightning's callback at its defaults; Adam over the head at 1e-3.
- finetuning-scheduler: the schedule that it makes by itself; the same Adam, at most 1e-5 for what it thaws.
- fastai: `vision_learner`, with its own head, and `fine_tune(8)` at 2e-3; again and again.
- timm: all of the network from the start; AdamW at 1e-3 x sqrt(batch / 256), a cosine of 8 epochs; again and again.

`--settings grid` adds three times and a third of all of a tool's learning rates, for ours, too. The figure is the
smallest ratio of a rival to lit_transfer: at defaults, and at the best of the grid once all of it is there. A finished
run is a file in --folder and is not run again: to measure a changed tool, remove its files. Runs go one at a time, the
tools in turns. The result goes to benchmarks/results/rivals-<hardware>.json once all defaults are there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rivals_runs import GRID, OURS, RIVALS, Record, Runs, comparable_setup, task_of
from table import shown, write_result

from lit_transfer.errors import UserError, require

AUC = 0.93
FIGURE = "time_to_auc_093_worst_rival"


@dataclass(frozen=True)
class Timing:
    """What a tool took at a setting: medians over seeds.

    Args:
        seconds: to the aim; infinite where it was not reached.
        ended_s: of the last validation; where the aim was not reached by then, it takes longer.
        best_auc: of all validations.
    """

    seconds: float
    ended_s: float
    best_auc: float

    @property
    def known_s(self) -> float:
        """It took these seconds, or at least these."""
        return self.seconds if math.isfinite(self.seconds) else self.ended_s


@dataclass(frozen=True)
class Ratio:
    """A rival's seconds over ours; at least that where the rival did not get there."""

    value: float
    is_bound: bool


Timings = dict[str, dict[str, Timing]]
"""By tool and setting."""


def timing(records: Sequence[Record], auc: float) -> Timing:
    """Of the runs of one tool at one setting, one a seed."""
    last = [record["curve"][-1] for record in records]
    return Timing(
        seconds=statistics.median(seconds if reached >= auc else math.inf for seconds, reached in last),
        ended_s=statistics.median(seconds for seconds, _ in last),
        best_auc=statistics.median(max(value for _, value in record["curve"]) for record in records),
    )


def timings(runs: Runs, seeds: Sequence[int]) -> Timings:
    """Of all settings that were run with every seed."""
    found: Timings = {tool: {} for tool in (OURS, *RIVALS)}
    for tool, settings in found.items():
        for setting in GRID:
            records = [record for seed in seeds if (record := runs.read(tool, setting, seed))]
            if len(records) == len(seeds):
                settings[setting] = timing(records, runs.task["auc"])
    return found


def ratio(rival: Timing, ours: Timing) -> Ratio:
    """Of two timings; ours got there."""
    return Ratio(rival.known_s / ours.seconds, is_bound=not math.isfinite(rival.seconds))


def best(settings: dict[str, Timing]) -> Timing:
    """The soonest; one that was not there by its limit may have come right behind it."""
    return min(settings.values(), key=lambda one: one.known_s)


def ratios(found: Timings) -> dict[str, dict[str, Ratio]]:
    """By rival: at `default`, and at the `best` of the grid where both it and ours have all of it.

    Raises:
        UserError: ours did not reach the aim.
    """
    ours, compared = found[OURS], {}
    reached = math.isfinite(ours["default"].seconds)
    require(reached, f"{OURS} did not reach the aim, its best is {ours['default'].best_auc:.4f}; change --config.")
    for rival in RIVALS:
        theirs = found[rival]
        compared[rival] = {"default": ratio(theirs["default"], ours["default"])}
        if len(theirs) == len(ours) == len(GRID):
            compared[rival]["best"] = ratio(best(theirs), best(ours))
    return compared


def report(found: Timings, task: Record, options: dict[str, Any]) -> None:
    """Write the result file, which says what is only a bound and what the grid lacks."""
    compared = ratios(found)
    named = {f"{rival}, {kind}": one for rival, kinds in compared.items() for kind, one in kinds.items()}
    worst = min(named, key=lambda name: named[name].value)
    lacking = [f"{tool}, {setting}" for tool in found for setting in GRID if setting not in found[tool]]
    measured = {
        "worst": worst,
        "ratios": {name: asdict(one) for name, one in named.items()},
        "timings": {tool: {name: asdict(one) for name, one in found[tool].items()} for tool in found},
        "grid lacks": lacking,
        "learning rates times": GRID,
        "task": task,
        "options": options,
    }
    for name, one in named.items():
        print(f"{name} / {OURS}: {'at least ' if one.is_bound else ''}{shown(one.value)}")
    if lacking:
        print(f"the grid lacks {'; '.join(lacking)}")
    bounds = [FIGURE] if named[worst].is_bound else []
    write_result("rivals", {FIGURE: named[worst].value}, measured, bounds)


def table(found: Timings) -> str:
    """All timings in plain text."""
    lines = [f"{'':<22}{'learning rates':<16}{'seconds':>18}{'best AUC':>10}"]
    for tool, settings in found.items():
        for setting, one in settings.items():
            seconds = f"{one.seconds:.1f}" if math.isfinite(one.seconds) else f"not in {one.ended_s:.0f}"
            lines.append(f"{tool:<22}{setting:<16}{seconds:>18}{one.best_auc:>10.4f}")
    return "\n".join(lines)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"), help="of lit_transfer")
    parser.add_argument("--folder", type=Path, default=Path("runs/rivals"), help="of the runs")
    parser.add_argument("--only", nargs="+", choices=(OURS, *RIVALS), default=(OURS, *RIVALS), help="tools to run")
    parser.add_argument("--settings", choices=("default", "grid"), default="default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="figures are medians over them")
    parser.add_argument("--limit", type=float, default=5.0, help="of a rival, times what ours took; at least 1")
    parser.add_argument("--limit_s", type=float, help="the same in seconds, in its place")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the pictures; nothing is written below 1")
    parser.add_argument("--auc", type=float, default=AUC, help="the aim; nothing is written for another one")
    options = parser.parse_args()
    require(options.limit >= 1, f"--limit {options.limit} would end a rival before ours; give 1 or more.")
    return options


def main() -> int:
    """Train what is not done yet, print the table, and write the figure once all defaults are there."""
    options = read_options()
    setup = comparable_setup(options.config, options.fraction)
    runs = Runs(options.folder, setup, task_of(setup, options.auc), options.limit, options.limit_s)
    for seed in options.seeds:
        for setting in GRID if options.settings == "grid" else ["default"]:
            for tool in (OURS, *RIVALS):
                if tool in options.only:
                    runs.run(tool, setting, seed)
    found = timings(runs, options.seeds)
    print(table(found))
    if options.auc == AUC and options.fraction == 1 and all("default" in settings for settings in found.values()):
        report(found, runs.task, {key: str(value) for key, value in vars(options).items()})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
