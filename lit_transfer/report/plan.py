"""The plan of a run as plain text: what `lit-transfer plan` prints."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from torch import nn

from lit_transfer.config import Augment, Config
from lit_transfer.data.decode import Preprocessing
from lit_transfer.errors import UserError
from lit_transfer.model.memory import Memory
from lit_transfer.model.network import Layout, Network
from lit_transfer.model.weights import find
from lit_transfer.phases.table import PhasePlan
from lit_transfer.phases.trainer import ranks_of
from lit_transfer.reading import to_plain
from lit_transfer.report.tables import aligned
from lit_transfer.schedule import Phase

WIDTH = 100
"""Characters of a line."""


@dataclass(frozen=True)
class PlannedPhase:
    """A phase as it will run: its row of the plan, what trains, and the memory of a rank."""

    plan: PhasePlan
    trained: int
    memory: Memory

    def rate(self, layout: Layout, part: str) -> str:
        """The learning rate of a stage or the head, for people; `part` where not all of it trains."""
        many = {setting.lr for setting in self.plan.phase.head_settings}
        found = many if many and part == "head" else self._rates(layout, [part])
        is_part = None in found and len(found) > 1
        return (_span(found) or "frozen") + (" (part)" if is_part else "")

    def backbone_rates(self, layout: Layout) -> str:
        """The learning rates of all stages, for people."""
        return _span(self._rates(layout, layout.stages)) or "-"

    def _rates(self, layout: Layout, parts: Collection[str]) -> set[float | None]:
        """Of the parameters of some stages or the head; None is frozen."""
        lr = {name: group.lr for group in self.plan.groups for name in group.parameters}
        return {lr.get(p.name) for p in layout.parameters if p.stage in parts}


def _span(rates: Collection[float | None]) -> str:
    """The lowest and the highest rate; nothing where none is given."""
    found = [rate for rate in rates if rate is not None]
    return " to ".join(f"{rate:.3g}" for rate in dict.fromkeys((min(found), max(found)))) if found else ""


def plan_blocks(
    config: Config, network: Network, preprocessing: Preprocessing, planned: Sequence[PlannedPhase], samples: int
) -> list[str]:
    """Pictures, network, phases, batches and memory, a text each; `samples` of an epoch."""
    return [
        _pictures(preprocessing, config.augment),
        _stages(config, network, planned),
        _phases(network, planned),
        _batches(config, planned, samples),
        _memory(config, planned),
    ]


def _pictures(preprocessing: Preprocessing, augment: Augment) -> str:
    p = preprocessing
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (p.mean, p.std))
    changed = {key: value for key, value in asdict(augment).items() if value != getattr(Augment(), key)}
    random = ", ".join(key if value is True else f"{key} {value:g}" for key, value in changed.items())
    middle = "" if p.canvas == p.size else f", of which the middle {p.size} x {p.size} is used"
    changes = _wrapped(f"training pictures change at random: {random or 'not at all'}")
    size = f"to {p.canvas} x {p.canvas} pixels ({p.fit}, {p.interpolation}){middle}"
    return f"Pictures\n{size}\nmean {mean}; std {std}\n{changes}"


def _stages(config: Config, network: Network, planned: Sequence[PlannedPhase]) -> str:
    backbone, layout = network.backbone, network.layout()
    counts = {
        name: _size(parameter for _, parameter in backbone.stage_parameters(index))
        for index, name in enumerate(backbone.stage_names)
    }
    counts["head"] = _size(network.head.parameters())
    rows = [{"stage": name, "parameters": count} for name, count in counts.items()]
    columns = {step.plan.phase.name: [step.rate(layout, name) for name in counts] for step in planned}
    tables = [
        aligned([row | {name: rates[i] for name, rates in some.items()} for i, row in enumerate(rows)])
        for some in _beside(columns, WIDTH - max(map(len, aligned(rows).splitlines())))
    ]
    return (
        f"Network: {config.model.backbone}, weights {config.model.weights}\nlearning rates by phase\n"
        + "\n".join(tables)
        + f"\n{sum(counts.values()):,} parameters in all; the head reads {backbone.features:,} features"
        + _missing_weights(config.model.weights)
    )


def _beside(columns: Mapping[str, Sequence[str]], width: int) -> list[dict[str, Sequence[str]]]:
    """Columns in as many tables as it takes to keep each within some characters."""
    tables: list[dict[str, Sequence[str]]] = [{}]
    room = width
    for name, cells in columns.items():
        needed = 2 + max(map(len, [name, *cells]))
        if needed > room and tables[-1]:
            tables.append({})
            room = width
        tables[-1][name] = cells
        room -= needed
    return tables


def _missing_weights(weights: str) -> str:
    """Why `train` would not start yet: weights that lie in no place it looks for them."""
    try:
        if weights not in ("pretrained", "none"):
            find(weights)
    except UserError as error:
        return "\n" + _wrapped(f"train would refuse this yet: {error}")
    return ""


def _phases(network: Network, planned: Sequence[PlannedPhase]) -> str:
    total, layout = _size(network.parameters()), network.layout()
    rows = []
    for step in planned:
        phase = step.plan.phase
        momentum = f", momentum {phase.momentum:g}" if phase.optimizer == "sgd" else ""
        rows.append(
            {
                "phase": phase.name,
                "trains": _what_trains(step.plan),
                "parameters": step.trained,
                "share": f"{step.trained / total:6.1%}",
                "head lr": step.rate(layout, "head"),
                "backbone lr": step.backbone_rates(layout),
                "schedule": phase.schedule,
                "optimizer": f"{phase.optimizer}{momentum}",
                "decay": f"{phase.weight_decay:g}",
            }
        )
    return "\n".join([f"Phases\n{aligned(rows)}", *filter(None, (_also(step.plan.phase) for step in planned))])


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
    told = [_said(key, plain[key]) for key in ALSO if plain[key] not in (usual[key], {})]
    if phase.heads:
        grid = {key: values for key, values in plain["heads"].items() if values}
        told.append(_said(f"{len(phase.head_settings)} heads at once on stored features", grid))
    if phase.norm == "batch":
        told.append("BatchNorm uses and updates the statistics of the batch")
    return _wrapped(f"also in {phase.name}: {'; '.join(told)}") if told else ""


def _said(key: str, value: object) -> str:
    """A setting for people: `compile`, `mixup 0.2`, `optimizer_args: eps 1e-05`."""
    if isinstance(value, dict):
        return f"{key}: " + ", ".join(_said(*item) for item in value.items())
    if isinstance(value, list):
        return f"{key} " + " ".join(f"{item:g}" for item in value)
    return key if value is True else f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _batches(config: Config, planned: Sequence[PlannedPhase], samples: int) -> str:
    ranks = ranks_of(config.trainer)
    rows = []
    for step in planned:
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
    pictures = sum(step.plan.max_steps * samples // step.plan.steps_per_epoch for step in planned)
    lines = [
        f"Batches: {samples:,} samples an epoch, {ranks} rank{'s' if ranks > 1 else ''} "
        f"(nodes {config.trainer.num_nodes}, devices {config.trainer.devices}{here})",
        aligned(rows),
        f"{epochs:,} epochs, {total:,} steps and {pictures:,} pictures at most",
        *filter(None, (_end(step.plan, config.monitor) for step in planned)),
    ]
    return "\n".join(lines)


def _end(plan: PhasePlan, monitor: str) -> str:
    """What ends a phase, and how often it is validated; nothing where both go by its epochs alone."""
    phase = plan.phase
    ends = [f"{phase.max_steps} steps"] if phase.max_steps else []
    if phase.max_minutes:
        ends.append(f"{phase.max_minutes:g} minutes")
    if until := phase.until:
        least = f" by {until.min_delta:g}" if until.min_delta else ""
        patience = f"{until.patience} validations without a better {until.metric}{least}"
        below = f"{until.metric} below {until.below}" if until.below is not None else ""
        ends.append(patience if until.patience else below or f"{until.metric} above {until.above}")
    told = [f"ends after {' or '.join(ends)}"] if ends else []
    if phase.validate_every_steps:
        told.append(f"is validated every {phase.validate_every_steps} steps")
    if phase.restore_best:
        told.append(f"goes back to the best {monitor} at its end")
    return _wrapped(f"{phase.name} {', '.join(told)}") if told else ""


def _memory(config: Config, planned: Sequence[PlannedPhase]) -> str:
    titles = {"saved": "saved activations", "frozen": "frozen forward"}
    names = [field.name for field in fields(Memory)] + ["total"]
    rows = [
        {"phase": step.plan.phase.name} | {titles.get(name, name): getattr(step.memory, name) / 2**20 for name in names}
        for step in planned
    ]
    bits = "fp32" if config.trainer.precision == "32" else f"16 bits ({config.trainer.precision})"
    return (
        f"Memory of a rank, in MiB: an estimate, with activations in {bits}\n{aligned(rows)}\n"
        "the total takes the larger of saved activations and frozen forward; not in it: gradients of\n"
        "activations, workspaces of convolutions, the allocator's reserve, and PyTorch itself"
    )


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
