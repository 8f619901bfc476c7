"""Parameter groups and the optimizer of a phase, and the learning rate at a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lit_transfer.errors import UserError, nearest, require
from lit_transfer.model.network import Network
from lit_transfer.phases.table import PhasePlan
from lit_transfer.schedule import Phase


def build_optimizer(network: Network, plan: PhasePlan) -> torch.optim.Optimizer:
    """The optimizer of a phase over its groups; what trains must have been set in the network before.

    Raises:
        UserError: torch.optim has no such optimizer, or it does not take the arguments or the groups.
    """
    phase = plan.phase
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert set(parameters) == set(plan.trained), "every parameter that trains is in one group, and no other"
    groups = [
        {"params": [parameters[name] for name in g.parameters], "name": g.name, "lr": g.lr}
        | {"weight_decay": g.weight_decay}
        for g in plan.groups
    ]
    momentum = {"momentum": phase.momentum} if phase.optimizer.lower() == "sgd" else {}
    arguments: dict[str, Any] = {"lr": plan.groups[0].lr} | momentum | phase.optimizer_args
    try:
        optimizer: torch.optim.Optimizer = optimizer_class(phase)(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"phase '{phase.name}': optimizer {phase.optimizer} with {phase.optimizer_args} cannot be made ({error})."
        ) from error
    unused = phase.weight_decay > 0 and "weight_decay" not in optimizer.defaults
    require(
        not unused,
        f"phase '{phase.name}': optimizer {phase.optimizer} has no weight decay, but weight_decay is "
        f"{phase.weight_decay:g}; set it to 0.",
    )
    return optimizer


def divide_gradients(parameters: Iterable[nn.Parameter], share: float) -> None:
    """Divide the gradients, where there are any, by a number; mutates them."""
    if share != 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= share


def check_optimizers(network: Network, plans: Sequence[PhasePlan]) -> None:
    """Build the optimizer of every phase, for the faults that this finds; mutates what trains in the network."""
    for plan in plans:
        network.set_trained(plan.trained)
        build_optimizer(network, plan)


def optimizer_class(phase: Phase) -> Any:
    """The class of torch.optim that a phase names, in any case."""
    found = {name.lower(): value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    found = {name: cls for name, cls in found.items() if issubclass(cls, torch.optim.Optimizer)}
    wanted = phase.optimizer.lower()
    require(
        wanted in found and wanted != "optimizer",
        f"phase '{phase.name}': optimizer '{phase.optimizer}' is not in torch.optim, which has "
        f"{', '.join(sorted(set(found) - {'optimizer'}))}.{nearest(wanted, list(found))}",
    )
    for key in phase.optimizer_args:
        require(
            key not in ("lr", "weight_decay", "params") and (key, wanted) != ("momentum", "sgd"),
            f"phase '{phase.name}': optimizer_args.{key} stands in a field of its own (lr, backbone_lr, weight_decay, "
            "momentum of sgd); set it there.",
        )
    return found[wanted]


def lr_factor(phase: Phase, step: int, max_steps: int, drops: int = 0) -> float:
    """Share of the full learning rate at a step of the phase, counted from 0; a pure function.

    Args:
        phase: its schedule.
        step: of the phase.
        max_steps: of the phase; where it ends early, the schedule is cut short.
        drops: how often `plateau` has lowered the rate.
    """
    args = phase.full_schedule_args
    match phase.schedule:
        case "constant":
            return 1.0
        case "plateau":
            return float(args["gamma"] ** drops)
        case "warmup_cosine":
            if step < phase.warmup_steps:
                return (step + 1) / (phase.warmup_steps + 1)
            return _cosine(1.0, args["end_factor"], (step - phase.warmup_steps) / (max_steps - phase.warmup_steps))
        case "one_cycle":
            peak = args["peak_at"] * max_steps
            if step < peak:
                return _cosine(args["start_factor"], 1.0, step / peak)
            return _cosine(1.0, args["end_factor"], (step - peak) / max(max_steps - peak, 1e-9))
        case "step":
            if step < phase.warmup_steps:
                return step / phase.warmup_steps
            return float(args["gamma"] ** _passed(args["milestones"], step, max_steps))


def _cosine(start: float, end: float, done: float) -> float:
    """From start to end along half a cosine."""
    return start + (end - start) * 0.5 * (1 - math.cos(math.pi * min(1.0, done)))


def _passed(milestones: Sequence[float], step: int, max_steps: int) -> int:
    return sum(step > round(share * max_steps) for share in milestones)


def lr_at(plan: PhasePlan, step: int, drops: int = 0) -> dict[str, float]:
    """Learning rates at a step of the phase, counted from 0, by whose they are (`Group.rate_name`)."""
    factor = lr_factor(plan.phase, step, plan.max_steps, drops)
    return {name: lr * factor for name, lr in plan.rates.items()}


def set_lr(optimizer: torch.optim.Optimizer, plan: PhasePlan, step: int, drops: int = 0) -> None:
    """Give every group its learning rate at a step of the phase; mutates the optimizer."""
    rates = lr_at(plan, step, drops)
    for group, planned in zip(optimizer.param_groups, plan.groups, strict=True):
        group["lr"] = rates[planned.rate_name]


def current_lr(optimizer: torch.optim.Optimizer, plan: PhasePlan) -> dict[str, float]:
    """The learning rates that an optimizer has, by whose they are (`Group.rate_name`)."""
    return {planned.rate_name: group["lr"] for group, planned in zip(optimizer.param_groups, plan.groups, strict=True)}
