from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from layouts import config, row

from lit_transfer.errors import UserError
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.heads import build_head
from lit_transfer.model.network import Network
from lit_transfer.phases.optim import build_optimizer, lr_at, lr_factor, optimizer_class, set_lr
from lit_transfer.phases.table import PhasePlan, resolve
from lit_transfer.recipe import Head, Model
from lit_transfer.schedule import Phase


def network(name: str = "timm/test_efficientnet", image_size: int = 32) -> Network:
    backbone = build_backbone(Model(backbone=name, weights="none"), image_size=image_size)
    return Network(backbone, build_head(Head(hidden=[8]), backbone.features, 3, seed=0))


def planned(net: Network, **settings: Any) -> PhasePlan:
    """The plan of a phase of six steps, whose parameters are then the ones that train."""
    rates = {} if settings.get("train", "head") == "head" else {"backbone_lr": 0.01}
    phases = [row(**{"weight_decay": 0.5, "global_batch": 8} | rates | settings)]
    (plan,) = resolve(config(phases), net.layout(), samples=17)
    net.set_trained(plan.trained, plan.phase.norm)
    return plan


def groups_of(optimizer: torch.optim.Optimizer, net: Network) -> dict[str, set[str]]:
    """Names of the parameters by name of the group."""
    known = {id(p): name for name, p in net.named_parameters()}
    return {group["name"]: {known[id(p)] for p in group["params"]} for group in optimizer.param_groups}


def test_groups_split_head_and_backbone_matrices_and_vectors() -> None:
    net = network()
    optimizer = build_optimizer(net, planned(net, train={"from": "blocks.3"}))
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        "backbone/decay": (0.01, 0.5),
        "backbone/no_decay": (0.01, 0.0),
        "head/decay": (0.1, 0.5),
        "head/no_decay": (0.1, 0.0),
    }
    found = groups_of(optimizer, net)
    head = {f"head.{name}" for name, _ in net.head.named_parameters()}
    assert found["head/decay"] == {name for name in head if name.endswith("weight")}
    assert found["head/no_decay"] == {name for name in head if name.endswith("bias")}
    assert all(net.get_parameter(name).ndim == 4 for name in found["backbone/decay"])
    assert all(net.get_parameter(name).ndim == 1 for name in found["backbone/no_decay"])


def test_what_the_network_exempts_has_no_weight_decay() -> None:
    net = network("timm/test_vit", image_size=160)
    found = groups_of(build_optimizer(net, planned(net, train="all")), net)
    matrices = {
        name.removeprefix("backbone.net.") for name in found["backbone/no_decay"] if net.get_parameter(name).ndim > 1
    }
    assert matrices == {"cls_token", "pos_embed"}
    assert "backbone.net.patch_embed.proj.weight" in found["backbone/decay"]


@pytest.mark.parametrize("train", ["head", "all", {"from": "top"}, {"last": 3}, {"params": ["norms", "*.bias"]}])
def test_every_trained_parameter_is_in_one_group_and_no_frozen_one(train: Any) -> None:
    net = network()
    optimizer = build_optimizer(net, planned(net, train=train))
    inside = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(set(inside)) == len(inside)
    assert set(inside) == {id(p) for p in net.parameters() if p.requires_grad}


def test_a_network_that_trains_something_else_is_a_fault_of_the_program() -> None:
    net = network()
    plan = planned(net)
    net.set_cut("top")
    with pytest.raises(AssertionError, match="every parameter that trains is in one group"):
        build_optimizer(net, plan)


@pytest.mark.parametrize(
    ("settings", "cls", "arguments"),
    [
        ({"optimizer": "sgd", "momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8, "nesterov": False}),
        ({"optimizer": "SGD", "optimizer_args": {"nesterov": True}}, torch.optim.SGD, {"nesterov": True}),
        ({}, torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
        (
            {"optimizer_args": {"betas": [0.9, 0.99], "eps": 1e-5}},
            torch.optim.AdamW,
            {"betas": (0.9, 0.99), "eps": 1e-5},
        ),
        ({"optimizer": "NAdam"}, torch.optim.NAdam, {"momentum_decay": 0.004}),
        ({"optimizer": "rmsprop", "optimizer_args": {"momentum": 0.5}}, torch.optim.RMSprop, {"momentum": 0.5}),
    ],
)
def test_optimizers_are_those_of_torch(settings: dict[str, Any], cls: type, arguments: dict[str, Any]) -> None:
    net = network()
    optimizer = build_optimizer(net, planned(net, train={"from": "top"}, **settings))
    assert type(optimizer) is cls
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.01, 0.5),
        (0.01, 0.0),
        (0.1, 0.5),
        (0.1, 0.0),
    ]
    for group in optimizer.param_groups:
        assert {key: group[key] for key in arguments} == arguments
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "adamv"}, "phase 'a': optimizer 'adamv' is not in torch.optim, which has adadelta, "),
        ({"optimizer": "adamv"}, "Did you mean 'adam"),
        ({"optimizer": "optimizer"}, "phase 'a': optimizer 'optimizer' is not in torch.optim"),
        ({"optimizer": "lr_scheduler"}, "phase 'a': optimizer 'lr_scheduler' is not in torch.optim"),
        ({"optimizer_args": {"lr": 1}}, "phase 'a': optimizer_args.lr stands in a field of its own"),
        (
            {"optimizer_args": {"weight_decay": 1}},
            "phase 'a': optimizer_args.weight_decay stands in a field of its own",
        ),
        (
            {"optimizer": "SGD", "optimizer_args": {"momentum": 0.5}},
            "phase 'a': optimizer_args.momentum stands in a field of its own",
        ),
        (
            {"optimizer": "LBFGS"},
            "phase 'a': optimizer LBFGS with {} cannot be made (",
        ),
        ({"optimizer_args": {"beta": 1}}, "phase 'a': optimizer adamw with {'beta': 1} cannot be made ("),
        (
            {"optimizer_args": {"eps": -1}},
            "phase 'a': optimizer adamw with {'eps': -1} cannot be made (Invalid epsilon",
        ),
    ],
)
def test_a_wrong_optimizer_says_what_is_wrong(settings: dict[str, Any], said: str) -> None:
    net = network()
    plan = planned(net, **settings)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        build_optimizer(net, plan)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Rprop", "SparseAdam"])
def test_an_optimizer_without_weight_decay_says_so(name: str) -> None:
    net = network()
    said = f"phase 'a': optimizer {name} has no weight decay, but weight_decay is 0.5; set it to 0."
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        build_optimizer(net, planned(net, optimizer=name))
    assert build_optimizer(net, planned(net, optimizer=name, weight_decay=0.0))


def test_an_optimizer_is_found_without_a_network() -> None:
    assert optimizer_class(Phase(name="a", max_epochs=1, lr=0.1, optimizer="Adam")) is torch.optim.Adam


def test_weight_decay_moves_matrices_only() -> None:
    net = network()
    optimizer = build_optimizer(net, planned(net, optimizer="sgd", momentum=0.0))
    before = {name: p.clone() for name, p in net.head.named_parameters()}
    for parameter in net.head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.head.named_parameters():
        share = 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1.0
        assert torch.allclose(parameter, before[name] * share, rtol=1e-6, atol=0.0), name


def test_rates_follow_the_schedule_in_every_group() -> None:
    net = network()
    plan = planned(net, train={"last": 2}, layer_decay=0.5, schedule="warmup_cosine", warmup_steps=2)
    assert lr_at(plan, 0) == pytest.approx({"blocks.4": 0.005 / 3, "top": 0.01 / 3, "head": 0.1 / 3})
    assert lr_at(plan, 2) == pytest.approx({"blocks.4": 0.005, "top": 0.01, "head": 0.1})
    assert lr_at(plan, 4) == pytest.approx({"blocks.4": 0.0025, "top": 0.005, "head": 0.05})
    optimizer = build_optimizer(net, plan)
    for step in (4, 0, 2):
        set_lr(optimizer, plan, step)
        found = {group["name"]: group["lr"] for group in optimizer.param_groups}
        kinds = [f"{part}/{kind}" for part in ("blocks.4", "top", "head") for kind in ("decay", "no_decay")]
        assert found == {kind: lr_at(plan, step)[kind.split("/")[0]] for kind in kinds}


def test_rates_of_patterns_follow_the_schedule() -> None:
    net = network()
    patterns = {"params": {"stem/*": 0.5, "head/*": 0.25}}
    plan = planned(net, train=patterns, lr=None, backbone_lr=None, schedule="plateau")
    optimizer = build_optimizer(net, plan)
    set_lr(optimizer, plan, step=3, drops=1)
    expected = {"stem/*/decay": 0.05, "stem/*/no_decay": 0.05, "head/*/decay": 0.025, "head/*/no_decay": 0.025}
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(expected)


def phase(schedule: str, **settings: Any) -> Phase:
    return Phase(**{"name": "a", "max_epochs": 1, "lr": 0.1, "schedule": schedule} | settings)


STEP = functools.partial(phase, "step", warmup_steps=4)
WARMUP = functools.partial(phase, "warmup_cosine", warmup_steps=4)
CYCLE = functools.partial(phase, "one_cycle")


@pytest.mark.parametrize(
    ("settings", "max_steps", "step", "factor", "remark"),
    [
        (phase("constant"), 6, 0, 1.0, "constant"),
        (phase("constant"), 6, 1000, 1.0, "constant"),
        (WARMUP(), 12, 0, 1 / 5, "the first step already moves"),
        (WARMUP(), 12, 1, 2 / 5, "linear"),
        (WARMUP(), 12, 3, 4 / 5, "the last step of the warm-up is below the full rate"),
        (WARMUP(), 12, 4, 1.0, "the full rate"),
        (WARMUP(), 12, 6, 0.853553, "a quarter of the cosine: (1 + cos 45 degrees) / 2"),
        (WARMUP(), 12, 8, 0.5, "half of the cosine"),
        (WARMUP(), 12, 10, 0.146447, "three quarters"),
        (WARMUP(), 12, 11, 0.038060, "the last step still moves"),
        (WARMUP(), 12, 12, 0.0, "zero where the next step would be"),
        (WARMUP(), 12, 20, 0.0, "and never below"),
        (WARMUP(schedule_args={"end_factor": 0.2}), 12, 8, 0.6, "half way between 1 and end_factor"),
        (WARMUP(schedule_args={"end_factor": 0.2}), 12, 12, 0.2, "end_factor"),
        (phase("warmup_cosine"), 6, 0, 1.0, "without a warm-up it begins at the full rate"),
        (phase("warmup_cosine"), 6, 3, 0.5, "half way"),
        (CYCLE(), 16, 0, 0.04, "start_factor"),
        (CYCLE(), 16, 2, 0.52, "half of the way up"),
        (CYCLE(), 16, 4, 1.0, "the peak, after a quarter"),
        (CYCLE(), 16, 10, 0.500005, "half of the way down"),
        (CYCLE(), 16, 16, 1e-5, "end_factor"),
        (CYCLE(), 16, 40, 1e-5, "and never below"),
        (CYCLE(schedule_args={"peak_at": 0}), 16, 0, 1.0, "the peak at once"),
        (CYCLE(schedule_args={"peak_at": 1, "start_factor": 0}), 16, 8, 0.5, "the peak at the end"),
        (CYCLE(schedule_args={"peak_at": 1}), 16, 16, 1.0, "the peak at the end"),
        (STEP(), 20, 0, 0.0, "linear from zero"),
        (STEP(), 20, 3, 3 / 4, "linear"),
        (STEP(), 20, 4, 1.0, "the full rate"),
        (STEP(), 20, 6, 1.0, "at a milestone it has not fallen yet"),
        (STEP(), 20, 7, 0.1, "after it, it has"),
        (STEP(), 20, 12, 0.1, "the second"),
        (STEP(), 20, 13, 0.01, "the second"),
        (STEP(), 20, 19, 0.001, "the third"),
        (STEP(schedule_args={"milestones": [0.5], "gamma": 0.5}), 20, 10, 1.0, "a milestone of one's own"),
        (STEP(schedule_args={"milestones": [0.5], "gamma": 0.5}), 20, 11, 0.5, "a milestone of one's own"),
        (STEP(schedule_args={"milestones": [0.1]}), 20, 3, 3 / 4, "no milestone counts while warming up"),
        (phase("plateau"), 6, 5, 1.0, "nothing has happened yet"),
    ],
)
def test_the_share_of_the_rate_at_a_step(
    settings: Phase, max_steps: int, step: int, factor: float, remark: str
) -> None:
    assert lr_factor(settings, step, max_steps) == pytest.approx(factor, abs=1e-6), remark


@pytest.mark.parametrize(("drops", "factor"), [(0, 1.0), (1, 0.5), (3, 0.125)])
def test_a_plateau_lowers_the_rate_by_gamma_each_time(drops: int, factor: float) -> None:
    settings = phase("plateau", schedule_args={"gamma": 0.5})
    assert lr_factor(settings, 100, max_steps=6, drops=drops) == pytest.approx(factor)
    assert lr_factor(phase("constant"), 100, max_steps=6, drops=drops) == 1.0


@pytest.mark.parametrize("settings", [WARMUP(), CYCLE(), STEP()])
def test_a_schedule_is_never_negative_and_never_over_the_full_rate(settings: Phase) -> None:
    assert all(0 <= lr_factor(settings, step, 20) <= 1 for step in range(40))
