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
from lit_transfer.objectives.metrics import metric_names
from lit_transfer.phases.run import Job, run_phases
from lit_transfer.phases.table import PhasePlan, check_metrics, differences, expand, fingerprint, resolve
from lit_transfer.phases.trainer import check_machine
from lit_transfer.tracking import ENVIRONMENT, open_run, wandb_logger


def prepare_job(config: Config) -> tuple[Job, list[PhasePlan]]:
    """From a config to all that training needs; each statement is an arrow of the diagram in the README."""
    check_machine(config.trainer)
    streams = open_streams(config.data, config.seed)
    manifest = streams["train"].manifest
    task, classes = manifest.task, manifest.classes(config.data.label)
    check_objective(task, config.objective)
    weights = class_weights(config.objective, streams["train"].labels, task, classes)

    torch.manual_seed(config.seed)  # weights that start random
    backbone = build_backbone(config.model, image_size=config.image.size)
    head = build_head(config.model.head, backbone.features, outputs(task, len(classes)), config.seed)
    network = Network(backbone, head)

    image, preprocessing = settle_image(config.image, backbone.image)
    phases = expand(config)
    config = replace(config, image=image, phases=phases)
    check_metrics(config, phases, metric_names(task, len(classes)))
    plans = resolve(config, backbone.stage_names, len(streams["train"].rows))
    digests = {name: samples.manifest.digest for name, samples in streams.items()}
    run = open_run(config, fingerprint(config, plans, digests), differences)
    return Job(config, network, streams, preprocessing, weights, run, wandb_logger(config, run)), plans


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when finished, 130 when a signal stopped the run."""
    config = read_config(argv, "lit-transfer train", __doc__)
    try:
        job, plans = prepare_job(config)
        summary = job.run.summary() or conclude(job, run_phases(job, plans))
    except Stopped:
        # Only rank 0 says so: a child that ends with a status makes Lightning kill the others.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 0
        print(f"stopped; the same command continues {config.run_dir} from its last whole epoch.", flush=True)
        return 130
    finally:
        os.environ.pop(ENVIRONMENT, None)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(report.summary_table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
