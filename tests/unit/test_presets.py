from __future__ import annotations

import re
from typing import Any

import pytest
from layouts import NETWORKS, STAGES, config, real, row, small

from lit_transfer.config import Config
from lit_transfer.errors import UserError
from lit_transfer.phases.optim import lr_at
from lit_transfer.phases.presets import PRESETS, expand
from lit_transfer.phases.table import PhasePlan, resolve
from lit_transfer.reading import parse, read_yaml, to_yaml
from lit_transfer.schedule import Phase

SMALL_BATCH = {"global_batch": 8}
"""Five steps an epoch for the 40 samples of the tables below."""

TABLES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, dict[int, dict[str, float]]]]]] = {
    "linear_probe": (
        {"epochs": 2, "lr": 0.02},
        {"head": (10, {0: {"head": 0.02}, 9: {"head": 0.02}})},
    ),
    "freeze_thaw": (
        {"thaw_from": "blocks.1", "head_epochs": 1, "thaw_epochs": 3},
        {
            "head": (5, {0: {"head": 1e-3}, 4: {"head": 1e-3}}),
            "thaw": (15, {0: {"backbone": 1e-4, "head": 3e-4}, 14: {"backbone": 1e-4, "head": 3e-4}}),
        },
    ),
    "lp_ft": (
        {"head_epochs": 1, "tune_epochs": 2},
        {
            "head": (5, {0: {"head": 1e-3}, 4: {"head": 1e-3}}),
            "tune": (
                10,
                {
                    0: {"backbone": 3e-5, "head": 3e-5},
                    5: {"backbone": 1.5e-5, "head": 1.5e-5},
                    9: {"backbone": 7.341523e-7, "head": 7.341523e-7},
                },
            ),
        },
    ),
    "gradual": (
        {"down_to": "blocks.0", "stage_epochs": 2, "last_epochs": 3, "backbone_lr": 2e-4},
        {
            "head": (5, {0: {"head": 1e-3}, 4: {"head": 1e-3}}),
            "thaw_1": (10, {0: {"backbone": 2e-4, "head": 3e-4}, 9: {"backbone": 2e-4, "head": 3e-4}}),
            "thaw_2": (10, {0: {"backbone": 2e-4, "head": 3e-4}, 9: {"backbone": 2e-4, "head": 3e-4}}),
            "thaw_3": (15, {0: {"backbone": 2e-4, "head": 3e-4}, 14: {"backbone": 2e-4, "head": 3e-4}}),
        },
    ),
    "first_k_frozen": (
        {"k": 2, "epochs": 2},
        {"tune": (10, {0: {"backbone": 1e-4, "head": 1e-3}, 9: {"backbone": 1e-4, "head": 1e-3}})},
    ),
    "fastai": (
        {"epochs": 4},
        {
            "head": (5, {0: {"head": 8e-5}, 2: {"head": 7.5495644e-4}, 4: {"head": 1.8307295e-3}}),
            "thaw": (
                20,
                {
                    0: {"stem": 2e-6, "blocks.0": 6.3245553e-6, "blocks.1": 2e-5, "top": 6.3245553e-5, "head": 2e-4},
                    3: {"stem": 6e-6, "blocks.0": 1.8973666e-5, "blocks.1": 6e-5, "top": 1.8973666e-4, "head": 6e-4},
                    6: {"stem": 1e-5, "blocks.0": 3.1622777e-5, "blocks.1": 1e-4, "top": 3.1622777e-4, "head": 1e-3},
                    13: {
                        "stem": 5.00005e-6,
                        "blocks.0": 1.5811546e-5,
                        "blocks.1": 5.00005e-5,
                        "top": 1.5811546e-4,
                        "head": 5.00005e-4,
                    },
                },
            ),
        },
    ),
    "bit": (
        {},
        {
            "tune": (
                500,
                {
                    0: {"backbone": 0.0, "head": 0.0},
                    50: {"backbone": 1.5e-3, "head": 1.5e-3},
                    100: {"backbone": 3e-3, "head": 3e-3},
                    200: {"backbone": 3e-3, "head": 3e-3},
                    201: {"backbone": 3e-4, "head": 3e-4},
                    301: {"backbone": 3e-5, "head": 3e-5},
                    499: {"backbone": 3e-6, "head": 3e-6},
                },
            )
        },
    ),
    "layer_decay": (
        {"epochs": 2, "lr": 4e-4, "layer_decay": 0.5},
        {
            "tune": (
                10,
                {
                    0: {"stem": 2.5e-5, "blocks.0": 5e-5, "blocks.1": 1e-4, "top": 2e-4, "head": 4e-4},
                    5: {"stem": 1.25e-5, "blocks.0": 2.5e-5, "blocks.1": 5e-5, "top": 1e-4, "head": 2e-4},
                },
            )
        },
    ),
    "norm_only": (
        {"epochs": 2, "backbone_lr": 2e-3},
        {"norms": (10, {0: {"backbone": 2e-3, "head": 1e-3}, 9: {"backbone": 2e-3, "head": 1e-3}})},
    ),
    "surgical": (
        {"stage": "blocks.0", "head_epochs": 1, "stage_epochs": 2},
        {
            "head": (5, {0: {"head": 1e-3}, 4: {"head": 1e-3}}),
            "stage": (10, {0: {"backbone": 1e-4}, 9: {"backbone": 1e-4}}),
        },
    ),
    "scratch": (
        {"epochs": 2, "warmup_steps": 4},
        {
            "scratch": (
                10,
                {
                    0: {"backbone": 2e-4, "head": 2e-4},
                    3: {"backbone": 8e-4, "head": 8e-4},
                    4: {"backbone": 1e-3, "head": 1e-3},
                    7: {"backbone": 5e-4, "head": 5e-4},
                },
            )
        },
    ),
}
"""Of each preset, on four stages: settings, and by phase its steps and step -> learning rates."""

TRAINED = {
    "linear_probe": [{"head"}],
    "freeze_thaw": [{"head"}, {"blocks.1", "top", "head"}],
    "lp_ft": [{"head"}, {*STAGES, "head"}],
    "gradual": [{"head"}, {"top", "head"}, {"blocks.1", "top", "head"}, {"blocks.0", "blocks.1", "top", "head"}],
    "first_k_frozen": [{"blocks.1", "top", "head"}],
    "fastai": [{"head"}, {*STAGES, "head"}],
    "bit": [{*STAGES, "head"}],
    "layer_decay": [{*STAGES, "head"}],
    "surgical": [{"head"}, {"blocks.0"}],
    "scratch": [{*STAGES, "head"}],
}
"""The stages of which a preset trains all parameters, by phase; norm_only has a test of its own."""


def preset(name: str, **more: Any) -> Config:
    settings = {"preset": name} | TABLES[name][0]
    if name not in ("fastai", "bit"):
        settings |= SMALL_BATCH
    return config(settings | more)


def plans(name: str) -> list[PhasePlan]:
    batch = SMALL_BATCH if name == "fastai" else {}
    return resolve(preset(name, **batch), small(), samples=40)


def test_every_preset_has_a_table() -> None:
    assert list(TABLES) == list(PRESETS)
    assert {*TRAINED, "norm_only"} == {*PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_the_learning_rate_of_every_group_at_a_step(name: str) -> None:
    expected = TABLES[name][1]
    resolved = plans(name)
    assert [(plan.phase.name, plan.max_steps) for plan in resolved] == [
        (n, steps) for n, (steps, _) in expected.items()
    ]
    for plan in resolved:
        for step, rates in expected[plan.phase.name][1].items():
            assert lr_at(plan, step) == pytest.approx(rates, rel=1e-6, abs=0), f"{plan.phase.name}, step {step}"


@pytest.mark.parametrize("name", TRAINED)
def test_what_each_phase_trains(name: str) -> None:
    for plan, stages in zip(plans(name), TRAINED[name], strict=True):
        assert set(plan.trained) == {p.name for p in small().parameters if p.stage in stages}


def test_norm_only_trains_the_normalisation_layers_and_the_head() -> None:
    (plan,) = plans("norm_only")
    assert set(plan.trained) == {p.name for p in small().parameters if ".bn." in p.name or p.stage == "head"}


def test_norms_have_batch_statistics_only_from_scratch() -> None:
    for name in PRESETS:
        norms = {phase.norm for phase in expand(preset(name), STAGES, 40)}
        assert norms == {"batch" if name == "scratch" else "pretrained"}, name


def test_gradual_goes_down_to_the_first_stage_by_default() -> None:
    phases = expand(config({"preset": "gradual", "stage_epochs": 2, "last_epochs": 7}), STAGES, None)
    assert [(phase.train, phase.max_epochs) for phase in phases] == [
        ("head", 1),
        ({"from": "top"}, 2),
        ({"from": "blocks.1"}, 2),
        ({"from": "blocks.0"}, 2),
        ({"from": "stem"}, 7),
    ]


def test_freeze_thaw_thaws_everything_from_all() -> None:
    phases = expand(config({"preset": "freeze_thaw", "thaw_from": "all", "optimizer": "sgd"}), STAGES, None)
    assert phases == [
        Phase(name="head", train="head", max_epochs=5, lr=1e-3, optimizer="sgd"),
        Phase(name="thaw", train="all", max_epochs=10, lr=3e-4, backbone_lr=1e-4, optimizer="sgd"),
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_any_other_key_of_a_phase_holds_for_all_rows(name: str) -> None:
    shared = {"weight_decay": 0.3, "global_batch": 16, "max_minutes": 5, "until": {"metric": "val/loss", "patience": 2}}
    for phase in expand(preset(name, **shared), STAGES, 40):
        assert (phase.weight_decay, phase.global_batch, phase.max_minutes) == (0.3, 16, 5)
        assert phase.until is not None and phase.until.patience == 2


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", PRESETS)
def test_the_expansion_written_out_is_the_same_run(name: str, network: str) -> None:
    layout = real(network)
    settings = preset(name, stage="blocks.0") if name == "surgical" else preset(name)
    phases = expand(settings, layout.stages, 40)
    listed = config([{k: v for k, v in vars(phase).items() if v is not None} for phase in phases])
    again = parse(Config, read_yaml(to_yaml(listed)))
    assert again.phases == phases == expand(again, layout.stages, None)
    assert resolve(again, layout, 40) == resolve(settings, layout, 40)


def test_a_list_is_its_own_expansion() -> None:
    rows = [row(name="a"), row(name="b", train={"last": 1}, backbone_lr=0.01)]
    assert expand(config(rows), STAGES, None) == [
        Phase(name="a", max_epochs=2, lr=0.1),
        Phase(name="b", train={"last": 1}, max_epochs=2, lr=0.1, backbone_lr=0.01),
    ]


NAMES = ", ".join(PRESETS)
WRONG = [
    ({"preset": "freezethaw"}, f"phases.preset 'freezethaw' is unknown; presets are {NAMES}. Did you mean"),
    ({"thaw_from": "top"}, "phases.preset 'None' is unknown"),
    ({"preset": "freeze_thaw"}, "preset freeze_thaw needs 'thaw_from'."),
    ({"preset": "first_k_frozen"}, "preset first_k_frozen needs 'k'."),
    ({"preset": "fastai"}, "preset fastai needs 'epochs'."),
    ({"preset": "surgical"}, "preset surgical needs 'stage'."),
    ({"preset": "linear_probe", "epoch": 1}, "plan --expand prints. Did you mean 'epochs'?"),
    (
        {"preset": "freeze_thaw", "thaw_from": "top", "lr": 1},
        "'lr' is not a setting of preset freeze_thaw, which the config uses; write --phases.backbone_lr and",
    ),
    ({"preset": "bit", "samples": 3}, "'samples' is not a setting of preset bit"),
    ({"preset": "gradual", "stages": ["a"]}, "'stages' is not a setting of preset gradual"),
    ({"preset": "linear_probe", "epochs": "x"}, "epochs 'x' is not a whole number."),
    ({"preset": "first_k_frozen", "k": "two"}, "k 'two' is not a whole number."),
    ({"preset": "linear_probe", "mixup": "x"}, "mixup 'x' is not a number."),
    ({"preset": "linear_probe", "lr": 0}, "phase 'head': lr 0.0 is not positive."),
    ({"preset": "first_k_frozen", "k": -1}, "k -1 is outside [0, 4): the stages are stem, blocks.0, blocks.1, top"),
    ({"preset": "first_k_frozen", "k": 4}, "k 4 is outside [0, 4)"),
    (
        {"preset": "gradual", "down_to": "block.1"},
        "down_to 'block.1' is not a stage of the backbone; its stages are",
    ),
    ({"preset": "surgical", "stage": "blok.1"}, "stage 'blok.1' is not a stage of the backbone"),
    ({"preset": "surgical", "stage": "head"}, "stage 'head' is not a stage of the backbone"),
    ({"preset": "fastai", "epochs": 1, "lr_mult": 0}, "lr_mult 0.0 is under 1"),
    ({"preset": "fastai", "epochs": 1, "div": 0.5}, "div 0.5 is under 1"),
]


@pytest.mark.parametrize(("settings", "said"), WRONG)
def test_a_wrong_preset_says_what_is_wrong(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        expand(config(settings), STAGES, 40)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["name", "train", "max_epochs", "max_steps", "lr", "backbone_lr", "layer_decay"])
def test_what_differs_between_rows_is_no_setting_for_all_of_them(key: str) -> None:
    with pytest.raises(UserError, match=f"'{key}' is not a setting of preset lp_ft"):
        expand(config({"preset": "lp_ft", key: 1}), STAGES, 40)


def test_only_bit_needs_the_size_of_the_dataset() -> None:
    for name in set(PRESETS) - {"bit"}:
        assert expand(preset(name), STAGES, None) == expand(preset(name), STAGES, 40)
    with pytest.raises(UserError, match=r"preset bit goes by the number of training samples, .* plan with --samples N"):
        expand(preset("bit"), STAGES, None)
