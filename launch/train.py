"""`lit-transfer train --config FILE [--section.key VALUE ...] [--allow-changed-plan]`: run the phases of a config.

The same command continues a run that was stopped or killed, and prints the summary of one that is
finished. A changed config is refused with the differences, unless --allow-changed-plan is given:
finished phases then stay as they are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lit_transfer import report
from lit_transfer.config import Config
from lit_transfer.data.streams import open_streams
from lit_transfer.evaluation import conclude
from lit_transfer.features.initialise import check_start
from lit_transfer.launch import run as run_verb
from lit_transfer.launch.options import read_config
from lit_transfer.model.augment import settle_image
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.heads import build_head
from lit_transfer.model.module import Stopped
from lit_transfer.model.network import Network
from lit_transfer.objectives.losses import class_weights, outputs
from lit_transfer.objectives.metrics import metric_names
from lit_transfer.phases.job import Job, Setup
from lit_transfer.phases.optim import check_optimizers
from lit_transfer.phases.presets import expand
from lit_transfer.phases.run import run_phases
from lit_transfer.phases.stored import check_activations
from lit_transfer.phases.table import (
    PhasePlan,
    check_metrics,
    check_objectives,
    differences,
    fingerprint,
    resolve,
)
from lit_transfer.phases.trainer import check_machine
from lit_transfer.tracking import ENVIRONMENT, open_run, wandb_logger

ALLOW = "--allow-changed-plan"


def prepare_job(config: Config, *, allow_changed_plan: bool = False) -> tuple[Job, list[PhasePlan]]:
    """From a config to a run: its setup, and its directory, made or opened again."""
    setup, plans = prepare_setup(config)
    run = open_run(setup.config, fingerprint_of(setup, plans), differences, allow_changes=allow_changed_plan)
    return Job(**vars(setup), run=run, logger=wandb_logger(setup.config, run)), plans


def prepare_setup(config: Config) -> tuple[Setup, list[PhasePlan]]:
    """From a config to all that training needs; each statement is an arrow of the diagram in the README.

    Every rule is checked on a network without values before any weight is loaded.
    """
    check_machine(config.trainer)
    streams = open_streams(config.data, config.seed)
    manifest = streams["train"].manifest
    task, classes = manifest.task, manifest.classes(config.data.label)
    weights = class_weights(config.objective, streams["train"].labels, task, classes)
    width = outputs(task, len(classes))

    skeleton = build_network(config, width, device="meta")
    image, preprocessing = settle_image(config.image, skeleton.backbone.image)
    phases = expand(config, skeleton.backbone.stage_names, len(streams["train"].rows))
    config = replace(config, image=image, phases=phases)
    check_objectives(task, config.objective, phases)
    check_metrics(config, phases, metric_names(task, len(classes)))
    plans = resolve(config, skeleton.layout(), len(streams["train"].rows))
    check_optimizers(skeleton, plans)
    check_start(config, streams["train"])
    check_activations(config, plans, skeleton.backbone.stage_names, preprocessing)

    return Setup(config, build_network(config, width), streams, preprocessing, weights), plans


def fingerprint_of(setup: Setup, plans: Sequence[PhasePlan]) -> dict[str, Any]:
    """All that decides the result of these phases."""
    digests = {name: samples.manifest.digest for name, samples in setup.streams.items()}
    return fingerprint(setup.config, plans, digests, setup.network.backbone.provenance["sha256"])


def build_network(config: Config, outputs: int, device: str = "cpu") -> Network:
    """The network of a config with a new head; on `meta` without values and without loading weights."""
    torch.manual_seed(config.seed)  # weights that start random
    on_meta = device == "meta"
    backbone = build_backbone(config.model, image_size=config.image.size, device=device, load_weights=not on_meta)
    head = build_head(config.model.head, backbone.features, outputs, config.seed)
    return Network(backbone, head.to(device))


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when finished, 130 when a signal stopped the run."""
    arguments = [argument for argument in argv if argument != ALLOW]
    config = read_config(arguments, "lit-transfer train", __doc__)
    try:
        job, plans = prepare_job(config, allow_changed_plan=len(arguments) < len(argv))
        summary = job.run.summary() or conclude(job, run_phases(job, plans))
    except Stopped:
        # Only rank 0 says so: a child that ends with a status makes Lightning kill the others.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 0
        print(f"stopped; the same command continues {config.run_dir} from that step.", flush=True)
        return 130
    finally:
        os.environ.pop(ENVIRONMENT, None)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(report.summary_table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
