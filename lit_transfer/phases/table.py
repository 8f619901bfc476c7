"""The plan of a run as data: what each phase trains at which rate, for how long; and what may not change."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from lit_transfer.config import Config
from lit_transfer.data.plan import steps_per_epoch
from lit_transfer.errors import UserError, nearest, require
from lit_transfer.model.network import Layout, ParameterInfo
from lit_transfer.model.stages import find_cut, summarise
from lit_transfer.objectives.losses import check_objective
from lit_transfer.phases.presets import expand
from lit_transfer.phases.trainer import ranks_of
from lit_transfer.reading import to_plain
from lit_transfer.recipe import Objective
from lit_transfer.schedule import Phase


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a weight decay.

    Args:
        name: `head/decay`, `backbone/no_decay`, `blocks.3/decay`, ...: whose rate it is, and whether it decays.
        lr: full learning rate.
        weight_decay: zero for vectors, scalars and what the network exempts.
        parameters: as in `Network.named_parameters()`, in order.
    """

    name: str
    lr: float
    weight_decay: float
    parameters: tuple[str, ...]

    @property
    def rate_name(self) -> str:
        """Whose learning rate it is: `head`, `backbone`, a stage or a pattern."""
        return self.name.rpartition("/")[0]


@dataclass(frozen=True)
class PhasePlan:
    """One phase, resolved: what trains at which rate, and for how long at most.

    Args:
        phase: the row of the table.
        cut: the first stage of which anything trains; `head` where none does.
        groups: what trains, in the order of the backbone's stages, the head last.
        steps_per_epoch: optimizer steps of an epoch.
        max_steps: optimizer steps of the phase, unless it ends early.
    """

    phase: Phase
    cut: str
    groups: tuple[Group, ...]
    steps_per_epoch: int
    max_steps: int

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of all parameters that train."""
        return tuple(name for group in self.groups for name in group.parameters)

    @property
    def rates(self) -> dict[str, float]:
        """Full learning rates by whose they are."""
        return {group.rate_name: group.lr for group in self.groups}


def resolve(config: Config, layout: Layout, samples: int) -> list[PhasePlan]:
    """What each phase does, given the network's layout and the number of training samples.

    Raises:
        UserError: a stage that the backbone lacks, patterns that match nothing or disagree, a phase that trains
            nothing, a warm-up as long as its phase, or what needs validation without any.
    """
    return [_resolve_phase(config, phase, layout, samples) for phase in expand(config, layout.stages, samples)]


def check_metrics(config: Config, phases: Sequence[Phase], names: Sequence[str]) -> None:
    """Refuse to watch a metric that validation does not give; `names` are the task's, without `val/`."""
    if config.data.val is None:
        return
    known = ["val/loss", *(f"val/{name}" for name in names)]
    for where, metric in [("monitor", config.monitor), *watched_metrics(phases)]:
        require(
            metric in known,
            f"{where} '{metric}' is not a metric of this task; there are {', '.join(known)}." + nearest(metric, known),
        )


def check_objectives(task: str, objective: Objective, phases: Sequence[Phase]) -> None:
    """Refuse settings of the loss, and what phases make of them, that have no meaning in a task."""
    check_objective(task, objective)
    for phase in phases:
        if phase.label_smoothing is not None:
            try:
                check_objective(task, replace(objective, label_smoothing=phase.label_smoothing))
            except UserError as error:
                raise UserError(f"phase '{phase.name}': {error}") from None


def watched_metrics(phases: Sequence[Phase]) -> list[tuple[str, str]]:
    """The metrics that phases watch, each behind the place where the config names it."""
    until = [(f"phase '{p.name}': until.metric", p.until.metric) for p in phases if p.until]
    plateau = [(p, p.full_schedule_args["metric"]) for p in phases if p.schedule == "plateau"]
    return until + [(f"phase '{p.name}': schedule_args.metric", metric) for p, metric in plateau]


def _resolve_phase(config: Config, phase: Phase, layout: Layout, samples: int) -> PhasePlan:
    where = f"phase '{phase.name}'"
    rates = _stage_rates(phase, layout, where) if phase.patterns is None else _pattern_rates(phase, layout, where)
    groups = _groups(phase, layout, rates)
    trained = {p.stage for p in layout.parameters if p.name in rates}
    cut = next((stage for stage in layout.stages if stage in trained), "head")
    order = config.data.order
    require(
        phase.global_batch % order.partitions == 0,
        f"{where}: global_batch {phase.global_batch} is not a multiple of data.order.partitions {order.partitions}, "
        "of which it takes equal shares; change one of them.",
    )
    rows = math.ceil(math.ceil(phase.global_batch / phase.accumulate) / ranks_of(config.trainer))
    require(
        rows > 1 or not (phase.mixup or phase.cutmix),
        f"{where}: mixup and cutmix need 2 samples or more on a rank at once, but global_batch {phase.global_batch} in "
        f"{phase.accumulate} part(s) over {ranks_of(config.trainer)} rank(s) leaves one; raise global_batch.",
    )
    steps = steps_per_epoch(samples, phase.global_batch, order.last_batch)
    require(
        steps > 0,
        f"{where}: global_batch {phase.global_batch} is over the {samples} samples, and data.order.last_batch drop "
        "leaves no step; lower it, or keep the last batch.",
    )
    max_steps = phase.max_steps or steps * (phase.max_epochs or 0)
    require(
        phase.warmup_steps < max_steps,
        f"{where}: warmup_steps {phase.warmup_steps} is not below its {max_steps} steps; lower it.",
    )
    needs_val = {
        "restore_best": phase.restore_best,
        "until": phase.until is not None,
        "schedule plateau": phase.schedule == "plateau",
        "validate_every_steps": phase.validate_every_steps is not None,
        "heads": phase.heads is not None,
    }
    for needs in (name for name, needed in needs_val.items() if needed):
        require(config.data.val is not None, f"{where}: {needs} needs validation; give data.val.")
    require(
        phase.heads is None or config.activations.store != "off",
        f"{where}: heads trains on stored features, but activations.store is off; write auto or require.",
    )
    return PhasePlan(phase, cut, groups, steps, max_steps)


Rates = dict[str, tuple[str, float]]
"""Of each parameter that trains, by name: whose rate it has, and the rate."""


def _stage_rates(phase: Phase, layout: Layout, where: str) -> Rates:
    """The rates of a phase that trains whole stages, and the head."""
    first = _first_stage(phase, layout, where)
    stages = layout.stages[first:]
    rates = {stage: _decayed(phase, layout, stage) for stage in stages} | {"head": phase.head_lr or 0.0}
    alone = "backbone" if phase.layer_decay == 1 else None
    return {
        p.name: (p.stage if p.stage == "head" else alone or p.stage, rates[p.stage])
        for p in layout.parameters
        if p.stage in rates
    }


def _first_stage(phase: Phase, layout: Layout, where: str) -> int:
    """How many stages are frozen from the front."""
    if isinstance(phase.train, dict) and "last" in phase.train:
        last = phase.train["last"]
        require(
            last <= len(layout.stages),
            f"{where}: train.last {last} is over the {len(layout.stages)} stages of {layout.backbone} "
            f"({summarise(layout.stages)}).",
        )
        return len(layout.stages) - int(last)
    try:
        return find_cut(
            phase.train if isinstance(phase.train, str) else phase.train["from"], layout.stages, layout.backbone
        )
    except UserError as error:
        raise UserError(f"{where}: train.from {error}") from None


def _decayed(phase: Phase, layout: Layout, stage: str) -> float:
    """The rate of a stage: Clark et al. 2020 (ELECTRA), a power of `layer_decay` for each stage behind it."""
    behind = len(layout.stages) - 1 - layout.stages.index(stage)
    return (phase.backbone_lr or 0.0) * phase.layer_decay**behind


def _pattern_rates(phase: Phase, layout: Layout, where: str) -> Rates:
    """The rates of a phase that trains what patterns match."""
    patterns = phase.patterns or {}
    matched = {pattern: [p for p in layout.parameters if _matches(pattern, p)] for pattern in patterns}
    for pattern, found in matched.items():
        require(
            bool(found),
            f"{where}: train.params '{pattern}' matches no parameter, so it trains nothing; a pattern is `norms` or a "
            f"glob over STAGE/NAME, such as {layout.parameters[0].path}.",
        )
    rates: Rates = {}
    for pattern, found in matched.items():
        for parameter in found:
            rate = _pattern_rate(phase, layout, patterns[pattern], pattern, parameter, where)
            other = rates.setdefault(parameter.name, rate)
            require(
                other[1] == rate[1],
                f"{where}: train.params '{other[0]}' and '{pattern}' both match {parameter.path} with different "
                f"rates, {other[1]:g} and {rate[1]:g}; make them exclude each other.",
            )
    trains_head = any(whose == "head" for whose, _ in rates.values())
    require(
        phase.lr is None or trains_head,
        f"{where}: lr {phase.lr} is the head's learning rate, but no pattern matches it; remove it, or add head/*.",
    )
    return rates


def _pattern_rate(
    phase: Phase, layout: Layout, rate: float | None, pattern: str, parameter: ParameterInfo, where: str
) -> tuple[str, float]:
    if rate is not None:
        return pattern, float(rate)
    key = "lr" if parameter.stage == "head" else "backbone_lr"
    require(
        getattr(phase, key) is not None,
        f"{where}: train.params '{pattern}' matches {parameter.path}, which trains at {key}, but it is not given.",
    )
    if parameter.stage == "head":
        return "head", phase.lr or 0.0
    return "backbone" if phase.layer_decay == 1 else parameter.stage, _decayed(phase, layout, parameter.stage)


def _matches(pattern: str, parameter: ParameterInfo) -> bool:
    return parameter.is_norm if pattern == "norms" else fnmatchcase(parameter.path, pattern)


def _groups(phase: Phase, layout: Layout, rates: Rates) -> tuple[Group, ...]:
    """Parameters of one rate and one decay, in the order of the stages, the head last."""
    members: dict[tuple[str, float, bool], list[str]] = {}
    places = {part: place for place, part in enumerate([*layout.stages, "head"])}
    for parameter in sorted(layout.parameters, key=lambda parameter: places[parameter.stage]):
        if parameter.name in rates:
            members.setdefault((*rates[parameter.name], parameter.decays), []).append(parameter.name)
    return tuple(
        Group(f"{whose}/{'decay' if decays else 'no_decay'}", lr, phase.weight_decay if decays else 0.0, tuple(names))
        for (whose, lr, decays), names in members.items()
    )


def fingerprint(
    config: Config, plans: Sequence[PhasePlan], digests: dict[str, str], weights_sha256: str | None
) -> dict[str, Any]:
    """All that decides the result of a run, as plain values: what may not change between a stop and a resume.

    Where data lies, workers, checkpoints and tracking are left out: they do not change what is computed. Ranks are left
    out, too: a run may go on with other ones, though dropout, mixup and BatchNorm over a rank's part then draw anew.
    """
    plain = to_plain(config)
    kept = {key: plain[key] for key in ("seed", "image", "augment", "model", "objective", "monitor")}
    streams = {
        name: {"digest": digests[name], "split": stream["split"], "fraction": stream["fraction"]}
        for name, stream in plain["data"].items()
        if name in digests
    }
    phases = [
        asdict(plan.phase) | {"steps_per_epoch": plan.steps_per_epoch, "max_steps": plan.max_steps} for plan in plans
    ]
    return kept | {
        "data": streams | {"label": plain["data"]["label"], "order": plain["data"]["order"]},
        "weights_sha256": weights_sha256,
        "phases": phases,
        "precision": plain["trainer"]["precision"],
        "activations": {key: plain["activations"][key] for key in ("store", "views", "prefix", "dtype")},
    }


def fingerprint_hash(value: dict[str, Any]) -> str:
    """sha256 of a fingerprint's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`key: old -> new` for every place where two plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{path}[{i}]")
        ]
    return [] if old == new else [f"{path}: {old} -> {new}"]
