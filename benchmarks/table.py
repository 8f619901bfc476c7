"""The table of `benchmarks/README.md`, from the files in `benchmarks/results/`; and how those are written.

    .venv/bin/python benchmarks/table.py

A file is `<name>-<hardware>.json`: `hardware`, `versions`, `ratios` by name, and `measured`, what they come from.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lit_transfer.files import write_json, write_text

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- made by table.py: begin -->", "<!-- made by table.py: end -->"
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

    def aim(self, device: str) -> str:
        """In words."""
        aim = self.aim_cpu if device == "cpu" else self.aim_gpu
        return "reported" if aim is None else f"{aim:g} or {'more' if self.more_is_better else 'less'}"

    def is_met(self, device: str, value: float) -> bool:
        """Whether a value is as good as the aim, or there is none."""
        aim = self.aim_cpu if device == "cpu" else self.aim_gpu
        return aim is None or (value >= aim if self.more_is_better else value <= aim)


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


def hardware() -> dict[str, Any]:
    """What a benchmark ran on: the GPU if there is one, the processor, the cores it may use, and their memory."""
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": model[1] if model else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9),
        "threads": torch.get_num_threads(),
    }


def write_result(name: str, ratios: Mapping[str, float], measured: Mapping[str, Any]) -> Path:
    """Write what a benchmark found on this machine to `results/`, and print its figures with their aims."""
    machine = hardware()
    short = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    path = RESULTS / f"{name}-{re.sub(r'[^a-z0-9]+', '_', short.lower()).strip('_')}.json"
    versions = {package: version(package) for package in PACKAGES}
    write_json(path, {"hardware": machine, "versions": versions, "ratios": ratios, "measured": measured})
    for figure in FIGURES:
        if figure.name in ratios:
            print(f"{figure.name} {ratios[figure.name]:.4g} (aim {figure.aim('gpu' if machine['gpu'] else 'cpu')})")
    return path


def machines(folder: Path) -> dict[str, dict[str, Any]]:
    """What was found on each machine, by the name of its files: `hardware`, and the `ratios` of all its files."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*-*.json")):
        result = json.loads(path.read_text())
        machine = found.setdefault(path.stem.partition("-")[2], {"hardware": result["hardware"], "ratios": {}})
        machine["ratios"] |= result["ratios"]
    return found


def table(folder: Path) -> str:
    """All figures in Markdown: a row each, and a column with its aims and one for each machine."""
    columns = machines(folder)
    names = [_title(machine["hardware"]) for machine in columns.values()]
    lines = [
        "| | " + " | ".join(["aim, CPU", "aim, GPU", *names]) + " |",
        "| --- |" + " --- |" * 2 + " ---: |" * len(names),
    ]
    for figure in FIGURES:
        cells = [_cell(figure, machine) for machine in columns.values()]
        lines.append(
            f"| {figure.what} `[{figure.name}]` | " + " | ".join([figure.aim("cpu"), figure.aim("gpu"), *cells]) + " |"
        )
    return "\n".join(lines)


def _title(machine: Mapping[str, Any]) -> str:
    return str(machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores")


def _cell(figure: Figure, machine: Mapping[str, Any]) -> str:
    value = machine["ratios"].get(figure.name)
    if value is None:
        return "not measured"
    is_met = figure.is_met("gpu" if machine["hardware"]["gpu"] else "cpu", value)
    return f"{value:.3g}" if is_met else f"{value:.3g} (missed)"


def with_table(page: str, folder: Path) -> str:
    """A page with the table between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(folder)}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Put the table into README.md, and print it."""
    page = HERE / "README.md"
    write_text(page, with_table(page.read_text(), RESULTS))
    print(table(RESULTS))


if __name__ == "__main__":
    main()
