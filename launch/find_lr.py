"""`lit-transfer find-lr --config FILE [--phase NAME] [--section.key VALUE ...]`: find a phase's learning rates.

--phase NAME  the phase to test, by default the first; those before it must have been trained
--steps N     steps of the test, 100 by default
--from LR     the head's rate at the first step, 1e-7 by default
--to LR       and at the last, 10 by default

The rates grow from step to step, all in the ratio that the config gives them, until the loss is
4 times its lowest. Neither weights nor the run directory change; a picture is written beside it,
as runs_dir/NAME_PHASE_lr.png.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from lit_transfer.config import Config
from lit_transfer.errors import nearest, require
from lit_transfer.launch import run as run_verb
from lit_transfer.launch.options import Parser, read_config
from lit_transfer.launch.train import fingerprint_of, prepare_setup
from lit_transfer.model.module import Stopped
from lit_transfer.phases.lr_finder import (
    RangeTest,
    config_rates,
    growing_rates,
    load_weights_before,
    range_test,
    results_before,
)
from lit_transfer.phases.table import PhasePlan
from lit_transfer.report import plot_range_test, table


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 130 when a signal stopped the test."""
    parser = Parser(prog="lit-transfer find-lr", add_help=False, allow_abbrev=False)
    parser.add_argument("--phase")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--from", type=float, default=1e-7, dest="low")
    parser.add_argument("--to", type=float, default=10.0, dest="high")
    own, rest = parser.parse_known_args(argv)
    config: Config = read_config(rest or argv, "lit-transfer find-lr", __doc__)
    rates = growing_rates(own.low, own.high, own.steps)

    setup, plans = prepare_setup(config)
    index = index_of(own.phase, plans)
    before = results_before(config.run_dir, plans[:index], fingerprint_of(setup, plans[:index]))
    load_weights_before(setup, config.run_dir, before)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        test = range_test(setup, plans[index], before, rates)
    except Stopped:
        return 130 if is_first else 0
    if is_first:
        path = Path(config.runs_dir) / f"{config.name}_{plans[index].phase.name}_lr.png"
        plot_range_test(test, path)
        print(described(config, plans[index], test))
        print(f"the picture is {path}", file=sys.stderr)
    return 0


def index_of(name: str | None, plans: Sequence[PhasePlan]) -> int:
    """The place of a phase in the table; the first by default."""
    names = [plan.phase.name for plan in plans]
    require(
        name is None or name in names,
        f"--phase '{name}' is not a phase of this config; there are {', '.join(names)}.{nearest(name or '', names)}",
    )
    return names.index(name) if name else 0


def described(config: Config, plan: PhasePlan, test: RangeTest) -> str:
    """What the test saw as a table of rates and losses, and what to write in the config."""
    last = len(test.losses) - 1
    places = {"first step": 0, "suggestion": test.suggested, "lowest loss": test.lowest, "last step": last}
    rows = [
        {"at": name}
        | {key: f"{rate:.2g}" for key, rate in config_rates(plan.phase, test.rates[step] / test.planned).items()}
        | {"smoothed loss": test.smoothed[step]}
        for name, step in places.items()
        if step is not None
    ]
    why = "" if last + 1 == test.steps else ": the loss had grown to 4 times its lowest, or was no number"
    return f"{table(rows)}\n{last + 1} of {test.steps} steps were done{why}\n\n{advice(config, plan, test)}"


def advice(config: Config, plan: PhasePlan, test: RangeTest) -> str:
    """The suggestion as it stands in a config, or why there is none."""
    if test.suggested is None:
        return (
            "no suggestion: the loss does not clearly fall anywhere; look at the picture, and try\n"
            "more --steps, a higher --to, or a larger global_batch"
        )
    rates = config_rates(plan.phase, test.rates[test.suggested] / test.planned)
    plain = {key: float(f"{rate:.2g}") for key, rate in rates.items()}
    keys = plain if plan.phase.head_lr or plan.phase.backbone_lr else {"train": {"params": plain}}
    is_list = isinstance(config.phases, list)
    where = (
        "under phases:" if is_list else "as phases: (lit-transfer plan --expand prints all that the preset stands for)"
    )
    text = yaml.safe_dump([{"name": plan.phase.name} | keys], sort_keys=False)
    return f"The loss falls fastest at the suggestion; in the config, {where}\n{text.rstrip()}"


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
