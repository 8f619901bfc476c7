"""`lit-transfer features --config FILE [--section.key VALUE ...]`: features of backbones, and classical heads on them.

What the backbones give for each picture, from the activation store, is written as a table; heads
of scikit-learn are fitted to it and compared; the one that is best on validation is the result of
the run, for evaluate and predict.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lit_transfer import report
from lit_transfer.blocks import FeaturesConfig
from lit_transfer.comparison import Result, choose, conclude_features, fit_heads, head_rows
from lit_transfer.config import Trainer
from lit_transfer.data.quarantine import FILE_NAME as QUARANTINE
from lit_transfer.data.quarantine import Quarantine
from lit_transfer.data.streams import Samples, open_streams
from lit_transfer.errors import nearest, require
from lit_transfer.features.export import write_features
from lit_transfer.features.fitting import FittedHead, check_targets
from lit_transfer.features.table import FeatureTable, block_vectors, combine, groups_of, mean_norms
from lit_transfer.files import write_json
from lit_transfer.launch import run as run_verb
from lit_transfer.launch.options import read_config
from lit_transfer.model.joined import Blocks, open_blocks
from lit_transfer.model.memory import keep_freed_memory
from lit_transfer.objectives.metrics import metric_names
from lit_transfer.phases.table import differences
from lit_transfer.phases.trainer import check_machine
from lit_transfer.phases.watch import improves_downwards
from lit_transfer.reading import to_plain
from lit_transfer.report.heads import head_table, plot_heads, write_heads
from lit_transfer.tracking import ENVIRONMENT, Run, open_run

SHOWN = ("accuracy", "auroc", "f1")


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for a fault of the input."""
    config = read_config(argv, "lit-transfer features", __doc__, FeaturesConfig)
    try:
        print(report.summary_table(run_features(config)))
    finally:
        os.environ.pop(ENVIRONMENT, None)
    return 0


def run_features(config: FeaturesConfig) -> dict[str, Any]:
    """From a config to a finished run and its summary; one that is finished is not computed again."""
    start = time.perf_counter()
    on_gpu = check_machine(Trainer(accelerator=config.accelerator))
    if not on_gpu:
        keep_freed_memory()
    streams = open_streams(config.data, config.seed)
    check_dataset(config, streams["train"])
    blocks = open_blocks(config.backbones, config.image, config.seed)
    run = open_run(config, fingerprint(config, blocks, streams), differences)
    if found := run.summary():
        return found

    features, norms = extract(config, run, blocks, streams, torch.device("cuda" if on_gpu else "cpu"))
    if config.export:
        write_features(run.folder, config.export, features, config.data.label, about(blocks, norms))
    extracted_s = time.perf_counter() - start
    fitted = compare(config, run, features, blocks.widths)
    summary = conclude_features(Result(config, run, blocks, norms, features, fitted)) | {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "features_s": extracted_s,
        "total_s": time.perf_counter() - start,
    }
    write_json(run.folder / "summary.json", summary)
    return summary


def check_dataset(config: FeaturesConfig, train: Samples) -> None:
    """Refuse what cannot be fitted to a dataset, before any network is built."""
    task, classes = train.manifest.task, train.manifest.classes(config.data.label)
    check_targets(task, train.targets[train.rows], classes, groups_of(train, train.rows))
    known = [name for name in metric_names(task, len(classes)) if not improves_downwards(name)]
    metric = config.monitor.removeprefix("val/")
    require(
        metric in known,
        f"monitor '{config.monitor}' is not a figure that heads of a {task} dataset are chosen by; use one of "
        f"{', '.join(f'val/{name}' for name in known)}.{nearest(metric, known)}",
    )


def fingerprint(config: FeaturesConfig, blocks: Blocks, streams: Mapping[str, Samples]) -> dict[str, Any]:
    """All that decides the result, as plain values."""
    plain = to_plain(config)
    kept = ("seed", "monitor", "folds", "threshold_metric", "export")
    return {key: plain[key] for key in kept} | {
        "heads": config.kinds,
        "data": {
            name: {
                "digest": samples.manifest.digest,
                "split": plain["data"][name]["split"],
                "fraction": plain["data"][name]["fraction"],
            }
            for name, samples in streams.items()
        }
        | {"label": config.data.label},
        "picture": blocks.common.to_plain(),
        "backbones": [to_plain(block) for block in blocks.settings],
        "weights_sha256": [backbone.provenance["sha256"] for backbone in blocks.backbones],
        "activations": {key: plain["activations"][key] for key in ("prefix", "dtype")},
    }


def extract(
    config: FeaturesConfig, run: Run, blocks: Blocks, streams: Mapping[str, Samples], device: torch.device
) -> tuple[dict[str, FeatureTable], torch.Tensor]:
    """The features of all streams, and the mean norm of each block over the sound training samples [blocks]."""
    found = []
    for backbone, preprocessing in zip(blocks.backbones, blocks.inputs, strict=True):
        backbone.to(device)
        settings, workers = config.activations, config.data.workers
        found.append(
            block_vectors(backbone, preprocessing, settings, streams, workers=workers, progress=config.progress)
        )
        backbone.cpu()  # one at a time on the device
    norms = mean_norms([vectors["train"] for vectors in found])
    quarantine = Quarantine(run.folder / QUARANTINE, config.data.max_bad_fraction)
    features = {
        name: combine(name, samples, [vectors[name] for vectors in found], norms, quarantine)
        for name, samples in streams.items()
    }
    return features, norms


def about(blocks: Blocks, norms: torch.Tensor) -> list[dict[str, Any]]:
    """What stands where in a vector."""
    return [
        {"backbone": backbone.name, "width": backbone.features, "norm": norm, "weights": backbone.provenance}
        for backbone, norm in zip(blocks.backbones, norms.tolist(), strict=True)
    ]


def compare(
    config: FeaturesConfig, run: Run, features: Mapping[str, FeatureTable], widths: Sequence[int]
) -> FittedHead:
    """Fit and judge all heads, print and write their table and picture, and return the best."""
    judged, skipped = fit_heads(config, features, widths)
    told = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    require(bool(judged), f"none of the heads can be fitted ({told}); name another.")
    chosen = choose(judged, config.monitor)
    metric = config.monitor.removeprefix("val/")
    rows = head_rows(config.kinds, judged, skipped, chosen)
    print(report.table(head_table(rows, metric, names=(*SHOWN, metric))))
    print("* goes on, and is measured anew on pictures: these are by features as they are stored\n", flush=True)
    write_heads(rows, metric, run.folder / "heads.csv")
    plot_heads(rows, metric, run.folder / "report" / "heads.png")
    return chosen.fitted


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
