"""Backbones side by side as one backbone, whose output is their vectors one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_transfer.blocks import Block, Combination
from lit_transfer.config import Image
from lit_transfer.data.decode import Preprocessing
from lit_transfer.model.augment import normalise, settle_image
from lit_transfer.model.backbone import Backbone, build_backbone
from lit_transfer.model.classical import build_classical
from lit_transfer.model.network import Network
from lit_transfer.model.stages import BODY


class Joined(nn.Module):
    """Values in [0, 1], [B, 3, S, S], to the vectors of all blocks, each divided by the norm of its block, [B, F].

    Args:
        backbones: of the blocks.
        inputs: mean and standard deviation of each.
        norms: of each, [blocks].
    """

    norms: Tensor

    def __init__(self, backbones: Sequence[Backbone], inputs: Sequence[Preprocessing], norms: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(backbones)
        self.inputs = tuple(inputs)
        self.register_buffer("norms", norms)

    def forward(self, x: Tensor) -> Tensor:
        vectors = [block(normalise(x, own)) for block, own in zip(self.blocks, self.inputs, strict=True)]
        return torch.cat([vector.float() / norm for vector, norm in zip(vectors, self.norms, strict=True)], dim=1)


@dataclass(frozen=True)
class Blocks:
    """Backbones of a config, ready to be run.

    Args:
        settings: of each, every setting of its input given.
        common: the picture that all take, in values of [0, 1].
        backbones: each takes the common picture less its own mean, over its own standard deviation.
    """

    settings: tuple[Block, ...]
    common: Preprocessing
    backbones: tuple[Backbone, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the vector of each."""
        return tuple(backbone.features for backbone in self.backbones)

    @property
    def inputs(self) -> tuple[Preprocessing, ...]:
        """The common picture as each takes it."""
        return tuple(_own_preprocessing(block, self.common) for block in self.settings)

    def joined(self, norms: Tensor) -> Backbone:
        """All as one backbone of a single stage, which takes the common picture; the vector of each over its norm."""
        net = Joined(self.backbones, self.inputs, norms)
        image = replace(
            self.backbones[0].image, size=self.common.size, mean=list(self.common.mean), std=list(self.common.std)
        )
        name = " + ".join(backbone.name for backbone in self.backbones)
        return Backbone(name, net, BODY.stages, sum(self.widths), image, _provenance(self.backbones))


def open_blocks(blocks: Sequence[Block], image: Image, seed: int) -> Blocks:
    """Build the backbones of a config and load their weights; mutates the global random state.

    Args:
        blocks: as in the config.
        image: as in the config; where it leaves the size open, it is that of the largest block.
        seed: of weights that start random: those of the first block are as in a training run of that seed.

    Raises:
        UserError: as `build_backbone` does.
    """
    settled, common = _settle(blocks, image)
    torch.manual_seed(seed)
    backbones = [_build_block(block, common.size, load_weights=True) for block in settled]
    return Blocks(tuple(settled), common, tuple(backbones))


def _settle(blocks: Sequence[Block], image: Image) -> tuple[list[Block], Preprocessing]:
    """Blocks with every setting of their input given, and the common picture."""
    own = [build_backbone(b.model, image_size=b.size, device="meta", load_weights=False).image for b in blocks]
    sizes = [block.size or known.size or 0 for block, known in zip(blocks, own, strict=True)]
    settled = [
        replace(block, size=size, mean=block.mean or image.mean or known.mean, std=block.std or image.std or known.std)
        for block, size, known in zip(blocks, sizes, own, strict=True)
    ]
    common = replace(image, size=image.size or max(sizes), mean=[0.0] * 3, std=[1.0] * 3)
    return settled, settle_image(common, own[0])[1]


def _own_preprocessing(block: Block, common: Preprocessing) -> Preprocessing:
    """The common picture with the mean and standard deviation of a settled block."""
    assert block.mean and block.std, "settled"
    mean, std = ((v[0], v[1], v[2]) for v in (block.mean, block.std))
    return replace(common, mean=mean, std=std)


def _build_block(block: Block, common_size: int, *, load_weights: bool) -> Backbone:
    """The backbone of a settled block, which takes pictures [B, 3, common_size, common_size] of its own mean and std.

    Raises as `build_backbone` does.
    """
    backbone = build_backbone(block.model, image_size=block.size, load_weights=load_weights)
    name, stages = backbone.name, backbone.stages
    if block.model.last_stage is not None or block.model.pool != "auto":
        name += f" to {block.model.last_stage} by {block.model.pool}"
    assert block.size, "settled"
    if block.size != common_size:
        name += f" at {block.size} of {common_size} pixels"
        stages = (replace(stages[0], steps=(partial(_resize, block.size), *stages[0].steps)), *stages[1:])
    return Backbone(name, backbone.net, stages, backbone.features, backbone.image, backbone.provenance)


def _resize(size: int, net: nn.Module, x: Tensor) -> Tensor:
    """Pictures [B, 3, S, S] to [B, 3, size, size], bilinear and antialiased, computed in fp32."""
    return F.interpolate(x.float(), (size, size), mode="bilinear", antialias=True).to(x.dtype)


def _provenance(backbones: Sequence[Backbone]) -> dict[str, str | None]:
    """What all have in common as it is, the rest in words, one after the other."""
    own = [backbone.provenance for backbone in backbones]
    found = {key: [each[key] for each in own] for key in own[0]}
    return {
        key: values[0] if len(set(values)) == 1 else " + ".join(value or "none" for value in values)
        for key, values in found.items()
    }


def build_combination(model: Combination, task: str, common: Preprocessing, tensors: Mapping[str, Tensor]) -> Network:
    """The network of a combination, whose `state_dict` some tensors are: the head has their values, blocks random ones.

    Raises:
        KeyError, TypeError: they are not those of such a head.
    """
    backbones = [_build_block(block, common.size, load_weights=False) for block in model.blocks]
    state = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
    joined = Blocks(tuple(model.blocks), common, tuple(backbones)).joined(torch.ones(len(backbones)))
    return Network(joined, build_classical(task, model.head, state))
