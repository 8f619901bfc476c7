"""Stage tables: how the forward pass of each family of networks is cut into stages.

Adding a family is one function, one line in `FAMILIES` and one line in `tests/unit/test_backbone.py`. A table is
believed only after `backbone.build_backbone` has compared it with the network's own forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision.models as tv
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.eva import Eva
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.squeezenet import Fire

from lit_transfer.model.stages import BODY, Function, Stage, Table, average, class_token, flatten


def table_of(net: nn.Module) -> Table:
    """The stages a network declares or its family has; one stage `body` where there is no table.

    A network declares `stages`, a sequence of (name, (module paths in order)), and `classifier`, the path of
    its last layer. A subclass of a known family has a forward pass of its own, so it is not that family.
    """
    declared = getattr(net, "stages", None)
    if declared is not None and isinstance(getattr(net, "classifier", None), str):
        return Table(tuple(Stage(name, tuple(paths)) for name, paths in declared))
    return FAMILIES[type(net)](net) if type(net) in FAMILIES else BODY


def _children(net: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in net.get_submodule(path).named_children()]


def _each(paths: list[str]) -> tuple[Stage, ...]:
    """Every module a stage, named by its path."""
    return tuple(Stage(path, (path,)) for path in paths)


def _split_at(net: nn.Module, path: str, *kinds: type) -> list[tuple[str, ...]]:
    """The children of a module in groups, each one of the kinds and what follows it."""
    groups: list[tuple[str, ...]] = []
    for name, child in net.get_submodule(path).named_children():
        step = f"{path}.{name}"
        groups = [*groups, (step,)] if isinstance(child, kinds) else [*groups[:-1], (*groups[-1], step)]
    return groups


# torchvision


def _alexnet(net: nn.Module) -> Table:
    convs = _split_at(net, "features", nn.Conv2d)
    stages = [Stage(f"conv{i}", steps) for i, steps in enumerate(convs, 1)]
    # Dropout stands before the layer it feeds: freezing fc6 must not silence the dropout in front of fc7.
    fc6 = Stage("fc6", ("avgpool", flatten, "classifier.0", "classifier.1", "classifier.2"))
    return Table((*stages, fc6, Stage("fc7", ("classifier.3", "classifier.4", "classifier.5"))))


def _vgg(net: nn.Module) -> Table:
    stages, block, place = [], 1, 0
    for steps in _split_at(net, "features", nn.Conv2d):
        place += 1
        stages.append(Stage(f"conv{block}_{place}", steps))
        if isinstance(net.get_submodule(steps[-1]), nn.MaxPool2d):
            block, place = block + 1, 0
    fc6 = Stage("fc6", ("avgpool", flatten, "classifier.0", "classifier.1"))
    return Table((*stages, fc6, Stage("fc7", ("classifier.2", "classifier.3", "classifier.4"))))


def _googlenet(net: nn.Module) -> Table:
    inception = [f"inception{name}" for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
    pools = {"conv1": "maxpool1", "conv3": "maxpool2", "inception3b": "maxpool3", "inception4e": "maxpool4"}
    return _inception_stages(["conv1", "conv2", "conv3", *inception], pools)


def _inception_v3(net: nn.Module) -> Table:
    stem = [f"Conv2d_{name}" for name in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")]
    mixed = [f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")]
    return _inception_stages([*stem, *mixed], {"Conv2d_2b_3x3": "maxpool1", "Conv2d_4a_3x3": "maxpool2"})


def _inception_stages(names: list[str], pools: dict[str, str]) -> Table:
    """Modules by name, some followed by a max pooling; the first sees the input as the original weights did."""
    followed = [(name, pools[name]) if name in pools else (name,) for name in names]
    first = Stage(names[0], (_transform_input, *followed[0]))
    later = [Stage(steps[0], steps) for steps in followed[1:]]
    return Table((first, *later), end=("avgpool", flatten))


def _transform_input(net: Any, x: Tensor) -> Tensor:
    return net._transform_input(x)  # type: ignore[no-any-return]


def _resnet(net: nn.Module) -> Table:
    stem = Stage("stem", ("conv1", "bn1", "relu", "maxpool"))
    return Table((stem, *_each([f"layer{i}" for i in range(1, 5)])), end=("avgpool", flatten))


def _squeezenet(net: nn.Module) -> Table:
    groups = _split_at(net, "features", nn.Conv2d, Fire)
    fires = [Stage(f"fire{i}", steps) for i, steps in enumerate(groups[1:], 2)]
    return Table((Stage("conv1", groups[0]), *fires), end=(average,))


def _shufflenet_v2(net: nn.Module) -> Table:
    units = [path for i in (2, 3, 4) for path in _children(net, f"stage{i}")]
    stem = Stage("stem", ("conv1", "maxpool"))
    return Table((stem, *_each(units), Stage("conv5", ("conv5",))), end=(average,))


def _densenet(net: nn.Module) -> Table:
    paths = _children(net, "features")
    blocks = [Stage(path.rpartition(".")[2], (path,)) for path in paths[4:-1]]
    return Table((Stage("stem", tuple(paths[:4])), *blocks, Stage("top", (paths[-1], _relu))), end=(average,))


def _relu(net: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.relu(x)


def _features(net: nn.Module) -> Table:
    return Table(_each(_children(net, "features")), end=(average,))


def _mobilenet_v3(net: nn.Module) -> Table:
    top = Stage("top", ("avgpool", flatten, "classifier.0", "classifier.1"))
    return Table((*_each(_children(net, "features")), top))


def _stem_and_stages(net: nn.Module) -> tuple[Stage, ...]:
    """A stem, then stages of blocks; the layer that halves the map begins each stage but the first."""
    stem, first, *rest = _children(net, "features")
    steps = [(first,), *zip(rest[::2], rest[1::2], strict=True)]
    return (Stage("stem", (stem,)), *(Stage(f"stage{i}", paths) for i, paths in enumerate(steps, 1)))


def _tv_convnext(net: nn.Module) -> Table:
    return Table((*_stem_and_stages(net), Stage("top", ("avgpool", "classifier.0", "classifier.1"))))


def _tv_swin(net: nn.Module) -> Table:
    stages = (*_stem_and_stages(net), Stage("top", ("norm",)))
    return Table(stages, ("permute", "avgpool", "flatten"), _average_nhwc, _maximum_nhwc, _average_nhwc)


def _average_nhwc(net: nn.Module, x: Tensor) -> Tensor:
    """The mean over positions of `[B, H, W, C]`."""
    return x.mean((1, 2))


def _maximum_nhwc(net: nn.Module, x: Tensor) -> Tensor:
    """The largest value over positions of `[B, H, W, C]`."""
    return x.amax((1, 2))


def _tv_vit(net: nn.Module) -> Table:
    stem = Stage("stem", (_embed, "encoder.dropout"), ("conv_proj", "class_token", "encoder.pos_embedding"))
    paths = _children(net, "encoder.layers")
    blocks = [Stage(path.rpartition(".")[2], (path,)) for path in paths]
    return Table(
        (stem, *blocks, Stage("top", ("encoder.ln",))), (class_token,), _average_patches, _maximum_patches, class_token
    )


def _embed(net: Any, x: Tensor) -> Tensor:
    """Images to tokens, the class token first, with their positions added."""
    tokens = torch.cat([net.class_token.expand(len(x), -1, -1), net._process_input(x)], dim=1)
    return tokens + net.encoder.pos_embedding  # type: ignore[no-any-return]


def _average_patches(net: nn.Module, x: Tensor) -> Tensor:
    """The mean over tokens `[B, N, C]` without the class token."""
    return x[:, 1:].mean(1)


def _maximum_patches(net: nn.Module, x: Tensor) -> Tensor:
    """The largest value over tokens `[B, N, C]` without the class token."""
    return x[:, 1:].amax(1)


# timm


def _timm_resnet(net: nn.Module) -> Table:
    stem = Stage("stem", ("conv1", "bn1", "act1", "maxpool"))
    return Table((stem, *_each([f"layer{i}" for i in range(1, 5)])), end=("global_pool",))


def _efficientnet(net: nn.Module) -> Table:
    stem, top = Stage("stem", ("conv_stem", "bn1")), Stage("top", ("conv_head", "bn2"))
    return Table((stem, *_each(_children(net, "blocks")), top), end=("global_pool",))


def _mobilenet_v3_v4(net: nn.Module) -> Table:
    top = Stage("top", ("global_pool", "conv_head", "norm_head", "act2", "flatten"))
    return Table((Stage("stem", ("conv_stem", "bn1")), *_each(_children(net, "blocks")), top))


def _convnext(net: nn.Module) -> Table:
    head = ("global_pool", "norm", "flatten", "pre_logits")
    top = tuple(f"head.{name}" for name in head if hasattr(net.head, name))
    stages = _each(_children(net, "stages"))
    return Table((Stage("stem", ("stem",)), *stages, Stage("top", ("norm_pre", *top))))


def _swin(net: nn.Module) -> Table:
    stages = (Stage("stem", ("patch_embed",)), *_each(_children(net, "layers")), Stage("top", ("norm",)))
    return Table(stages, ("head.global_pool",), _average_nhwc, _maximum_nhwc, _average_nhwc)


def _vit(net: nn.Module) -> Table:
    embedding = ("cls_token", "reg_token", "pos_embed", "pos_drop")
    stem = Stage("stem", ("patch_embed", _add_positions, "patch_drop", "norm_pre"), embedding)
    top = Stage("top", ("norm", _pool_tokens, "fc_norm"), ("attn_pool",))
    return Table((stem, *_each(_children(net, "blocks")), top), pool=_own_pool(net))


def _add_positions(net: Any, x: Tensor) -> Tensor:
    return net._pos_embed(x)  # type: ignore[no-any-return]  # timm offers no public name for this step


def _pool_tokens(net: Any, x: Tensor) -> Tensor:
    return net.pool(x)  # type: ignore[no-any-return]


def _own_pool(net: nn.Module) -> Function:
    return class_token if net.global_pool == "token" else average


def _eva(net: Any) -> Table:
    # One draw of positions serves all blocks; blocks that stand alone would each draw their own.
    if net.patch_drop is not None or getattr(net.rope, "aug_active", False):
        return BODY
    embedding = ("cls_token", "reg_token", "pos_embed", "pos_drop", "rope")
    stem = Stage("stem", ("patch_embed", _add_absolute_positions, "norm_pre"), embedding)
    blocks = [Stage(f"blocks.{i}", (partial(_eva_block, i),), (f"blocks.{i}",)) for i in range(len(net.blocks))]
    top = Stage("top", ("norm", _pool_tokens, "fc_norm"), ("attn_pool",))
    return Table((stem, *blocks, top), pool=_own_pool(net))


def _add_absolute_positions(net: Any, x: Tensor) -> Tensor:
    return net._pos_embed(x)[0]  # type: ignore[no-any-return]


def _eva_block(index: int, net: Any, x: Tensor) -> Tensor:
    """A block with its rotary positions (Su et al. 2021): one table for all blocks, or of each block its own."""
    if net.rope is None:
        return net.blocks[index](x)  # type: ignore[no-any-return]
    side = math.isqrt(x.shape[1] - net.num_prefix_tokens)
    fixed = getattr(net.rope, "feat_shape", None) is not None
    positions = net.rope.get_embed() if fixed else net.rope.get_embed(shape=(side, side))
    return net.blocks[index](x, rope=positions[index] if net.rope_mixed else positions)  # type: ignore[no-any-return]


FAMILIES: dict[type, Callable[[nn.Module], Table]] = {
    tv.AlexNet: _alexnet,
    tv.VGG: _vgg,
    tv.GoogLeNet: _googlenet,
    tv.Inception3: _inception_v3,
    tv.ResNet: _resnet,
    tv.SqueezeNet: _squeezenet,
    tv.ShuffleNetV2: _shufflenet_v2,
    tv.DenseNet: _densenet,
    tv.MobileNetV2: _features,
    tv.MobileNetV3: _mobilenet_v3,
    tv.EfficientNet: _features,
    tv.ConvNeXt: _tv_convnext,
    tv.SwinTransformer: _tv_swin,
    tv.VisionTransformer: _tv_vit,
    ResNet: _timm_resnet,
    EfficientNet: _efficientnet,
    MobileNetV3: _mobilenet_v3_v4,
    ConvNeXt: _convnext,
    SwinTransformer: _swin,
    VisionTransformer: _vit,
    Eva: _eva,
}
