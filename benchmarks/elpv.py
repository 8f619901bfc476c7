"""Solar cells by the published protocol: accuracy, ROC AUC and F1 over five splits, beside what papers report.

    .venv/bin/python benchmarks/elpv.py [--jobs 2] [--config configs/elpv.yaml] [--section.key VALUE ...]

Deitsch et al. 2019: all 2,624 cells, defective where the defect probability is over 0.5; a quarter is held out,
stratified by probability and cell type. Here the split seeds 0 to 4 are fixed beforehand. An eighth of the other three
quarters is the validation part, on which the threshold is chosen, and the epoch where the config has `restore_best`;
nothing is fitted on or chosen by the held-out part. `averaged` has the probabilities of the 8 flips and quarter turns
of a cell averaged, its threshold chosen on validation in the same way. A run that is finished is not run again. The
result goes to benchmarks/results/elpv-<hardware>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from processes import at_a_time
from table import CELL_TYPES, ELPV_FIGURES, elpv_table, write_result
from torch import Tensor

from lit_transfer.activations.views import turned
from lit_transfer.config import Config
from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.plan import Batch
from lit_transfer.data.streams import Samples, open_stream
from lit_transfer.model.augment import eval_input
from lit_transfer.model.memory import keep_freed_memory
from lit_transfer.model.portable import TransferModel
from lit_transfer.model.portable import load as load_model
from lit_transfer.objectives.decisions import choose_threshold
from lit_transfer.objectives.metrics import metrics
from lit_transfer.reading import load

PROGRAM = str(Path(sys.executable).parent / "lit-transfer")


def trained(seed: int, config: Path, folder: Path, changes: list[str]) -> Path:
    """The run directory of a split; packed and trained unless that is done."""
    data, name = folder / f"data-{seed}", f"split-{seed}"
    splits = ["--stratify", "[type, probability]", "--splits", "{train: 0.656, val: 0.094, test: 0.25}"]
    if not (data / "manifest.arrow").is_file():
        packing = ["--config", "configs/data/elpv.yaml", "--out", str(data), "--split_seed", str(seed), *splits]
        subprocess.run([PROGRAM, "prepare", *packing], check=True, stdout=subprocess.DEVNULL)
    streams = [part for split in ("train", "val", "test") for part in (f"--data.{split}.manifest", str(data))]
    command = ["--config", str(config), "--name", name, "--runs_dir", str(folder / "runs"), "--seed", str(seed)]
    subprocess.run([PROGRAM, "train", *command, *streams, *changes], check=True)
    return folder / "runs" / name


@torch.no_grad()
def probabilities(model: TransferModel, samples: Samples, averaged: bool) -> Tensor:
    """What a model says of every sample of a stream [N, K]; averaged over flips and quarter turns if asked to."""
    dataset = SampleDataset(samples, model.preprocessing, None)
    said = []
    for start in range(0, len(samples.rows), 32):
        item = dataset[Batch(0, samples.rows[start : start + 32])]
        images = eval_input(item["image"], model.preprocessing)
        views = [turned(images, element) for element in range(8 if averaged else 1)]
        said.append(torch.stack([model(view) for view in views]).mean(dim=0))
    return torch.cat(said)


def figures(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Of a run: `single` and `averaged`, for all cells and each type."""
    keep_freed_memory()
    model, config = load_model(run), load(run / "config.yaml", cls=Config)
    assert config.data.val and config.data.test
    val, test = (open_stream(stream, None, config.seed) for stream in (config.data.val, config.data.test))
    types = test.manifest.table["meta.type"].take(test.rows).to_pylist()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for how in ("single", "averaged"):
        said = probabilities(model, val, how == "averaged")
        threshold = choose_threshold("multiclass", said, val.labels, config.objective.threshold_metric)
        said, targets = probabilities(model, test, how == "averaged"), test.labels
        found[how] = {}
        for kind in CELL_TYPES:
            place = torch.tensor([kind in ("all", own) for own in types])
            found[how][kind] = metrics("multiclass", said[place], targets[place], threshold)
    return found


def measured(config: Path, folder: Path, changes: list[str], seed: int) -> dict[str, Any]:
    """The figures of a split, trained unless that is done, and the seconds that its training took."""
    run = trained(seed, config, folder, changes)
    return {**figures(run), "seconds": json.loads((run / "summary.json").read_text())["seconds/total"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/elpv.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="splits at a time; they share the threads")
    parser.add_argument("--folder", type=Path, default=Path("runs/elpv_protocol"), help="of datasets and runs")
    options, changes = parser.parse_known_args()
    work = partial(measured, options.config, options.folder, changes)
    runs = []
    for seed, run in zip(options.seeds, at_a_time(options.jobs, work, options.seeds), strict=True):
        runs.append(run)
        print(f"split {seed}: {run['single']['all']}", flush=True)
    print(elpv_table(runs))
    means = {
        how: {name: statistics.mean(run[how]["all"][name] for run in runs) for name in ELPV_FIGURES}
        for how in ("single", "averaged")
    }
    ratios = {"elpv_accuracy": means["single"]["accuracy"], "elpv_auroc": means["single"]["auroc"]}
    settings = {"config": str(options.config), "changes": changes, "seeds": options.seeds, "jobs": options.jobs}
    write_result("elpv", ratios, settings | {"averaged": means["averaged"], "splits": runs})


if __name__ == "__main__":
    main()
