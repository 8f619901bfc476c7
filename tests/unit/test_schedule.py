from __future__ import annotations

import re
from typing import Any

import pytest
from layouts import row

from lit_transfer.errors import UserError
from lit_transfer.reading import parse
from lit_transfer.schedule import SCHEDULES, Phase, Until

STAGES_TRAIN = {"train": "all", "backbone_lr": 0.01}
FORMS = "is not head, all, {from: STAGE}, {last: N} or {params: [PATTERN, ...]}."


def phase(**settings: Any) -> Phase:
    return parse(Phase, row(**settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "a b"}, "phase 'a b': a name has letters, digits, _ and -."),
        ({"name": "a/b"}, "phase 'a/b': a name has letters, digits, _ and -."),
        ({"train": "top"}, f"phase 'a': train 'top' {FORMS}"),
        ({"train": {}}, f"phase 'a': train {{}} {FORMS}"),
        ({"train": {"upto": "a"}}, f"phase 'a': train {{'upto': 'a'}} {FORMS}"),
        ({"train": {"from": "a", "last": 1}}, f"phase 'a': train {{'from': 'a', 'last': 1}} {FORMS}"),
        ({"train": {"from": 3}}, f"phase 'a': train {{'from': 3}} {FORMS}"),
        ({"train": {"from": "head"}}, "phase 'a': train.from 'head' is no stage; write train: head."),
        ({"train": {"from": "all"}}, "phase 'a': train.from 'all' is no stage; write train: all."),
        ({"train": {"last": 0}}, "phase 'a': train.last 0 is not a count of stages."),
        ({"train": {"last": "top"}}, "phase 'a': train.last 'top' is not a count of stages."),
        ({"train": {"params": "norms"}}, f"phase 'a': train {{'params': 'norms'}} {FORMS}"),
        ({"train": {"params": [1]}}, f"phase 'a': train {{'params': [1]}} {FORMS}"),
        ({"train": {"params": []}}, "phase 'a': train.params is empty, so the phase trains nothing; give a pattern."),
        ({"train": {"params": {}}}, "phase 'a': train.params is empty, so the phase trains nothing; give a pattern."),
        ({"train": {"params": {"x": 0}}}, "phase 'a': train.params ['x'] has a learning rate that is not positive."),
        ({"train": {"params": {"x": "1"}}}, "phase 'a': train.params ['x'] has a learning rate that is not positive."),
        ({"train": {"params": {"x": None}}}, "phase 'a': train.params ['x'] has a learning rate that is not positive."),
    ],
)
def test_what_trains_is_one_of_five_forms(settings: dict[str, Any], said: str) -> None:
    assert_refused({"backbone_lr": 0.01} | settings, said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": 0}, "phase 'a': lr 0.0 is not positive."),
        ({"lr": -1}, "phase 'a': lr -1.0 is not positive."),
        ({"lr": None}, "phase 'a': lr is missing; it is the head's learning rate."),
        ({"train": "all", "backbone_lr": 0}, "phase 'a': backbone_lr 0.0 is not positive."),
        ({"train": "all"}, "phase 'a': backbone_lr None must be positive where stages train; try lr / 10."),
        ({"train": {"last": 1}}, "phase 'a': backbone_lr None must be positive where stages train; try lr / 10."),
        ({"backbone_lr": 0.01}, "phase 'a': backbone_lr 0.01 is given but only the head trains; remove it."),
        (STAGES_TRAIN | {"layer_decay": 0}, "phase 'a': layer_decay 0.0 is outside (0, 1]."),
        (STAGES_TRAIN | {"layer_decay": 1.1}, "phase 'a': layer_decay 1.1 is outside (0, 1]."),
        ({"layer_decay": 0.5}, "phase 'a': layer_decay 0.5 has no use where no stage's rate follows from backbone_lr."),
        (
            {"train": {"params": {"norms": 0.1}}},
            "phase 'a': lr has no use where each pattern has its rate; remove it.",
        ),
        (
            {"train": {"params": {"norms": 0.1}}, "backbone_lr": 0.01},
            "phase 'a': lr and backbone_lr has no use where each pattern has its rate; remove it.",
        ),
        (
            {"train": {"params": {"norms": 0.1}}, "lr": None, "layer_decay": 0.5},
            "phase 'a': layer_decay 0.5 has no use where no stage's rate follows from backbone_lr.",
        ),
    ],
)
def test_learning_rates_are_given_where_they_are_used_and_nowhere_else(settings: dict[str, Any], said: str) -> None:
    assert_refused(settings, said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_steps": 9}, "phase 'a': max_epochs 2 and max_steps 9 are both given; remove one."),
        ({"max_epochs": None}, "phase 'a': max_epochs None and max_steps None are both missing; give one."),
        ({"max_epochs": 0}, "phase 'a': max_epochs 0 is under 1."),
        ({"max_epochs": None, "max_steps": 0}, "phase 'a': max_steps 0 is under 1."),
        ({"validate_every_steps": 0}, "phase 'a': validate_every_steps 0 is under 1."),
        ({"max_minutes": -1}, "phase 'a': max_minutes -1.0 is "),
        ({"max_minutes": 0}, "phase 'a': max_minutes 0.0 is "),
    ],
)
def test_a_phase_has_one_length(settings: dict[str, Any], said: str) -> None:
    assert_refused(settings, said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"global_batch": 0}, "phase 'a': global_batch 0 is under 1."),
        ({"accumulate": 0}, "phase 'a': accumulate 0 is under 1."),
        (
            {"accumulate": 9, "global_batch": 8},
            "phase 'a': accumulate 9 is over global_batch 8, whose parts it counts.",
        ),
        ({"weight_decay": -1}, "phase 'a': weight_decay -1.0 is negative."),
        ({"warmup_steps": -1}, "phase 'a': warmup_steps -1 is negative."),
        ({"augment_strength": -0.5}, "phase 'a': augment_strength -0.5 is negative."),
        ({"mixup": -0.1}, "phase 'a': mixup -0.1 is negative."),
        ({"cutmix": -0.1}, "phase 'a': cutmix -0.1 is negative."),
        ({"momentum": 1}, "phase 'a': momentum 1.0 is outside [0, 1)."),
        ({"momentum": -0.1}, "phase 'a': momentum -0.1 is outside [0, 1)."),
        ({"clip_norm": 0}, "phase 'a': clip_norm 0.0 is not positive."),
        ({"label_smoothing": 1}, "phase 'a': label_smoothing 1.0 is outside [0, 1)."),
        ({"ema_decay": 1}, "phase 'a': ema_decay 1.0 is outside [0, 1)."),
        ({"ema_decay": -0.1}, "phase 'a': ema_decay -0.1 is outside [0, 1)."),
        (
            STAGES_TRAIN | {"grad_checkpointing": True, "norm": "batch"},
            "phase 'a': grad_checkpointing computes a stage twice, and norm batch would count each batch twice",
        ),
    ],
)
def test_numbers_have_a_range(settings: dict[str, Any], said: str) -> None:
    assert_refused(settings, said)


@pytest.mark.parametrize(
    ("schedule", "settings", "said"),
    [
        ("constant", {"warmup_steps": 5}, "warmup_steps 5 needs schedule warmup_cosine or step, not constant."),
        ("one_cycle", {"warmup_steps": 5}, "warmup_steps 5 needs schedule warmup_cosine or step, not one_cycle."),
        ("plateau", {"warmup_steps": 5}, "warmup_steps 5 needs schedule warmup_cosine or step, not plateau."),
        ("constant", {"gamma": 0.1}, "schedule_args 'gamma' is not of schedule constant, which has none."),
        (
            "one_cycle",
            {"peak": 0.1},
            "schedule_args 'peak' is not of schedule one_cycle, which has peak_at, start_factor, end_factor. Did you "
            "mean 'peak_at'?",
        ),
        ("one_cycle", {"peak_at": 1.5}, "schedule_args.peak_at 1.5 is outside [0, 1]."),
        ("one_cycle", {"start_factor": 2}, "schedule_args.start_factor 2 is outside [0, 1]."),
        ("warmup_cosine", {"end_factor": -0.1}, "schedule_args.end_factor -0.1 is outside [0, 1]."),
        ("step", {"gamma": 1.1}, "schedule_args.gamma 1.1 is outside [0, 1]."),
        ("step", {"gamma": "0.1x"}, "schedule_args.gamma '0.1x' is not a float, as 0.1 is."),
        ("step", {"milestones": 0.5}, "schedule_args.milestones 0.5 is not a list, as [0.3, 0.6, 0.9] is."),
        ("step", {"milestones": [0.6, 0.3]}, "schedule_args.milestones [0.6, 0.3] must rise, each in (0, 1)"),
        ("step", {"milestones": [0.5, 0.5]}, "schedule_args.milestones [0.5, 0.5] must rise, each in (0, 1)"),
        ("step", {"milestones": [30, 60]}, "schedule_args.milestones [30, 60] must rise, each in (0, 1)"),
        ("step", {"milestones": ["x"]}, "schedule_args.milestones ['x'] must rise, each in (0, 1)"),
        ("plateau", {"metric": "train/loss"}, "schedule_args.metric 'train/loss' must be a val/... metric."),
        ("plateau", {"patience": 0}, "schedule_args.patience 0 is under 1."),
        ("plateau", {"patience": 1.5}, "schedule_args.patience 1.5 is not a int, as 2 is."),
        ("plateau", {"min_delta": -1}, "schedule_args.min_delta -1 is negative."),
        ("plateau", {"gamma": 2}, "schedule_args.gamma 2 is outside [0, 1]."),
    ],
)
def test_a_schedule_has_arguments_of_its_own(schedule: str, settings: dict[str, Any], said: str) -> None:
    given = settings if "warmup_steps" in settings else {"schedule_args": settings}
    assert_refused({"schedule": schedule} | given, f"phase 'a': {said}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metric": "train/loss", "patience": 1}, "until.metric 'train/loss' must be a validation metric: val/..."),
        ({"metric": "val/loss"}, "until gives no condition; give one of patience, below, above."),
        (
            {"metric": "val/loss", "patience": 1, "below": 0.5},
            "until gives patience and below; give one of patience, below, above.",
        ),
        (
            {"metric": "val/loss", "below": 0.0, "above": 0.0},
            "until gives below and above; give one of patience, below, above.",
        ),
        ({"metric": "val/loss", "patience": 0}, "until.patience 0 is under 1."),
        ({"metric": "val/loss", "patience": 1, "min_delta": -1}, "until.min_delta -1.0 is negative."),
        (
            {"metric": "val/loss", "below": 0.5, "min_delta": 0.1},
            "until.min_delta 0.1 belongs to patience, which is not given; remove it.",
        ),
    ],
)
def test_until_has_one_condition(settings: dict[str, Any], said: str) -> None:
    assert_refused({"until": settings}, said)


def assert_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(said)) as caught:
        phase(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": {"from": "top"}, "backbone_lr": 0.01, "layer_decay": 0.5},
        {"train": {"last": 2}, "backbone_lr": 0.01},
        {"train": {"params": ["head/*"]}},
        {"train": {"params": ["stem/*"]}, "lr": None, "backbone_lr": 0.01, "layer_decay": 0.5},
        {"train": {"params": {"stem/*": 1, "head/*": 0.1}}, "lr": None},
        {"max_epochs": None, "max_steps": 1, "max_minutes": 0.5},
        {"schedule": "warmup_cosine", "warmup_steps": 5, "schedule_args": {"end_factor": 0}},
        {"schedule": "step", "warmup_steps": 5, "schedule_args": {"milestones": []}},
        {"until": {"metric": "val/loss", "below": 0.0}},
        {"until": {"metric": "val/accuracy", "above": 0.9}},
        {"accumulate": 8, "global_batch": 8, "grad_checkpointing": True, "ema_decay": 0},
    ],
)
def test_what_keeps_the_rules_is_taken(settings: dict[str, Any]) -> None:
    assert phase(**settings)


def test_the_arguments_of_a_schedule_have_defaults() -> None:
    for name, defaults in SCHEDULES.items():
        assert phase(schedule=name).full_schedule_args == defaults
    given = phase(schedule="step", schedule_args={"gamma": 0.5})
    assert given.full_schedule_args == {"milestones": [0.3, 0.6, 0.9], "gamma": 0.5}
    assert given.schedule_args == {"gamma": 0.5} and SCHEDULES["step"]["gamma"] == 0.1


def test_patterns_are_those_of_params_with_their_rates() -> None:
    assert phase().patterns is None and phase(train={"last": 1}, backbone_lr=0.01).patterns is None
    assert phase(train={"params": ["norms", "head/*"]}).patterns == {"norms": None, "head/*": None}
    assert phase(train={"params": {"norms": 0.1}}, lr=None).patterns == {"norms": 0.1}


def test_until_stays_as_it_is_written() -> None:
    assert phase(until={"metric": "val/loss", "patience": 3}).until == Until(metric="val/loss", patience=3)
