"""`lit-transfer plan --config FILE [--section.key VALUE ...]`: print what a run would do; no GPU, no weights.

--samples N   plan for N training samples where the dataset is not there yet
--classes K   and K classes (2 by default)
--expand      print only the phases, as a YAML list that can stand under `phases:`
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import yaml
from torch import nn

from lit_transfer.config import Augment, Config
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.manifest import FILE_NAME
from lit_transfer.data.module import Samples, open_streams
from lit_transfer.data.plan import share
from lit_transfer.errors import UserError, require
from lit_transfer.launch import run
from lit_transfer.launch.options import Parser, read_config
from lit_transfer.launch.train import build_network
from lit_transfer.model.augment import settle_image
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.memory import Memory, phase_memory
from lit_transfer.model.network import Layout, Network
from lit_transfer.model.weights import find
from lit_transfer.objectives.losses import class_weights, outputs
from lit_transfer.objectives.metrics import metric_names
from lit_transfer.phases.optim import build_optimizer
from lit_transfer.phases.presets import expand
from lit_transfer.phases.table import PhasePlan, check_metrics, check_objectives, resolve
from lit_transfer.phases.trainer import ranks_of
from lit_transfer.reading import to_plain
from lit_transfer.report import aligned
from lit_transfer.schedule import Phase


@dataclass(frozen=True)
class Dataset:
    """What a plan needs to know of the data, and how to tell it."""

    task: str
    classes: tuple[str, ...]
    samples: int
    told: str


@dataclass(frozen=True)
class Step:
    """A phase as it will run: its row of the plan, what trains, and the memory of a rank."""

    plan: PhasePlan
    trained: int
    memory: Memory

    def rate(self, layout: Layout, part: str) -> str:
        """The learning rate of a stage or the head, for people; `part` where not all of it trains."""
        lr = {name: group.lr for group in self.plan.groups for name in group.parameters}
        names = [p.name for p in layout.parameters if p.stage == part]
        found = sorted({lr[name] for name in names if name in lr})
        text = " to ".join(f"{rate:.3g}" for rate in dict.fromkeys((found[0], found[-1]))) if found else "frozen"
        return text + (" (part)" if found and not all(name in lr for name in names) else "")


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
        if (Path(config.data.train.manifest) / FILE_NAME).is_file():
            samples = len(open_streams(config.data, config.seed)["train"].rows)
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
    steps = [_step(config, network, plan, preprocessing, dataset.samples) for plan in plans]
    blocks = [
        f"Plan of run {config.name}, seed {config.seed}, written to {config.run_dir}",
        dataset.told,
        _pictures(preprocessing, config.augment),
        _stages(config, network, steps),
        _phases(network, steps),
        _batches(config, steps, dataset.samples),
        _memory(config, steps),
    ]
    return "\n\n".join(blocks)


def read_dataset(config: Config, samples: int | None, classes: int | None) -> Dataset:
    """What the manifest says if there is one, else what is assumed."""
    place = config.data.train.manifest
    if (Path(place) / FILE_NAME).is_file():
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


def _step(config: Config, network: Network, plan: PhasePlan, preprocessing: Preprocessing, samples: int) -> Step:
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
    return Step(plan, _size(p for p in network.parameters() if p.requires_grad), memory)


def _streams(streams: Mapping[str, Samples], display: Sequence[str]) -> str:
    rows = [
        {"stream": name, "dataset": str(samples.manifest.path), "samples": len(samples.rows)}
        | {"unlabelled, left out": samples.unlabelled}
        for name, samples in streams.items()
    ]
    train = streams["train"].manifest
    few = ", ".join(display) if len(display) <= 6 else f"{', '.join(display[:5])}, ..."
    what = "classes" if train.task in ("multiclass", "ordinal") else "columns"
    return f"Data\n{aligned(rows)}\ntask {train.task}, {len(display)} {what}: {few}"


def _pictures(preprocessing: Preprocessing, augment: Augment) -> str:
    p = preprocessing
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (p.mean, p.std))
    changed = {key: value for key, value in asdict(augment).items() if value != getattr(Augment(), key)}
    random = ", ".join(key if value is True else f"{key} {value:g}" for key, value in changed.items())
    middle = "" if p.canvas == p.size else f", of which the middle {p.size} x {p.size} is used"
    changes = textwrap.fill(f"training pictures change at random: {random or 'not at all'}", 100)
    size = f"to {p.canvas} x {p.canvas} pixels ({p.fit}, {p.interpolation}){middle}"
    return f"Pictures\n{size}\nmean {mean}; std {std}\n{changes}"


def _stages(config: Config, network: Network, steps: Sequence[Step]) -> str:
    backbone, layout = network.backbone, network.layout()
    counts = {
        name: _size(parameter for _, parameter in backbone.stage_parameters(index))
        for index, name in enumerate(backbone.stage_names)
    }
    counts["head"] = _size(network.head.parameters())
    rows = [
        {"stage": name, "parameters": count}
        | {f"lr in {step.plan.phase.name}": step.rate(layout, name) for step in steps}
        for name, count in counts.items()
    ]
    return (
        f"Network: {config.model.backbone}, weights {config.model.weights}\n{aligned(rows)}\n"
        f"{sum(counts.values()):,} parameters in all; the head reads {backbone.features:,} features"
        + _missing_weights(config.model.weights)
    )


def _missing_weights(weights: str) -> str:
    """Why `train` would not start yet: weights that lie in no place it looks for them."""
    try:
        if weights not in ("pretrained", "none"):
            find(weights)
    except UserError as error:
        return "\n" + textwrap.fill(f"train would refuse this yet: {error}", 100)
    return ""


def _phases(network: Network, steps: Sequence[Step]) -> str:
    total, layout = _size(network.parameters()), network.layout()
    rows = []
    for step in steps:
        phase = step.plan.phase
        rates = {name: lr for name, lr in step.plan.rates.items() if name != "head"}
        span = (
            " to ".join(f"{lr:.3g}" for lr in dict.fromkeys((min(rates.values()), max(rates.values()))))
            if rates
            else "-"
        )
        momentum = f", momentum {phase.momentum:g}" if phase.optimizer == "sgd" else ""
        rows.append(
            {
                "phase": phase.name,
                "trains": _what_trains(step.plan),
                "parameters": step.trained,
                "share": f"{step.trained / total:6.1%}",
                "head lr": step.rate(layout, "head"),
                "backbone lr": span,
                "schedule": phase.schedule,
                "optimizer": f"{phase.optimizer}{momentum}",
                "decay": f"{phase.weight_decay:g}",
            }
        )
    return "\n".join(
        [f"Phases\n{aligned(rows)}", *(_also(step.plan.phase) for step in steps if _also(step.plan.phase))]
    )


def _what_trains(plan: PhasePlan) -> str:
    if plan.phase.patterns is not None:
        return ", ".join(plan.phase.patterns)
    return plan.phase.train if isinstance(plan.phase.train, str) else f"from {plan.cut}"


ALSO = (
    *("optimizer_args", "schedule_args", "layer_decay", "accumulate", "clip_norm", "augment_strength"),
    *("label_smoothing", "mixup", "cutmix", "ema_decay", "compile", "grad_checkpointing"),
)
"""Settings of a phase that are told only where they are not the default."""


def _also(phase: Phase) -> str:
    plain, usual = to_plain(phase), {field.name: field.default for field in fields(Phase)}
    told = [f"{key} {plain[key]}" for key in ALSO if plain[key] not in (usual[key], {})]
    if phase.norm == "batch":
        told.append("BatchNorm uses and updates the statistics of the batch")
    return f"{phase.name}: {'; '.join(told)}" if told else ""


def _batches(config: Config, steps: Sequence[Step], samples: int) -> str:
    ranks = ranks_of(config.trainer)
    rows = []
    for step in steps:
        phase, per_epoch = step.plan.phase, step.plan.steps_per_epoch
        rows.append(
            {
                "phase": phase.name,
                "global batch": phase.global_batch,
                "rows/rank": math.ceil(math.ceil(phase.global_batch / phase.accumulate) / ranks),
                "last batch": samples - (per_epoch - 1) * phase.global_batch,
                "steps/epoch": per_epoch,
                "epochs": math.ceil(step.plan.max_steps / per_epoch),
                "steps": step.plan.max_steps,
                "warm-up": phase.warmup_steps,
            }
        )
    here = " on this machine" if config.trainer.devices == "auto" else ""
    epochs, total = (sum(int(str(row[key])) for row in rows) for key in ("epochs", "steps"))
    pictures = sum(step.plan.max_steps * samples // step.plan.steps_per_epoch for step in steps)
    return (
        f"Batches: {samples:,} samples an epoch, {ranks} rank{'s' if ranks > 1 else ''} "
        f"(nodes {config.trainer.num_nodes}, devices {config.trainer.devices}{here})\n{aligned(rows)}\n"
        f"{epochs:,} epochs, {total:,} steps and {pictures:,} pictures at most\n"
        + "\n".join(_end(step.plan, config.monitor) for step in steps)
    )


def _end(plan: PhasePlan, monitor: str) -> str:
    phase = plan.phase
    count, unit = (phase.max_steps, "step") if phase.max_steps else (phase.max_epochs or 0, "epoch")
    text = f"{phase.name}: {count} {unit}{'s' if count > 1 else ''}"
    if phase.max_minutes:
        text += f", or {phase.max_minutes:g} minutes"
    if phase.until and phase.until.patience:
        least = f" by {phase.until.min_delta:g}" if phase.until.min_delta else ""
        text += f", or {phase.until.patience} validations without a better {phase.until.metric}{least}"
    elif phase.until:
        bound = f"below {phase.until.below:g}" if phase.until.below is not None else f"above {phase.until.above:g}"
        text += f", or {phase.until.metric} {bound}"
    if phase.validate_every_steps:
        text += f"; validated every {phase.validate_every_steps} steps"
    return text + (f"; then back to the best {monitor}" if phase.restore_best else "")


def _memory(config: Config, steps: Sequence[Step]) -> str:
    titles = {"saved": "saved activations", "frozen": "frozen forward"}
    names = [field.name for field in fields(Memory)] + ["total"]
    rows = [
        {"phase": step.plan.phase.name} | {titles.get(name, name): getattr(step.memory, name) / 2**20 for name in names}
        for step in steps
    ]
    bits = "fp32" if config.trainer.precision == "32" else f"16 bits ({config.trainer.precision})"
    return (
        f"Memory of a rank, in MiB: an estimate, with activations in {bits}\n{aligned(rows)}\n"
        "the total takes the larger of saved activations and frozen forward; not in it: gradients of\n"
        "activations, workspaces of convolutions, the allocator's reserve, and PyTorch itself"
    )


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
