from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from lit_transfer.config import Config
from lit_transfer.errors import UserError
from lit_transfer.phases.table import (
    Group,
    check_metrics,
    cut_of,
    differences,
    expand,
    fingerprint,
    fingerprint_hash,
    lr_factor,
    resolve,
)
from lit_transfer.reading import parse
from lit_transfer.recipe import Phase

STAGES = ("stem", "blocks.0", "blocks.1", "top")


def config(phases: Any, **sections: Any) -> Config:
    streams = {"train": {"manifest": "x", "split": "train"}, "val": {"manifest": "x", "split": "val"}}
    plain = {"name": "run", "data": streams, "model": {"backbone": "timm/net"}, "phases": phases}
    return parse(Config, plain | sections)


def phase(**settings: Any) -> dict[str, Any]:
    return {"name": "a", "max_epochs": 2, "lr": 0.1} | settings


THAW = phase(train={"from": "blocks.1"}, backbone_lr=0.01)


def test_freeze_thaw_is_two_phases() -> None:
    phases = expand(
        config(
            {
                "preset": "freeze_thaw",
                "thaw_from": "top",
                "head_epochs": 3,
                "backbone_lr": 2e-4,
                "optimizer": "sgd",
            }
        )
    )
    assert phases == [
        Phase(name="head", train="head", max_epochs=3, lr=1e-3, optimizer="sgd"),
        Phase(name="thaw", train={"from": "top"}, max_epochs=10, lr=3e-4, backbone_lr=2e-4, optimizer="sgd"),
    ]
    assert expand(config({"preset": "freeze_thaw", "thaw_from": "all"}))[1].train == "all"


def test_a_list_is_its_own_expansion() -> None:
    assert expand(config([THAW])) == [
        Phase(name="a", train={"from": "blocks.1"}, max_epochs=2, lr=0.1, backbone_lr=0.01)
    ]


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        (
            {"preset": "freezethaw"},
            "phases.preset 'freezethaw' is unknown; presets are freeze_thaw. Did you mean",
        ),
        ({"thaw_from": "top"}, "phases.preset 'None' is unknown"),
        ({"preset": "freeze_thaw"}, "preset freeze_thaw needs 'thaw_from'."),
        (
            {"preset": "freeze_thaw", "thaw_from": "top", "head_epoch": 1},
            "prints. Did you mean 'head_epochs'?",
        ),
        (
            {"preset": "freeze_thaw", "thaw_from": "top", "lr": 1},
            "'lr' is not a setting of preset freeze_thaw, which the config uses; write --phases.backbone_lr and",
        ),
        (
            {"preset": "freeze_thaw", "thaw_from": "top", "head_epochs": "x"},
            "max_epochs 'x' is not a whole number.",
        ),
        (
            {"preset": "freeze_thaw", "thaw_from": "top", "thaw_lr": 0},
            "phase 'thaw': lr 0.0 is not positive.",
        ),
    ],
)
def test_a_wrong_preset_says_what_is_wrong(preset: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        expand(config(preset))


@pytest.mark.parametrize(
    ("train", "cut", "trained"),
    [
        ("head", "head", ()),
        ("all", "all", STAGES),
        ({"from": "stem"}, "stem", STAGES),
        ({"from": "blocks.1"}, "blocks.1", ("blocks.1", "top")),
    ],
)
def test_resolve_says_what_trains_and_for_how_long(train: Any, cut: str, trained: tuple[str, ...]) -> None:
    rates = {} if train == "head" else {"backbone_lr": 0.01}
    (plan,) = resolve(config([phase(train=train, global_batch=8, **rates)]), STAGES, samples=17)
    assert plan.cut == cut == cut_of(plan.phase)
    backbone = [Group("backbone", trained, 0.01)] if trained else []
    assert list(plan.groups) == [Group("head", (), 0.1), *backbone]
    assert (plan.steps_per_epoch, plan.max_steps) == (3, 6), "the last batch holds one sample"


@pytest.mark.parametrize(
    ("row", "sections", "said"),
    [
        (
            phase(train={"from": "blocks.9"}, backbone_lr=0.1),
            {},
            "phase 'a': train.from 'blocks.9' is not a stage of timm/net",
        ),
        (
            phase(schedule="warmup_cosine", warmup_steps=6, global_batch=8),
            {},
            "phase 'a': warmup_steps 6 is not below its 6 steps; lower it.",
        ),
        (
            phase(restore_best=True),
            {"data": {"train": {"manifest": "x", "split": "train"}}},
            "phase 'a': restore_best needs validation; give data.val.",
        ),
        (
            phase(until={"metric": "val/loss", "patience": 1}),
            {"data": {"train": {"manifest": "x", "split": "train"}}},
            "phase 'a': until needs validation; give data.val.",
        ),
    ],
)
def test_rules_that_need_the_stages_or_the_data(row: dict[str, Any], sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        resolve(config([row], **sections), STAGES, samples=17)
    assert "\n" not in str(caught.value)


def test_a_metric_to_watch_must_be_one_of_the_task() -> None:
    row = phase(until={"metric": "val/f1", "patience": 1})
    settings = config([row], monitor="val/accuracy")
    check_metrics(settings, expand(settings), ["accuracy", "f1"])
    check_metrics(config([phase()]), [], [])  # val/loss is always there
    with pytest.raises(UserError, match=r"^monitor 'val/accuracy' is not a metric of this task; there are val/loss, "):
        check_metrics(settings, expand(settings), ["f1"])
    with pytest.raises(UserError, match=r"phase 'a': until\.metric 'val/f1' is not a metric .*'val/f2'"):
        check_metrics(settings, expand(settings), ["accuracy", "f2"])


def test_a_wrong_stage_lists_the_stages_and_the_nearest() -> None:
    row = phase(train={"from": "block.1"}, backbone_lr=0.1)
    with pytest.raises(UserError, match=r"its stages are stem, blocks.0, blocks.1, top.*Did you mean 'blocks.1'\?"):
        resolve(config([row]), STAGES, samples=17)


@pytest.mark.parametrize(
    ("step", "factor", "remark"),
    [
        (0, 1 / 5, "the first step already moves"),
        (1, 2 / 5, "linear"),
        (3, 4 / 5, "the last step of the warm-up is below the full rate"),
        (4, 1.0, "the full rate"),
        (6, 0.853553, "a quarter of the cosine: (1 + cos 45 degrees) / 2"),
        (8, 0.5, "half of the cosine"),
        (10, 0.146447, "three quarters"),
        (11, 0.038060, "the last step still moves"),
        (12, 0.0, "zero where the next step would be"),
        (20, 0.0, "and never below"),
    ],
)
def test_warmup_and_cosine(step: int, factor: float, remark: str) -> None:
    row = Phase(name="a", max_epochs=1, lr=0.1, schedule="warmup_cosine", warmup_steps=4)
    assert lr_factor(row, step, max_steps=12) == pytest.approx(factor, abs=1e-6), remark


@pytest.mark.parametrize(
    ("step", "factor", "remark"),
    [(0, 1.0, "without a warm-up it begins at the full rate"), (3, 0.5, "half way"), (6, 0.0, "the end")],
)
def test_cosine_without_warmup(step: int, factor: float, remark: str) -> None:
    row = Phase(name="a", max_epochs=1, lr=0.1, schedule="warmup_cosine")
    assert lr_factor(row, step, max_steps=6) == pytest.approx(factor, abs=1e-9), remark


@pytest.mark.parametrize("step", [0, 5, 1000])
def test_constant_is_constant(step: int) -> None:
    assert lr_factor(Phase(name="a", max_epochs=1, lr=0.1), step, max_steps=6) == 1.0


def printed(settings: Config, samples: int = 17) -> dict[str, Any]:
    return fingerprint(settings, resolve(settings, STAGES, samples), {"train": "t" * 8, "val": "v" * 8})


@pytest.mark.parametrize(
    "sections",
    [
        {"seed": 1},
        {"image": {"size": 64}},
        {"augment": {"flip_h": 0.5}},
        {"model": {"backbone": "timm/net", "weights": "none"}},
        {"objective": {"label_smoothing": 0.1}},
        {"monitor": "val/accuracy"},
        {"trainer": {"precision": "bf16-mixed"}},
        {"data": {"train": {"manifest": "x", "split": "all"}, "val": {"manifest": "x", "split": "val"}}},
        {
            "data": {
                "train": {"manifest": "x", "split": "train", "fraction": 0.5},
                "val": {"manifest": "x", "split": "val"},
            }
        },
        {
            "data": {
                "train": {"manifest": "x", "split": "train"},
                "val": {"manifest": "x", "split": "val"},
                "label": "l",
            }
        },
    ],
)
def test_what_decides_the_result_is_in_the_fingerprint(sections: dict[str, Any]) -> None:
    base, other = printed(config([THAW])), printed(config([THAW], **sections))
    assert fingerprint_hash(base) != fingerprint_hash(other)
    assert len(differences(base, other)) == 1
    (section,) = sections
    assert differences(base, other)[0].startswith({"trainer": "precision"}.get(section, section))


@pytest.mark.parametrize("change", [{"max_epochs": 3}, {"lr": 0.2}, {"norm": "batch"}, {"momentum": 0.8}])
def test_every_phase_is_in_the_fingerprint(change: dict[str, Any]) -> None:
    base, other = printed(config([THAW])), printed(config([THAW | change]))
    (key,) = change
    assert f"phases[0].{key}: {THAW.get(key, getattr(Phase(**THAW), key))} -> {change[key]}" in differences(base, other)


def test_the_data_is_in_the_fingerprint() -> None:
    plans = resolve(config([THAW]), STAGES, 17)
    prints = [fingerprint(config([THAW]), plans, {"train": digest}) for digest in ("a", "b")]
    assert differences(*prints) == ["data.train.digest: a -> b"]
    assert printed(config([THAW]), samples=17) != printed(config([THAW]), samples=170)


@pytest.mark.parametrize(
    "sections",
    [
        {"name": "other"},
        {"runs_dir": "elsewhere"},
        {"trainer": {"devices": 2, "log_every_steps": 1, "progress": False}},
        {"tracking": {"wandb": "off"}},
        {
            "data": {
                "train": {"manifest": "y", "split": "train"},
                "val": {"manifest": "y", "split": "val"},
                "workers": 0,
            }
        },
    ],
)
def test_where_a_run_is_computed_is_not_in_the_fingerprint(sections: dict[str, Any]) -> None:
    base, other = printed(config([THAW])), printed(config([THAW], **sections))
    assert fingerprint_hash(base) == fingerprint_hash(other)


def test_a_fingerprint_survives_json() -> None:
    value = printed(config([THAW]))
    assert differences(value, json.loads(json.dumps(value))) == []
    assert fingerprint_hash(value) == fingerprint_hash(json.loads(json.dumps(value)))


def test_differences_name_the_place() -> None:
    old = {"a": 1, "b": {"c": [1, {"d": 2}]}, "gone": 1, "list": [1]}
    new = {"a": 1, "b": {"c": [1, {"d": 3}]}, "new": 2, "list": [1, 2]}
    assert differences(old, new) == [
        "b.c[1].d: 2 -> 3",
        "gone: 1 -> None",
        "list: [1] -> [1, 2]",
        "new: None -> 2",
    ]
    assert differences(old, old) == []


def test_a_plan_is_plain_data() -> None:
    (plan,) = resolve(config([THAW]), STAGES, 17)
    assert dataclasses.replace(plan) == plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.cut = "all"  # type: ignore[misc]
