"""`lit-transfer plan --config FILE [--section.key VALUE ...]`: print what a run would do; no GPU, no weights.

--samples N   plan for N training samples where the dataset is not there yet
--classes K   and K classes (2 by default)
--expand      print only the phases, as a YAML list that can stand under `phases:`
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
import yaml

from lit_transfer.config import Config
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.manifest import is_dataset
from lit_transfer.data.plan import share
from lit_transfer.data.streams import Samples, open_streams
from lit_transfer.errors import UserError, require
from lit_transfer.launch import run
from lit_transfer.launch.options import Parser, read_config
from lit_transfer.launch.train import build_network
from lit_transfer.model.augment import settle_image
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.memory import phase_memory
from lit_transfer.model.network import Network
from lit_transfer.objectives.losses import class_weights, outputs
from lit_transfer.objectives.metrics import metric_names
from lit_transfer.phases.optim import build_optimizer
from lit_transfer.phases.presets import expand
from lit_transfer.phases.stored import check_activations
from lit_transfer.phases.table import PhasePlan, check_metrics, check_objectives, resolve
from lit_transfer.phases.trainer import ranks_of
from lit_transfer.reading import to_plain
from lit_transfer.report import aligned
from lit_transfer.report.plan import PlannedPhase, plan_blocks
from lit_transfer.schedule import Phase


@dataclass(frozen=True)
class Dataset:
    """What a plan needs to know of the data, and how to tell it."""

    task: str
    classes: tuple[str, ...]
    samples: int
    told: str


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for a fault of the input."""
    parser = Parser(prog="lit-transfer plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--samples")
    parser.add_argument("--classes")
    parser.add_argument("--expand", action="store_true")
    own, rest = parser.parse_known_args(argv)
    config: Config = read_config(rest or argv, "lit-transfer plan", __doc__)
    samples, classes = _count("samples", own.samples, 1), _count("classes", own.classes, 2)
    if own.expand:
        print(expanded(config, samples), end="")
    else:
        print(described(config, samples, classes))
    return 0


def _count(name: str, text: str | None, least: int) -> int | None:
    valid = text is None or (text.isdecimal() and int(text) >= least)
    require(valid, f"--{name} {text} is not a whole number of at least {least}; correct it.")
    return None if text is None else int(text)


def expanded(config: Config, samples: int | None = None) -> str:
    """The phases as a YAML list of what differs from the defaults; `samples` stands for a dataset that is not there."""
    stages: Sequence[str] = ()
    if not isinstance(config.phases, list):
        stages = build_backbone(config.model, device="meta", load_weights=False).stage_names
        if is_dataset(config.data.train.manifest):
            samples = len(open_streams(config.data, config.seed)["train"].rows)
        elif samples is not None:
            samples = share(samples, config.data.train.fraction)
    defaults = {field.name: field.default for field in fields(Phase)}
    rows = [
        {key: value for key, value in to_plain(phase).items() if value not in (defaults[key], {})}
        for phase in expand(config, stages, samples)
    ]
    return yaml.safe_dump(rows, sort_keys=False, allow_unicode=True, width=110)


def described(config: Config, samples: int | None = None, classes: int | None = None) -> str:
    """The plan of a run as text. `samples` and `classes` stand for a dataset that is not there.

    Raises:
        UserError: no dataset and no `samples`, or a config that does not fit the dataset or the network.
    """
    dataset = read_dataset(config, samples, classes)
    network = build_network(config, outputs(dataset.task, len(dataset.classes)), device="meta")
    image, preprocessing = settle_image(config.image, network.backbone.image)
    phases = expand(config, network.backbone.stage_names, dataset.samples)
    config = replace(config, image=image, phases=phases)
    check_objectives(dataset.task, config.objective, phases)
    check_metrics(config, phases, metric_names(dataset.task, len(dataset.classes)))
    plans = resolve(config, network.layout(), dataset.samples)
    check_activations(config, plans, network.backbone.stage_names, preprocessing)
    planned = [_planned(config, network, plan, preprocessing, dataset.samples) for plan in plans]
    blocks = [
        f"Plan of run {config.name}, seed {config.seed}, written to {config.run_dir}",
        dataset.told,
        *plan_blocks(config, network, preprocessing, planned, dataset.samples),
    ]
    return "\n\n".join(blocks)


def read_dataset(config: Config, samples: int | None, classes: int | None) -> Dataset:
    """What the manifest says if there is one, else what is assumed."""
    place = config.data.train.manifest
    if is_dataset(place):
        streams = open_streams(config.data, config.seed)
        manifest = streams["train"].manifest
        names = manifest.classes(config.data.label)
        class_weights(config.objective, streams["train"].labels, manifest.task, names)
        told = _streams(streams, manifest.display(config.data.label))
        if samples or classes:
            told += "\n--samples and --classes are not used: the dataset is there"
        return Dataset(manifest.task, names, len(streams["train"].rows), told)
    if samples is None:
        raise UserError(
            f"data.train.manifest '{place}' holds no dataset; make it with lit-transfer prepare, or plan "
            "with --samples N (and --classes K)."
        )
    names = tuple(f"class {i}" for i in range(classes or 2))
    class_weights(config.objective, torch.arange(len(names)), "multiclass", names)
    used = share(samples, config.data.train.fraction)
    part = "" if used == samples else f", of which data.train.fraction leaves {used:,}"
    told = (
        f"Data: {place} is not there yet\n"
        f"assumed: {samples:,} training samples{part}; task multiclass, {len(names)} classes"
    )
    return Dataset("multiclass", names, used, told)


def _planned(
    config: Config, network: Network, plan: PhasePlan, preprocessing: Preprocessing, samples: int
) -> PlannedPhase:
    """What a phase trains and needs; sets the network's cut."""
    network.set_trained(plan.trained, plan.phase.norm, grad_checkpointing=plan.phase.grad_checkpointing)
    ranks = ranks_of(config.trainer)
    memory = phase_memory(
        network,
        build_optimizer(network, plan),
        rows=math.ceil(math.ceil(min(plan.phase.global_batch, samples) / plan.phase.accumulate) / ranks),
        image_size=preprocessing.size,
        canvas=preprocessing.canvas,
        mixed=config.trainer.precision != "32",
        ranks=ranks,
    )
    return PlannedPhase(plan, sum(p.numel() for p in network.parameters() if p.requires_grad), memory)


def _streams(streams: Mapping[str, Samples], display: Sequence[str]) -> str:
    rows = [
        {"stream": name, "dataset": samples.manifest.name, "samples": len(samples.rows)}
        | {"unlabelled, left out": samples.unlabelled}
        for name, samples in streams.items()
    ]
    train = streams["train"].manifest
    few = ", ".join(display) if len(display) <= 6 else f"{', '.join(display[:5])}, ..."
    what = "classes" if train.task in ("multiclass", "ordinal") else "columns"
    return f"Data\n{aligned(rows)}\ntask {train.task}, {len(display)} {what}: {few}"


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
