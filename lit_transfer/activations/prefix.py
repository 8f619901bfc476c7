"""The frozen stages as they are run to be stored: plain, or faster and still close to fp32."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lit_transfer.model.backbone import Backbone, device_of
from lit_transfer.model.network import batch_norms

MIN_COSINE = 0.999
"""Mean cosine with the plain prefix in fp32 that a fast one must keep, at each cut."""
_COMPARED = 32  # pictures: the outputs of all stages for more of them may be large


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a prefix is computed: two that differ may give other bits.

    Args:
        device: the kind of machine.
        batch: samples at once; the last ones are filled up.
        folded: BatchNorm is folded into the convolutions before it.
        bf16_from: the first stage in bf16; None is fp32 throughout.
        compiled: by torch.compile.
    """

    device: str
    batch: int
    folded: bool = False
    bf16_from: str | None = None
    compiled: bool = False

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for a key."""
        return asdict(self) | {"memory_format": "channels_last"}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_plain`."""
        return cls(**{key: value for key, value in plain.items() if key != "memory_format"})


def plain_recipe(device: torch.device) -> Recipe:
    """fp32, each module as it is; the batch is 32 on a CPU and 256 on a GPU."""
    if device.type == "cpu":
        return Recipe(device=f"cpu {torch.backends.cpu.get_cpu_capability()}", batch=32)
    return Recipe(device=torch.cuda.get_device_name(device), batch=256)


class Prefix:
    """The stages of a backbone before some cuts, in eval mode; the backbone is not changed, but must not move.

    Args:
        backbone: on the device where it is run.
        cuts: how many stages stand before each, at least 1.
        recipe: how.
        image_size: side of its input, in pixels.
    """

    def __init__(self, backbone: Backbone, cuts: Sequence[int], recipe: Recipe, image_size: int) -> None:
        self.recipe = recipe
        self.cuts = sorted(cuts)
        self._plain = backbone
        self._half = self.cuts[-1]
        self._bf16 = backbone
        if recipe.folded:
            self._plain = folded(backbone, image_size)
        if recipe.bf16_from:
            self._half = backbone.stage_names.index(recipe.bf16_from)
            self._bf16 = copy.deepcopy(self._plain).to(torch.bfloat16)
        self._function: Callable[[Tensor], list[Tensor]] = self._run
        if recipe.compiled:
            self._function = torch.compile(self._run)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[int, Tensor]:
        """Normalised images [B, 3, S, S], float32 -> the activations at each cut, by how many stages stand before."""
        with evaluating(self._plain, self._bf16), torch.autocast(images.device.type, enabled=False):
            outputs = self._function(images.contiguous(memory_format=torch.channels_last))
        return dict(zip(self.cuts, outputs, strict=True))

    def _run(self, x: Tensor) -> list[Tensor]:
        outputs, done = [], 0
        for cut in self.cuts:
            x = self._plain.run(x, done, min(cut, self._half)) if done < self._half else x
            if cut > self._half:
                x = self._bf16.run(x.to(torch.bfloat16), max(done, self._half), cut)
            outputs.append(x)
            done = cut
        return outputs


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """All modules are in eval mode in this block, and in their own again after it."""
    modes = {module: module.training for network in networks for module in network.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def fast_recipe(backbone: Backbone, deepest: int, images: Tensor, *, compiled: bool) -> Recipe:
    """The fastest way to compute the first `deepest` stages that keeps `MIN_COSINE`, measured on images [B, 3, S, S].

    BatchNorm is folded where the result stays the same within fp32. Stages run in bf16 from the first one on for
    which the mean cosine is kept at every cut, also at those that are not asked for yet, if that is faster here.
    """
    size, cuts, compared = images.shape[-1], range(1, deepest + 1), images[:_COMPARED]
    recipe = plain_recipe(device_of(backbone))
    plain = Prefix(backbone, cuts, recipe, size)(compared)
    network = folded(backbone, size)
    is_same = _agrees(Prefix(network, cuts, recipe, size)(compared), plain)
    network, settled = network if is_same else backbone, replace(recipe, folded=is_same, compiled=compiled)
    fp32 = Prefix(network, [deepest], recipe, size)
    for name in backbone.stage_names[:deepest]:
        in_bf16 = replace(recipe, bf16_from=name)
        if _keeps_cosine(Prefix(network, cuts, in_bf16, size)(compared), plain):
            is_faster = seconds(Prefix(network, [deepest], in_bf16, size), images) < seconds(fp32, images)
            return replace(settled, bf16_from=name if is_faster else None)
    return settled


def is_near(backbone: Backbone, deepest: int, recipe: Recipe, images: Tensor) -> bool:
    """Whether a recipe keeps what `fast_recipe` does at each cut of the first `deepest` stages, on images [B, 3, S, S].

    What torch.compile makes of it is not looked at.
    """
    size, cuts, compared = images.shape[-1], range(1, deepest + 1), images[:_COMPARED]
    plain = Prefix(backbone, cuts, plain_recipe(device_of(backbone)), size)(compared)
    given = Prefix(backbone, cuts, replace(recipe, compiled=False), size)(compared)
    return _keeps_cosine(given, plain) if recipe.bf16_from else _agrees(given, plain)


def cosines(outputs: dict[int, Tensor], expected: dict[int, Tensor]) -> dict[int, float]:
    """Mean cosine of each sample's activations with the expected ones, by cut."""
    return {
        cut: float(F.cosine_similarity(outputs[cut].float().flatten(1), value.float().flatten(1)).mean())
        for cut, value in expected.items()
    }


def seconds(function: Callable[[Tensor], Any], images: Tensor) -> float:
    """The least time of two calls, in seconds."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        function(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        times.append(time.perf_counter() - start)
    return min(times)


def folded(backbone: Backbone, image_size: int) -> Backbone:
    """A copy whose BatchNorm layers are part of the convolutions before them, where one of each belongs to the other.

    Which convolution feeds which BatchNorm is seen by running the network once on a picture of noise; whether it feeds
    something else, too, is not seen. Then the copy gives other values: compare them.
    """
    network = copy.deepcopy(backbone).eval()
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # keeps the tensors, so that no other takes an id
    pairs: list[tuple[nn.Conv2d, nn.modules.batchnorm._BatchNorm]] = []

    def remember(conv: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        made[id(output)] = (conv, output)

    def pair(norm: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], norm))

    hooks = [m.register_forward_hook(remember) for m in network.modules() if isinstance(m, nn.Conv2d)]
    hooks += [norm.register_forward_hook(pair) for norm in batch_norms(network)]
    with torch.no_grad():
        network(torch.rand(1, 3, image_size, image_size, device=device_of(network)))
    for hook in hooks:
        hook.remove()
    _fold(network, pairs)
    return network.to(memory_format=torch.channels_last)


def _fold(network: Backbone, pairs: Sequence[tuple[nn.Conv2d, nn.modules.batchnorm._BatchNorm]]) -> None:
    """Fold pairs that each stand alone; mutates the network."""
    paths = {module: path for path, module in network.named_modules()}
    once = [p for p in pairs if all(sum(m is q for pair in pairs for q in pair) == 1 for m in p)]
    for conv, norm in once:
        assert norm.running_mean is not None and norm.running_var is not None
        conv.weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.bias = bias
        # timm's BatchNorm layers hold the activation that follows.
        network.set_submodule(paths[norm], nn.Sequential(*norm.children()))


def _agrees(outputs: dict[int, Tensor], expected: dict[int, Tensor]) -> bool:
    """Whether all that differs is how fp32 was rounded."""
    return all(float((outputs[cut] - value).norm()) <= 1e-3 * float(value.norm()) for cut, value in expected.items())


def _keeps_cosine(outputs: dict[int, Tensor], expected: dict[int, Tensor]) -> bool:
    return min(cosines(outputs, expected).values()) >= MIN_COSINE
