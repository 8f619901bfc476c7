"""`lit-transfer train --config FILE [--section.key VALUE ...]`: run the phases of a config.

The same command continues a run that was stopped, and prints the summary of one that is finished.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from lit_transfer import report
from lit_transfer.config import Config
from lit_transfer.data.module import open_streams
from lit_transfer.evaluation import conclude
from lit_transfer.launch import run as run_verb
from lit_transfer.launch.options import read_config
from lit_transfer.model.augment import settle_image
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.heads import build_head
from lit_transfer.model.module import Stopped
from lit_transfer.model.network import Network
from lit_transfer.objectives.losses import check_objective, class_weights, outputs
from lit_transfer.phases.run import Job, run_phases
from lit_transfer.phases.table import differences, expand, fingerprint, resolve
from lit_transfer.tracking import ENVIRONMENT, open_run, wandb_logger


def train(config: Config) -> None:
    """One run, from config to summary; each statement is an arrow of the diagram in the README."""
    streams = open_streams(config.data, config.seed)
    task, classes = streams["train"].manifest.task, streams["train"].manifest.classes(config.data.label)
    check_objective(task, config.objective)

    torch.manual_seed(config.seed)  # weights that start random
    backbone = build_backbone(config.model, image_size=config.image.size)
    image, preprocessing = settle_image(config.image, backbone.image)
    config = replace(config, image=image, phases=expand(config))
    network = Network(backbone, build_head(config.model.head, backbone.features, outputs(task, len(classes)), config.seed))
    weights = class_weights(config.objective, streams["train"].labels, task, len(classes))

    plans = resolve(config, backbone.stage_names, len(streams["train"].rows))
    digests = {name: samples.manifest.digest for name, samples in streams.items()}
    run = open_run(config, fingerprint(config, plans, digests), differences)
    if not run.summary():
        job = Job(config, network, streams, preprocessing, weights, run, wandb_logger(config, run))
        results = run_phases(job, plans)
        conclude(job, results)
    print(report.summary_table(run.summary()))


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when finished, 130 when a signal stopped the run."""
    config = read_config(argv, "lit-transfer train", __doc__)
    try:
        train(config)
    except Stopped:
        if "LOCAL_RANK" not in os.environ or os.environ["LOCAL_RANK"] == "0":
            print(f"\nstopped; the same command continues {config.run_dir} from its last whole epoch.")
            return 130
    finally:
        os.environ.pop(ENVIRONMENT, None)
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
