"""The sections of a config that say when and how fast what is learned: a row of the phase table."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any, Literal

from lit_transfer.errors import nearest, require

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "warmup_cosine": {"end_factor": 0.0},
    "one_cycle": {"peak_at": 0.25, "start_factor": 0.04, "end_factor": 1e-5},
    "step": {"milestones": [0.3, 0.6, 0.9], "gamma": 0.1},
    "plateau": {"metric": "val/loss", "patience": 2, "min_delta": 0.0, "gamma": 0.1},
}
"""The learning-rate schedules, each with its `schedule_args` and their defaults."""


@dataclass(frozen=True, kw_only=True)
class Until:
    """Ends a phase early: when a metric stops improving, or has passed a threshold. Checked at every validation.

    Args:
        metric: a validation metric, such as `val/loss`.
        patience: validations without an improvement before the phase ends.
        min_delta: smallest change that counts as an improvement.
        below: ends the phase once the metric is under this.
        above: ends the phase once the metric is over this.
    """

    metric: str
    patience: int | None = None
    min_delta: float = 0.0
    below: float | None = None
    above: float | None = None

    def __post_init__(self) -> None:
        require(
            self.metric.startswith("val/"),
            f"until.metric '{self.metric}' must be a validation metric: val/...",
        )
        given = [name for name in ("patience", "below", "above") if getattr(self, name) is not None]
        require(
            len(given) == 1,
            f"until gives {' and '.join(given) or 'no condition'}; give one of patience, below, above.",
        )
        require(self.patience is None or self.patience >= 1, f"until.patience {self.patience} is under 1.")
        require(self.min_delta >= 0, f"until.min_delta {self.min_delta} is negative.")
        require(
            self.min_delta == 0 or self.patience is not None,
            f"until.min_delta {self.min_delta} belongs to patience, which is not given; remove it.",
        )


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Heads that train at once on the same stored features: one for each combination of what is given.

    Args:
        lr: learning rates; the phase's by default.
        weight_decay: weight decays; the phase's by default.
        seeds: of new heads; by default all begin as the network's head is.
    """

    lr: list[float] = field(default_factory=list)
    weight_decay: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        lists: dict[str, list[float]] = {"lr": self.lr, "weight_decay": self.weight_decay, "seeds": [*self.seeds]}
        for name, values in lists.items():
            wrong = [value for value in values if not 0 <= value < float("inf") or (name == "lr" and value == 0)]
            require(not wrong, f"heads.{name} {wrong} is not {'positive' if name == 'lr' else 'zero or more'}.")
            require(len(set(values)) == len(values), f"heads.{name} {values} names one twice; remove it.")
        require(
            any(len(values) > 1 for values in lists.values()),
            "heads describes one head; give a list of 2 or more, or write lr and weight_decay in the phase's row.",
        )


@dataclass(frozen=True)
class HeadSetting:
    """One of the heads that train at once; `seed` is None where it begins as the network's head is."""

    lr: float
    weight_decay: float
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One row of the phase table: what trains, how fast, for how long.

    Args:
        name: names the phase's checkpoints and curves.
        train: `head`, `all`, `{from: STAGE}` (that stage and all behind it), `{last: N}` (the last N stages), each
            with the head; or `{params: [PATTERN, ...]}`: what those match and nothing else. A pattern is a glob
            over `STAGE/NAME` (`stem/*`, `*.bias`, `head/*`), or `norms`: weights and biases of normalisation
            layers. `{params: {PATTERN: LR, ...}}` gives each its own rate.
        max_epochs: passes over the training stream, at most; or give max_steps.
        max_steps: optimizer steps, at most.
        max_minutes: wall-clock minutes, at most, over all restarts; the phase is validated and then ends.
        lr: learning rate of the head.
        backbone_lr: learning rate of the last stage; needed as soon as a stage trains.
        layer_decay: each stage has this times the rate of the stage behind it; 1 is one rate for all.
        global_batch: samples per optimizer step, over all ranks.
        accumulate: parts in which a global batch is computed, to save memory.
        optimizer: a class of torch.optim by name, such as adamw or sgd.
        optimizer_args: its other arguments.
        momentum: of SGD.
        weight_decay: of matrices and kernels; biases, normalisation weights and what the network
            itself exempts have none.
        schedule: `constant`; `warmup_cosine`: linear to the full rate, then a half cosine down; `one_cycle`: a
            half cosine up, then one down; `step`: linear from zero, then times gamma at each milestone;
            `plateau`: times gamma when a metric has not improved for `patience` validations.
        schedule_args: of warmup_cosine: end_factor; of one_cycle: peak_at (share of the steps), start_factor,
            end_factor; of step: milestones (shares of the steps), gamma; of plateau: metric, patience,
            min_delta, gamma. Factors are shares of the full rate.
        warmup_steps: steps of the linear part of warmup_cosine and step.
        clip_norm: largest norm of the whole gradient; larger ones are scaled down to it.
        augment_strength: times all ranges and probabilities of `augment`; 0 is no augmentation.
        label_smoothing: in the place of the objective's, in this phase, also in val/loss.
        mixup: alpha of mixup (Zhang et al. 2018); 0 is none. With cutmix, each step takes one of the two. Samples of
            one rank are mixed with each other, so the result depends on the ranks.
        cutmix: alpha of CutMix (Yun et al. 2019); 0 is none.
        ema_decay: of an exponential moving average of the trained weights, once a step; it is what is
            validated and what the phase ends with.
        norm: `pretrained` keeps BatchNorm's running statistics in the trained stages; `batch` uses and updates the
            batch's own, for training from scratch or pictures far from those of the pretraining. On several GPUs
            that is SyncBatchNorm; on CPU ranks each has its own part of the batch, so the result depends on them.
        validate_every_steps: optimizer steps between two validations; each epoch's end by default.
        until: ends the phase early.
        restore_best: go on with the weights of the phase's best validation by `monitor`, not with its last.
        heads: trains many heads at once on stored features, with adamw, adam or sgd, each as it would train alone; the
            best by `monitor` at a validation is what is watched there, and what the phase ends with.
        compile: compile the trained part with torch.compile.
        grad_checkpointing: compute each trained stage again in the backward pass, to save memory.
    """

    name: str
    train: str | dict[str, Any] = "head"
    max_epochs: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    lr: float | None = None
    backbone_lr: float | None = None
    layer_decay: float = 1.0
    global_batch: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "warmup_cosine", "one_cycle", "step", "plateau"] = "constant"
    schedule_args: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    clip_norm: float | None = None
    augment_strength: float = 1.0
    label_smoothing: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float | None = None
    norm: Literal["pretrained", "batch"] = "pretrained"
    validate_every_steps: int | None = None
    until: Until | None = None
    restore_best: bool = False
    heads: Heads | None = None
    compile: bool = False
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        where = f"phase '{self.name}'"
        require(bool(re.fullmatch(r"[A-Za-z0-9_-]+", self.name)), f"{where}: a name has letters, digits, _ and -.")
        _check_train(self, where)
        _check_rates(self, where)
        _check_length(self, where)
        _check_numbers(self, where)
        _check_schedule(self, where)
        _check_heads(self, where)
        require(
            not (self.grad_checkpointing and self.norm == "batch"),
            f"{where}: grad_checkpointing computes a stage twice, and norm batch would count each batch twice; "
            "use one of them.",
        )

    @property
    def full_schedule_args(self) -> dict[str, Any]:
        """`schedule_args` with the schedule's defaults in the place of what is not given."""
        return SCHEDULES[self.schedule] | self.schedule_args

    @property
    def head_lr(self) -> float | None:
        """The learning rate of the head, or the largest of many."""
        return max(self.heads.lr) if self.heads and self.heads.lr else self.lr

    @property
    def head_settings(self) -> list[HeadSetting]:
        """Of the heads that train at once, in order; none where one head trains."""
        if self.heads is None or self.head_lr is None:
            return []
        seeds: list[int | None] = [*self.heads.seeds] or [None]
        decays = self.heads.weight_decay or [self.weight_decay]
        return [HeadSetting(*each) for each in product(self.heads.lr or [self.head_lr], decays, seeds)]

    @property
    def patterns(self) -> dict[str, float | None] | None:
        """The patterns of `train.params`, each with its own rate or None; None where whole stages train."""
        if isinstance(self.train, str) or "params" not in self.train:
            return None
        params = self.train["params"]
        return dict(params) if isinstance(params, dict) else dict.fromkeys(params)


def _check_train(phase: Phase, where: str) -> None:
    forms = "head, all, {from: STAGE}, {last: N} or {params: [PATTERN, ...]}"
    train = phase.train
    said = f"{where}: train {train!r} is not {forms}."
    if isinstance(train, str):
        require(train in ("head", "all"), said)
        return
    require(len(train) == 1, said)
    (form, value), *_ = train.items()
    require(form in ("from", "last", "params"), said)
    if form == "from":
        require(isinstance(value, str), said)
        require(value not in ("head", "all"), f"{where}: train.from '{value}' is no stage; write train: {value}.")
    elif form == "last":
        require(type(value) is int and value >= 1, f"{where}: train.last {value!r} is not a count of stages.")
    else:
        require(isinstance(value, list | dict) and all(isinstance(p, str) for p in value), said)
        require(bool(value), f"{where}: train.params is empty, so the phase trains nothing; give a pattern.")
        if isinstance(value, dict):
            wrong = [p for p, rate in value.items() if not (isinstance(rate, int | float) and rate > 0)]
            require(not wrong, f"{where}: train.params {wrong} has a learning rate that is not positive.")


def _check_rates(phase: Phase, where: str) -> None:
    rates = {"lr": phase.lr, "backbone_lr": phase.backbone_lr}
    for name, rate in rates.items():
        require(rate is None or rate > 0, f"{where}: {name} {rate} is not positive.")
    require(0 < phase.layer_decay <= 1, f"{where}: layer_decay {phase.layer_decay} is outside (0, 1].")
    patterns = phase.patterns
    if patterns and None not in patterns.values():
        given = [name for name, rate in rates.items() if rate is not None]
        require(not given, f"{where}: {' and '.join(given)} has no use where each pattern has its rate; remove it.")
    elif patterns is None:
        require(phase.head_lr is not None, f"{where}: lr is missing; it is the head's learning rate.")
    if phase.train == "head":
        require(
            phase.backbone_lr is None,
            f"{where}: backbone_lr {phase.backbone_lr} is given but only the head trains; remove it.",
        )
    elif patterns is None:
        require(
            phase.backbone_lr is not None,
            f"{where}: backbone_lr {phase.backbone_lr} must be positive where stages train; try lr / 10.",
        )
    uses_decay = phase.train != "head" and (patterns is None or None in patterns.values())
    require(
        phase.layer_decay == 1 or uses_decay,
        f"{where}: layer_decay {phase.layer_decay} has no use where no stage's rate follows from backbone_lr.",
    )


def _check_length(phase: Phase, where: str) -> None:
    require(
        (phase.max_epochs is None) != (phase.max_steps is None),
        f"{where}: max_epochs {phase.max_epochs} and max_steps {phase.max_steps} are "
        f"{'both missing; give one' if phase.max_epochs is None else 'both given; remove one'}.",
    )
    for name in ("max_epochs", "max_steps", "validate_every_steps"):
        value = getattr(phase, name)
        require(value is None or value >= 1, f"{where}: {name} {value} is under 1.")
    minutes = phase.max_minutes
    require(minutes is None or minutes > 0, f"{where}: max_minutes {minutes} is not positive.")


def _check_numbers(phase: Phase, where: str) -> None:
    for name, least in (("global_batch", 1), ("accumulate", 1)):
        require(getattr(phase, name) >= least, f"{where}: {name} {getattr(phase, name)} is under {least}.")
    for name in ("weight_decay", "warmup_steps", "augment_strength", "mixup", "cutmix"):
        require(getattr(phase, name) >= 0, f"{where}: {name} {getattr(phase, name)} is negative.")
    require(0 <= phase.momentum < 1, f"{where}: momentum {phase.momentum} is outside [0, 1).")
    require(phase.clip_norm is None or phase.clip_norm > 0, f"{where}: clip_norm {phase.clip_norm} is not positive.")
    for name in ("label_smoothing", "ema_decay"):
        value = getattr(phase, name)
        require(value is None or 0 <= value < 1, f"{where}: {name} {value} is outside [0, 1).")
    require(
        phase.accumulate <= phase.global_batch,
        f"{where}: accumulate {phase.accumulate} is over global_batch {phase.global_batch}, whose parts it counts.",
    )


HEADS_OPTIMIZERS = {"adamw": ("betas", "eps"), "adam": ("betas", "eps"), "sgd": ("nesterov",)}
"""The optimizers that train many heads at once, each with the `optimizer_args` it may be given."""


def _check_heads(phase: Phase, where: str) -> None:
    if phase.heads is None:
        return
    require(phase.train == "head", f"{where}: heads trains heads alone, but train is {phase.train!r}; write head.")
    for name, default in (("lr", None), ("weight_decay", 0.0)):
        given, listed = getattr(phase, name), getattr(phase.heads, name)
        require(
            given == default or not listed,
            f"{where}: {name} {given} and heads.{name} {listed} are both given; remove one.",
        )
    name = phase.optimizer.lower()
    require(
        name in HEADS_OPTIMIZERS,
        f"{where}: heads needs optimizer {' or '.join(HEADS_OPTIMIZERS)}, not {phase.optimizer}.",
    )
    other = set(phase.optimizer_args) - set(HEADS_OPTIMIZERS[name])
    require(not other, f"{where}: optimizer_args {sorted(other)} cannot be given to heads; remove them.")
    for setting in ("cutmix", "compile"):
        require(
            not getattr(phase, setting), f"{where}: {setting} has no meaning for heads on stored features; remove it."
        )


def _check_schedule(phase: Phase, where: str) -> None:
    known = SCHEDULES[phase.schedule]
    for key, value in phase.schedule_args.items():
        require(
            key in known,
            f"{where}: schedule_args '{key}' is not of schedule {phase.schedule}, which has "
            f"{', '.join(known) or 'none'}.{nearest(key, list(known))}",
        )
        require(
            type(value) is type(known[key]) or (type(known[key]) is float and type(value) is int),
            f"{where}: schedule_args.{key} {value!r} is not a {type(known[key]).__name__}, as {known[key]!r} is.",
        )
    require(
        phase.warmup_steps == 0 or phase.schedule in ("warmup_cosine", "step"),
        f"{where}: warmup_steps {phase.warmup_steps} needs schedule warmup_cosine or step, not {phase.schedule}.",
    )
    args = phase.full_schedule_args
    for key in ("peak_at", "start_factor", "end_factor", "gamma"):
        value = args.get(key, 0.0)
        require(0 <= value <= 1, f"{where}: schedule_args.{key} {value} is outside [0, 1].")
    marks = args.get("milestones", [])
    require(
        all(isinstance(mark, int | float) and 0 < mark < 1 for mark in marks)
        and all(a < b for a, b in pairwise(marks)),
        f"{where}: schedule_args.milestones {marks} must rise, each in (0, 1): shares of the phase's steps.",
    )
    if phase.schedule == "plateau":
        metric, patience = args["metric"], args["patience"]
        require(metric.startswith("val/"), f"{where}: schedule_args.metric '{metric}' must be a val/... metric.")
        require(patience >= 1, f"{where}: schedule_args.patience {patience} is under 1.")
        require(args["min_delta"] >= 0, f"{where}: schedule_args.min_delta {args['min_delta']} is negative.")
