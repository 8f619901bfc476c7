"""The whole plan of a run as data: presets expand to phases, and `resolve` says what each of them does.

Here are the rules that need both the config and the backbone's stages or the size of the dataset.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lit_transfer.config import Config
from lit_transfer.data.plan import steps_per_epoch
from lit_transfer.errors import UserError, nearest, require
from lit_transfer.model.stages import find_cut
from lit_transfer.reading import parse, to_plain
from lit_transfer.recipe import Phase


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate: `head` or `backbone`."""

    name: str
    stages: tuple[str, ...]
    lr: float


@dataclass(frozen=True)
class PhasePlan:
    """One phase, resolved: what trains at which rate, and for how long at most.

    Args:
        phase: the row of the table.
        cut: the first stage that trains, `head` or `all`.
        groups: what trains, head first.
        steps_per_epoch: optimizer steps of an epoch.
        max_steps: optimizer steps of the phase, unless it ends early.
    """

    phase: Phase
    cut: str
    groups: tuple[Group, ...]
    steps_per_epoch: int
    max_steps: int


def freeze_thaw(
    *,
    thaw_from: str,
    head_epochs: int = 5,
    thaw_epochs: int = 10,
    head_lr: float = 1e-3,
    thaw_lr: float = 3e-4,
    backbone_lr: float = 1e-4,
    **shared: Any,
) -> list[dict[str, Any]]:
    """Head on the frozen backbone; then from stage `thaw_from` on (`all` for every stage) at lower rates.

    Any other key of a phase may be given and holds for both.
    """
    train = thaw_from if thaw_from in ("all", "head") else {"from": thaw_from}
    head = {"name": "head", "train": "head", "max_epochs": head_epochs, "lr": head_lr}
    thaw = {
        "name": "thaw",
        "train": train,
        "max_epochs": thaw_epochs,
        "lr": thaw_lr,
        "backbone_lr": backbone_lr,
    }
    return [head | shared, thaw | shared]


PRESETS = {"freeze_thaw": freeze_thaw}


def expand(config: Config) -> list[Phase]:
    """The phases of a config; a preset becomes the plain list that it stands for."""
    if isinstance(config.phases, list):
        return config.phases
    settings = dict(config.phases)
    name = str(settings.pop("preset", None))
    require(
        name in PRESETS,
        f"phases.preset '{name}' is unknown; presets are {', '.join(PRESETS)}.{nearest(name, list(PRESETS))}",
    )
    function = PRESETS[name]
    own = {key: p for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for key, parameter in own.items():
        require(key in settings or parameter.default is not parameter.empty, f"preset {name} needs '{key}'.")
    set_by_preset = {"name", "train", "max_epochs", "lr", "backbone_lr"}
    known = [*own, *(key for key in Phase.__dataclass_fields__ if key not in set_by_preset)]
    for key in settings:
        require(
            key in known,
            f"'{key}' is not a setting of preset {name}, which the config uses; write --phases.{[*own][-1]} and the "
            f"like (it has {', '.join(own)}), or put the list under phases that plan --expand prints."
            + nearest(key, known),
        )
    return [parse(Phase, row) for row in function(**settings)]


def cut_of(phase: Phase) -> str:
    """The first stage that trains, or `head`, or `all`."""
    return phase.train if isinstance(phase.train, str) else phase.train["from"]


def resolve(config: Config, stages: Sequence[str], samples: int) -> list[PhasePlan]:
    """What each phase does, given the backbone's stage names and the number of training samples.

    Raises:
        UserError: a stage that the backbone lacks, a warm-up as long as its phase, a metric but no `val`.
    """
    return [_resolve_phase(config, phase, stages, samples) for phase in expand(config)]


def check_metrics(config: Config, phases: Sequence[Phase], names: Sequence[str]) -> None:
    """Refuse to watch a metric that validation does not give; `names` are the task's, without `val/`."""
    if config.data.val is None:
        return
    known = ["val/loss", *(f"val/{name}" for name in names)]
    watched = [("monitor", config.monitor)]
    watched += [(f"phase '{phase.name}': until.metric", phase.until.metric) for phase in phases if phase.until]
    for where, metric in watched:
        require(
            metric in known,
            f"{where} '{metric}' is not a metric of this task; there are {', '.join(known)}." + nearest(metric, known),
        )


def _resolve_phase(config: Config, phase: Phase, stages: Sequence[str], samples: int) -> PhasePlan:
    cut = cut_of(phase)
    where = f"phase '{phase.name}'"
    try:
        first = find_cut(cut, stages, config.model.backbone)
    except UserError as error:
        raise UserError(f"{where}: train.from {error}") from None
    groups = [Group("head", (), phase.lr)]
    if first < len(stages):
        assert phase.backbone_lr is not None, "checked by Phase"
        groups.append(Group("backbone", tuple(stages[first:]), phase.backbone_lr))
    steps = steps_per_epoch(samples, phase.global_batch)
    max_steps = steps * phase.max_epochs
    require(
        phase.warmup_steps < max_steps,
        f"{where}: warmup_steps {phase.warmup_steps} is not below its {max_steps} steps; lower it.",
    )
    for needs in (["restore_best"] if phase.restore_best else []) + (["until"] if phase.until else []):
        require(config.data.val is not None, f"{where}: {needs} needs validation; give data.val.")
    return PhasePlan(phase, cut, tuple(groups), steps, max_steps)


def lr_factor(phase: Phase, step: int, max_steps: int) -> float:
    """Share of the full learning rate at a step of the phase, counted from 0; a pure function."""
    if phase.schedule == "constant":
        return 1.0
    if step < phase.warmup_steps:
        return (step + 1) / (phase.warmup_steps + 1)
    done = (step - phase.warmup_steps) / (max_steps - phase.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def fingerprint(config: Config, plans: Sequence[PhasePlan], digests: dict[str, str]) -> dict[str, Any]:
    """All that decides the result of a run, as plain values: what may not change between a stop and a resume.

    Where data lies, workers, ranks and tracking are left out: they do not change what is computed.
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
        "data": streams | {"label": plain["data"]["label"]},
        "phases": phases,
        "precision": plain["trainer"]["precision"],
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
