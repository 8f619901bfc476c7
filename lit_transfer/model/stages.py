"""Stage tables: how the forward pass of a family of networks is cut into ordered, named stages.

A table is believed only after `backbone.build_backbone` has compared it with the network's own forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torchvision.models as tv
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lit_transfer.errors import UserError, nearest

Step = str | Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """A named piece of a network.

    Args:
        name: what a cut is called.
        steps: run in order; a dotted path of a module of the network ("" is the network itself), or a
            function of (network, activations). Functions are module-level: a copied network keeps its stages.
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
    """The stages of a network without its last layer; `end` turns the last stage's output into a vector."""

    stages: tuple[Stage, ...]
    end: tuple[Step, ...] = ()

    @property
    def is_cut(self) -> bool:
        """False where the family has no table and the whole network is one stage."""
        return self.stages[0].steps != ("",)


BODY = Table((Stage("body", ("",)),))


def starts_with(name: str, prefixes: Iterable[str]) -> bool:
    """True if a dotted name equals a prefix or lies below it; the empty prefix holds everything."""
    return any(not prefix or name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


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


def flatten(net: nn.Module, x: Tensor) -> Tensor:
    """`[B, ...]` to `[B, F]`: all positions side by side."""
    return x.flatten(1)


def average(net: nn.Module, x: Tensor) -> Tensor:
    """The mean over positions: `[B, C, H, W]`, or tokens `[B, N, C]` without the class token, to `[B, C]`."""
    return x.mean((2, 3)) if x.ndim == 4 else x[:, getattr(net, "num_prefix_tokens", 0) :].mean(1)


def class_token(net: nn.Module, x: Tensor) -> Tensor:
    """The first token: `[B, N, C]` to `[B, C]`."""
    return x[:, 0]


def table_of(net: nn.Module) -> Table:
    """The stages a network declares or its family has; one stage `body` where there is no table.

    A network declares `stages`, a sequence of (name, (module paths in order)), and `classifier`, the path of
    its last layer. A subclass of a known family has a forward pass of its own, so it is not that family.
    """
    declared = getattr(net, "stages", None)
    if declared is not None and isinstance(getattr(net, "classifier", None), str):
        return Table(tuple(Stage(name, tuple(paths)) for name, paths in declared))
    return FAMILIES[type(net)](net) if type(net) in FAMILIES else BODY


def _alexnet(net: nn.Module) -> Table:
    convs = _split_at_convs(net.get_submodule("features"))
    stages = [Stage(f"conv{i}", steps) for i, steps in enumerate(convs, 1)]
    # Dropout stands before the layer it feeds: freezing fc6 must not silence the dropout in front of fc7.
    fc6 = Stage("fc6", ("avgpool", flatten, "classifier.0", "classifier.1", "classifier.2"))
    return Table((*stages, fc6, Stage("fc7", ("classifier.3", "classifier.4", "classifier.5"))))


def _vgg(net: nn.Module) -> Table:
    features = net.get_submodule("features")
    stages, block, place = [], 1, 0
    for steps in _split_at_convs(features):
        place += 1
        stages.append(Stage(f"conv{block}_{place}", steps))
        if isinstance(net.get_submodule(str(steps[-1])), nn.MaxPool2d):
            block, place = block + 1, 0
    fc6 = Stage("fc6", ("avgpool", flatten, "classifier.0", "classifier.1"))
    return Table((*stages, fc6, Stage("fc7", ("classifier.2", "classifier.3", "classifier.4"))))


def _split_at_convs(features: nn.Module) -> list[tuple[str, ...]]:
    """The children of `features` in groups, each a convolution and what follows it."""
    groups: list[tuple[str, ...]] = []
    for name, child in features.named_children():
        step = f"features.{name}"
        groups = [*groups, (step,)] if isinstance(child, nn.Conv2d) else [*groups[:-1], (*groups[-1], step)]
    return groups


def _resnet(net: nn.Module) -> Table:
    layers = tuple(Stage(f"layer{i}", (f"layer{i}",)) for i in range(1, 5))
    return Table((Stage("stem", ("conv1", "bn1", "relu", "maxpool")), *layers), end=("avgpool", flatten))


def _mobilenet_v2(net: nn.Module) -> Table:
    names = _children(net, "features")
    return Table(tuple(Stage(name, (name,)) for name in names), end=(_adaptive_average, flatten))


def _adaptive_average(net: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.adaptive_avg_pool2d(x, (1, 1))


def _efficientnet(net: nn.Module) -> Table:
    blocks = tuple(Stage(name, (name,)) for name in _children(net, "blocks"))
    top = Stage("top", ("conv_head", "bn2"))
    return Table((Stage("stem", ("conv_stem", "bn1")), *blocks, top), end=("global_pool",))


def _convnext(net: nn.Module) -> Table:
    stages = tuple(Stage(name, (name,)) for name in _children(net, "stages"))
    head = ("global_pool", "norm", "flatten", "pre_logits")
    top = tuple(f"head.{name}" for name in head if hasattr(net.head, name))
    return Table((Stage("stem", ("stem",)), *stages, Stage("top", ("norm_pre", *top))))


def _vit(net: nn.Module) -> Table:
    embedding = ("cls_token", "reg_token", "pos_embed", "pos_drop")
    stem = Stage("stem", ("patch_embed", _add_positions, "patch_drop", "norm_pre"), embedding)
    blocks = tuple(Stage(name, (name,)) for name in _children(net, "blocks"))
    return Table((stem, *blocks, Stage("top", ("norm", _pool_tokens, "fc_norm"), ("attn_pool",))))


def _add_positions(net: nn.Module, x: Tensor) -> Tensor:
    added: Tensor = net._pos_embed(x)  # type: ignore[operator]  # timm offers no public name for this step
    return added


def _pool_tokens(net: nn.Module, x: Tensor) -> Tensor:
    pooled: Tensor = net.pool(x)  # type: ignore[operator]
    return pooled


def _children(net: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in net.get_submodule(path).named_children()]


FAMILIES: dict[type, Callable[[nn.Module], Table]] = {
    tv.AlexNet: _alexnet,
    tv.VGG: _vgg,
    tv.ResNet: _resnet,
    tv.MobileNetV2: _mobilenet_v2,
    EfficientNet: _efficientnet,
    ConvNeXt: _convnext,
    VisionTransformer: _vit,
}
