"""Parameter groups and the optimizer of a phase, and the learning rate at a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lit_transfer.model.network import Network
from lit_transfer.phases.table import PhasePlan, lr_factor


def parameter_groups(network: Network, plan: PhasePlan) -> list[dict[str, Any]]:
    """What trains, as optimizer groups named `head/decay`, `head/no_decay`, `backbone/decay`, ...

    Vectors and scalars (biases, normalisation) have no weight decay, nor has what the network itself names in
    `no_weight_decay()`, as timm's do (position embeddings and tokens). Frozen parameters are in no group.
    """
    stages = range(network.first_trained, len(network.backbone.stages))
    named = {
        "head": list(network.head.named_parameters()),
        "backbone": [pair for index in stages for pair in network.backbone.stage_parameters(index)],
    }
    exempt = {f"net.{name}" for name in getattr(network.backbone.net, "no_weight_decay", set)()}
    groups: list[dict[str, Any]] = []
    for group in plan.groups:
        decayed: list[nn.Parameter] = [p for name, p in named[group.name] if p.ndim > 1 and name not in exempt]
        others: list[nn.Parameter] = [p for name, p in named[group.name] if p.ndim <= 1 or name in exempt]
        for kind, parameters, decay in (
            ("decay", decayed, plan.phase.weight_decay),
            ("no_decay", others, 0.0),
        ):
            if parameters:
                name = f"{group.name}/{kind}"
                groups.append({"params": parameters, "name": name, "lr": group.lr, "weight_decay": decay})
    covered = {id(p) for g in groups for p in g["params"]}
    assert covered == {id(p) for p in network.parameters() if p.requires_grad}, "every trained parameter in one group"
    return groups


def build_optimizer(network: Network, plan: PhasePlan) -> torch.optim.Optimizer:
    """The optimizer of a phase over its parameter groups; the network's cut must be set before."""
    groups = parameter_groups(network, plan)
    if plan.phase.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=plan.phase.lr, momentum=plan.phase.momentum)
    return torch.optim.AdamW(groups, lr=plan.phase.lr)


def lr_at(plan: PhasePlan, step: int) -> dict[str, float]:
    """Learning rate of `head` and `backbone` at a step of the phase, counted from 0; a pure function."""
    factor = lr_factor(plan.phase, step, plan.max_steps)
    return {group.name: group.lr * factor for group in plan.groups}


def set_lr(optimizer: torch.optim.Optimizer, plan: PhasePlan, step: int) -> None:
    """Give every group its learning rate at a step of the phase; mutates the optimizer."""
    rates = lr_at(plan, step)
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"].split("/")[0]]
