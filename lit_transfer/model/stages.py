"""Ordered, named stages: what a table of them is, who owns a tensor, and what a cut means (see `families.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lit_transfer.errors import UserError, nearest

Function = Callable[[Any, Tensor], Tensor]
Step = str | Function


def flatten(net: nn.Module, x: Tensor) -> Tensor:
    """`[B, ...]` to `[B, F]`: all positions side by side."""
    return x.flatten(1)


def average(net: nn.Module, x: Tensor) -> Tensor:
    """The mean over positions: `[B, C, H, W]`, or tokens `[B, N, C]` without the class token, to `[B, C]`."""
    return x.mean((2, 3)) if x.ndim == 4 else x[:, getattr(net, "num_prefix_tokens", 0) :].mean(1)


def maximum(net: nn.Module, x: Tensor) -> Tensor:
    """As `average`, the largest value in the place of the mean."""
    return x.amax((2, 3)) if x.ndim == 4 else x[:, getattr(net, "num_prefix_tokens", 0) :].amax(1)


def class_token(net: nn.Module, x: Tensor) -> Tensor:
    """The first token: `[B, N, C]` to `[B, C]`."""
    return x[:, 0]


@dataclass(frozen=True)
class Stage:
    """A named piece of a network.

    Args:
        name: what a cut is called.
        steps: run in order; a dotted path of a module of the network ("" is the network itself), or a
            function of (network, activations). Functions are module-level, or `partial`s of such: a copied
            network keeps its stages.
        owns: prefixes of parameters, buffers and modules that the functions among the steps use.
    """

    name: str
    steps: tuple[Step, ...]
    owns: tuple[str, ...] = ()

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Dotted prefixes of the tensors that belong to this stage."""
        return (*(step for step in self.steps if isinstance(step, str)), *self.owns)


@dataclass(frozen=True)
class Table:
    """The stages of a network without its last layer, and how they become a vector.

    Args:
        stages: in the order of the forward pass.
        end: from the last stage's output to what the network gives its last layer.
        average: the mean over positions of any stage's output.
        maximum: likewise, the largest value.
        pool: the network's own way from any stage's output to a vector.
    """

    stages: tuple[Stage, ...]
    end: tuple[Step, ...] = ()
    average: Function = average
    maximum: Function = maximum
    pool: Function = average

    @property
    def is_cut(self) -> bool:
        """False where the family has no table and the whole network is one stage."""
        return self.stages[0].steps != ("",)


BODY = Table((Stage("body", ("",)),))


def starts_with(name: str, prefixes: Iterable[str]) -> bool:
    """True if a dotted name equals a prefix or lies below it; the empty prefix holds everything."""
    return any(not prefix or name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def tensor_names(net: nn.Module) -> list[str]:
    """Names of all parameters and buffers, those not saved and those shared under several names included."""
    parameters = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    return parameters + [name for name, _ in net.named_buffers(remove_duplicate=False)]


def owners(names: Iterable[str], stages: Sequence[Stage], network: str) -> dict[str, int]:
    """The index of the stage that each tensor belongs to.

    Raises:
        UserError: tensors that belong to no stage, or to several.
    """
    numbered = list(enumerate(stages))
    found = {name: [i for i, stage in numbered if starts_with(name, stage.prefixes)] for name in names}
    for fault, wrong in (
        ("belong to no stage", [name for name, places in found.items() if not places]),
        ("belong to several stages", [name for name, places in found.items() if len(places) > 1]),
    ):
        if wrong:
            raise UserError(
                f"the stage table of {network} is wrong: {len(wrong)} tensor(s) {fault}: "
                f"{', '.join(wrong[:10])}; every tensor must stand in exactly one stage or the classifier."
            )
    return {name: places[0] for name, places in found.items()}


def find_cut(cut: str, names: Sequence[str], network: str) -> int:
    """The number of stages before a cut: a stage's name, `all` (none before it) or `head` (every stage is).

    Raises:
        UserError: no stage has that name.
    """
    if cut in ("all", "head"):
        return 0 if cut == "all" else len(names)
    if cut in names:
        return list(names).index(cut)
    if list(names) == [BODY.stages[0].name]:
        raise UserError(
            f"'{cut}' is not a stage of {network}: its family has no stage table, so only head and all can "
            "be cut; to cut elsewhere, name as module:callable a function whose network has `stages` "
            "(names, each with its module paths) and `classifier` (path of the last layer)."
        )
    raise UserError(
        f"'{cut}' is not a stage of {network}; its stages are {summarise(names)}.{nearest(cut, list(names))}"
    )


def summarise(names: Sequence[str]) -> str:
    """`stem, blocks.0 to blocks.6, top`: names with numbered runs of three or more shortened."""
    runs: list[list[str]] = []
    previous: tuple[str, int] | None = None
    for name in names:
        match = re.fullmatch(r"(.*?)(\d+)", name)
        current = (match[1], int(match[2])) if match else (name, -1)
        if previous and current == (previous[0], previous[1] + 1):
            runs[-1].append(name)
        else:
            runs.append([name])
        previous = current
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)
