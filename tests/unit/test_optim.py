from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.heads import build_head
from lit_transfer.model.network import Network
from lit_transfer.phases.optim import build_optimizer, lr_at, parameter_groups, set_lr
from lit_transfer.phases.table import Group, PhasePlan
from lit_transfer.recipe import Head, Model, Phase


def network(cut: str) -> Network:
    backbone = build_backbone(Model(backbone="timm/test_efficientnet", weights="none"), image_size=32)
    net = Network(backbone, build_head(Head(hidden=[8]), backbone.features, 3, seed=0))
    net.set_cut(cut)
    return net


def planned(cut: str, **settings: Any) -> PhasePlan:
    rates = {} if cut == "head" else {"train": {"from": cut}, "backbone_lr": 0.01}
    phase = Phase(**{"name": "a", "max_epochs": 2, "lr": 0.1, "weight_decay": 0.5} | rates | settings)
    groups = (Group("head", (), 0.1),) + ((Group("backbone", (cut,), 0.01),) if rates else ())
    return PhasePlan(phase, cut, groups, 3, 6)


def test_groups_split_head_and_backbone_matrices_and_vectors() -> None:
    net = network("blocks.3")
    groups = {group["name"]: group for group in parameter_groups(net, planned("blocks.3"))}
    assert list(groups) == ["head/decay", "head/no_decay", "backbone/decay", "backbone/no_decay"]
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "head/decay": (0.1, 0.5),
        "head/no_decay": (0.1, 0.0),
        "backbone/decay": (0.01, 0.5),
        "backbone/no_decay": (0.01, 0.0),
    }
    names = {id(p): name for name, p in net.named_parameters()}
    found = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert found["head/decay"] == {n for n in names.values() if n.startswith("head.") and n.endswith("weight")}
    assert found["head/no_decay"] == {n for n in names.values() if n.startswith("head.") and n.endswith("bias")}
    assert all(net.get_parameter(n).ndim == 4 for n in found["backbone/decay"])
    assert all(net.get_parameter(n).ndim == 1 for n in found["backbone/no_decay"])


def test_what_the_network_exempts_has_no_weight_decay() -> None:
    backbone = build_backbone(Model(backbone="timm/test_vit", weights="none"), image_size=160)
    net = Network(backbone, build_head(Head(), backbone.features, 3, seed=0))
    net.set_cut("all")
    groups = {group["name"]: group["params"] for group in parameter_groups(net, planned("all", train="all"))}
    names = {id(p): name.removeprefix("backbone.net.") for name, p in net.named_parameters()}
    kept, decayed = ({names[id(p)] for p in groups[f"backbone/{kind}"] if p.ndim > 1} for kind in ("no_decay", "decay"))
    assert kept == {"cls_token", "pos_embed"}
    assert "patch_embed.proj.weight" in decayed and not kept & decayed


@pytest.mark.parametrize("cut", ["head", "top", "stem"])
def test_every_trained_parameter_is_in_one_group_and_no_frozen_one(cut: str) -> None:
    net = network(cut)
    inside = [id(p) for group in parameter_groups(net, planned(cut)) for p in group["params"]]
    assert len(set(inside)) == len(inside)
    assert set(inside) == {id(p) for p in net.parameters() if p.requires_grad}


def test_a_network_cut_elsewhere_is_a_fault_of_the_program() -> None:
    with pytest.raises(AssertionError, match="every trained parameter in one group"):
        parameter_groups(network("top"), planned("head"))


def test_optimizers_are_those_of_torch() -> None:
    net = network("top")
    sgd = build_optimizer(net, planned("top", optimizer="sgd", momentum=0.8))
    assert type(sgd) is torch.optim.SGD
    assert [group["momentum"] for group in sgd.param_groups] == [0.8] * 4
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.5, 0.0, 0.5, 0.0]
    adamw = build_optimizer(net, planned("top"))
    assert type(adamw) is torch.optim.AdamW
    assert [group["lr"] for group in adamw.param_groups] == [0.1, 0.1, 0.01, 0.01]


def test_weight_decay_moves_matrices_only() -> None:
    net = network("head")
    optimizer = build_optimizer(net, planned("head", optimizer="sgd", momentum=0.0))
    before = {name: p.clone() for name, p in net.head.named_parameters()}
    for parameter in net.head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.head.named_parameters():
        share = 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1.0
        assert torch.allclose(parameter, before[name] * share, rtol=1e-6, atol=0.0), name


def test_rates_follow_the_schedule_in_every_group() -> None:
    plan = planned("top", schedule="warmup_cosine", warmup_steps=2)
    assert lr_at(plan, 0) == pytest.approx({"head": 0.1 / 3, "backbone": 0.01 / 3})
    assert lr_at(plan, 2) == pytest.approx({"head": 0.1, "backbone": 0.01})
    assert lr_at(plan, 4) == pytest.approx({"head": 0.05, "backbone": 0.005})
    optimizer = build_optimizer(network("top"), plan)
    for step in (4, 0, 2):
        set_lr(optimizer, plan, step)
        rates = lr_at(plan, step)
        expected = [rates["head"], rates["head"], rates["backbone"], rates["backbone"]]
        assert [group["lr"] for group in optimizer.param_groups] == expected
