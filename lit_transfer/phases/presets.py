"""Named recipes of fine-tuning: each becomes the plain list of phases that it stands for.

A preset is a function of its settings, and of `stages` (the backbone's, in order) or `samples` (the size of the
training stream) where its rule needs them. It returns rows that hold only what differs from the defaults of `Phase`;
any other key of a phase may be given beside the settings, and holds for all rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass
from typing import Any, get_type_hints

from lit_transfer.config import Config
from lit_transfer.errors import nearest, require
from lit_transfer.model.stages import summarise
from lit_transfer.reading import parse
from lit_transfer.schedule import Phase

Rows = list[dict[str, Any]]


def linear_probe(*, epochs: int = 10, lr: float = 1e-3, **shared: Any) -> Rows:
    """The head alone, on the frozen backbone."""
    return [{"name": "head", "max_epochs": epochs, "lr": lr} | shared]


def freeze_thaw(
    *,
    thaw_from: str,
    head_epochs: int = 5,
    thaw_epochs: int = 10,
    head_lr: float = 1e-3,
    thaw_lr: float = 3e-4,
    backbone_lr: float = 1e-4,
    **shared: Any,
) -> Rows:
    """Head on the frozen backbone; then from stage `thaw_from` on (`all` for every stage) at lower rates."""
    train = thaw_from if thaw_from in ("all", "head") else {"from": thaw_from}
    head = {"name": "head", "max_epochs": head_epochs, "lr": head_lr}
    thaw = {"name": "thaw", "train": train, "max_epochs": thaw_epochs, "lr": thaw_lr, "backbone_lr": backbone_lr}
    return [head | shared, thaw | shared]


def lp_ft(
    *, head_epochs: int = 10, tune_epochs: int = 10, head_lr: float = 1e-3, tune_lr: float = 3e-5, **shared: Any
) -> Rows:
    """Linear probing, then fine-tuning of everything at one low rate with a cosine (Kumar et al. 2022)."""
    head = {"name": "head", "max_epochs": head_epochs, "lr": head_lr}
    tune = {"name": "tune", "max_epochs": tune_epochs, "schedule": "warmup_cosine"} | _everything(tune_lr)
    return [head | shared, tune | shared]


def gradual(
    *,
    stages: Sequence[str],
    down_to: str | None = None,
    head_epochs: int = 1,
    stage_epochs: int = 1,
    last_epochs: int = 5,
    head_lr: float = 1e-3,
    thaw_lr: float = 3e-4,
    backbone_lr: float = 1e-4,
    **shared: Any,
) -> Rows:
    """Head, then one more stage from the top each time (Howard & Ruder 2018), down to stage `down_to` or the first.

    The last phase, in which all of these train, takes `last_epochs`.
    """
    thawed = list(reversed(stages[0 if down_to is None else _place("down_to", down_to, stages) :]))
    rows = [{"name": "head", "max_epochs": head_epochs, "lr": head_lr}]
    for number, stage in enumerate(thawed, start=1):
        epochs = last_epochs if number == len(thawed) else stage_epochs
        row = {"name": f"thaw_{number}", "train": {"from": stage}, "max_epochs": epochs}
        rows.append(row | {"lr": thaw_lr, "backbone_lr": backbone_lr})
    return [row | shared for row in rows]


def first_k_frozen(
    *,
    stages: Sequence[str],
    k: int,
    epochs: int = 10,
    lr: float = 1e-3,
    backbone_lr: float = 1e-4,
    **shared: Any,
) -> Rows:
    """The first `k` stages stay frozen; the others and the head train at once."""
    require(
        0 <= k < len(stages),
        f"k {k} is outside [0, {len(stages)}): the stages are {summarise(stages)}; to freeze all, use linear_probe.",
    )
    row = {"name": "tune", "train": {"from": stages[k]}, "max_epochs": epochs, "lr": lr, "backbone_lr": backbone_lr}
    return [row | shared]


def fastai(
    *,
    stages: Sequence[str],
    epochs: int,
    base_lr: float = 2e-3,
    freeze_epochs: int = 1,
    lr_mult: float = 100.0,
    pct_start: float = 0.3,
    div: float = 5.0,
    **shared: Any,
) -> Rows:
    """The learning rates of fastai's `fine_tune`, and its Adam: one-cycle on the frozen body, then on everything.

    In the second phase the peak rates rise in equal ratios from `base_lr / 2 / lr_mult` for the first stage to
    `base_lr / 2` for the head. Momentum does not cycle, and BatchNorm follows `norm`, not fastai's rule.
    """
    require(lr_mult >= 1, f"lr_mult {lr_mult} is under 1, so the first stage would learn faster than the head.")
    require(div >= 1, f"div {div} is under 1, so the rate would begin above its peak; use 1 or more.")
    ratio = lr_mult ** (-1 / len(stages))
    adam = {
        "optimizer_args": {"betas": [0.9, 0.99], "eps": 1e-5},
        "weight_decay": 0.01,
        "schedule": "one_cycle",
    }
    head = {
        "name": "head",
        "max_epochs": freeze_epochs,
        "lr": base_lr,
        "schedule_args": {"peak_at": 0.99, "start_factor": 1 / 25, "end_factor": 1e-5},
    }
    thaw = {
        "name": "thaw",
        "train": "all",
        "max_epochs": epochs,
        "lr": base_lr / 2,
        "backbone_lr": base_lr / 2 * ratio,
        "layer_decay": ratio,
        "schedule_args": {"peak_at": pct_start, "start_factor": 1 / div, "end_factor": 1e-5},
    }
    return [head | adam | shared, thaw | adam | shared]


def bit(*, samples: int, lr: float = 3e-3, **shared: Any) -> Rows:
    """Everything at once with SGD; length and mixup by the size of the dataset: BiT-HyperRule (Kolesnikov et al. 2020).

    Their large batch is kept; a dataset smaller than `global_batch` gives a step of all its samples, and validation
    after each: set `validate_every_steps` there.
    """
    if samples < 20_000:
        rule = {"max_steps": 500, "warmup_steps": 100, "schedule_args": {"milestones": [0.4, 0.6, 0.8]}}
    else:
        max_steps = 10_000 if samples < 500_000 else 20_000
        rule = {"max_steps": max_steps, "warmup_steps": 500, "schedule_args": {"milestones": [0.3, 0.6, 0.9]}}
        rule["mixup"] = 0.1
    row = {"name": "tune", "global_batch": 512, "optimizer": "sgd", "schedule": "step"}
    return [row | rule | _everything(lr) | shared]


def layer_decay(*, epochs: int = 10, lr: float = 3e-4, layer_decay: float = 0.75, **shared: Any) -> Rows:
    """Everything at once, each stage at `layer_decay` times the rate of what is behind it, the head at `lr`.

    With AdamW, weight decay and a cosine, as vision transformers are fine-tuned (Bao et al. 2022, He et al. 2022).
    """
    row = {
        "name": "tune",
        "train": "all",
        "max_epochs": epochs,
        "lr": lr,
        "backbone_lr": lr * layer_decay,
        "layer_decay": layer_decay,
        "weight_decay": 0.05,
        "schedule": "warmup_cosine",
    }
    return [row | shared]


def norm_only(*, epochs: int = 10, lr: float = 1e-3, backbone_lr: float = 1e-3, **shared: Any) -> Rows:
    """Weights and biases of the normalisation layers, and the head (Frankle et al. 2021)."""
    row = {"name": "norms", "train": {"params": ["norms", "head/*"]}, "max_epochs": epochs}
    return [row | {"lr": lr, "backbone_lr": backbone_lr} | shared]


def surgical(
    *,
    stages: Sequence[str],
    stage: str,
    head_epochs: int = 5,
    stage_epochs: int = 10,
    head_lr: float = 1e-3,
    stage_lr: float = 1e-4,
    **shared: Any,
) -> Rows:
    """Head on the frozen backbone; then `stage` and nothing else (Lee et al. 2023).

    The first stages suit pictures that look otherwise than those of the pretraining, the last ones other labels.
    """
    _place("stage", stage, stages)
    head = {"name": "head", "max_epochs": head_epochs, "lr": head_lr}
    only = {"name": "stage", "train": {"params": [f"{stage}/*"]}, "max_epochs": stage_epochs, "backbone_lr": stage_lr}
    return [head | shared, only | shared]


def scratch(*, epochs: int = 100, lr: float = 1e-3, **shared: Any) -> Rows:
    """Everything from the first step at one rate, with batch statistics and a cosine; for `model.weights: none`."""
    row = {"name": "scratch", "max_epochs": epochs, "schedule": "warmup_cosine", "norm": "batch"}
    return [row | _everything(lr) | shared]


_FUNCTIONS: tuple[Callable[..., Rows], ...] = (
    linear_probe,
    freeze_thaw,
    lp_ft,
    gradual,
    first_k_frozen,
    fastai,
    bit,
    layer_decay,
    norm_only,
    surgical,
    scratch,
)
PRESETS = {function.__name__: function for function in _FUNCTIONS}
SET_BY_PRESET = {"name", "train", "max_epochs", "max_steps", "lr", "backbone_lr", "layer_decay"}
"""The keys of a phase that a preset gives each of its rows itself, by its own settings."""


def expand(config: Config, stages: Sequence[str], samples: int | None) -> list[Phase]:
    """The phases of a config; a preset becomes the plain list that it stands for.

    Args:
        config: of the run.
        stages: of its backbone, in order.
        samples: in the training stream; None where the dataset is not there.

    Raises:
        UserError: an unknown preset or setting, a missing one or one of a wrong type, or a size that is not known.
    """
    if isinstance(config.phases, list):
        return config.phases
    settings = dict(config.phases)
    name = str(settings.pop("preset", None))
    require(
        name in PRESETS,
        f"phases.preset '{name}' is unknown; presets are {', '.join(PRESETS)}.{nearest(name, list(PRESETS))}",
    )
    parameters = inspect.signature(PRESETS[name]).parameters
    facts = {key: value for key, value in (("stages", stages), ("samples", samples)) if key in parameters}
    require(
        facts.get("samples", 0) is not None,
        f"preset {name} goes by the number of training samples, which is not known; make the dataset with "
        "lit-transfer prepare, or plan with --samples N.",
    )
    own = [p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key not in facts]
    _check_settings(name, own, settings)
    hints = get_type_hints(PRESETS[name])
    given = {p.name: settings.pop(p.name) for p in own if p.name in settings}
    typed: object = parse(make_dataclass(name, [(key, hints[key]) for key in given]), given)
    return [parse(Phase, row) for row in PRESETS[name](**facts, **vars(typed), **settings)]


def _check_settings(preset: str, own: Sequence[inspect.Parameter], settings: dict[str, Any]) -> None:
    """Refuse settings that neither the preset nor a phase has, and miss those that have no default."""
    for parameter in own:
        given = parameter.name in settings or parameter.default is not parameter.empty
        require(given, f"preset {preset} needs '{parameter.name}'.")
    names = [parameter.name for parameter in own]
    known = [*names, *(key for key in Phase.__dataclass_fields__ if key not in SET_BY_PRESET)]
    for key in settings:
        require(
            key in known,
            f"'{key}' is not a setting of preset {preset}, which the config uses; write --phases.{names[-1]} and the "
            f"like (it has {', '.join(names)}), or put the list under phases that plan --expand prints."
            + nearest(key, known),
        )


def _everything(lr: float) -> dict[str, Any]:
    """What of a row trains the head and all stages at one rate."""
    return {"train": "all", "lr": lr, "backbone_lr": lr}


def _place(key: str, stage: str, stages: Sequence[str]) -> int:
    """The index of the stage that a setting names."""
    require(
        stage in stages,
        f"{key} '{stage}' is not a stage of the backbone; its stages are {summarise(stages)}."
        + nearest(stage, list(stages)),
    )
    return list(stages).index(stage)
