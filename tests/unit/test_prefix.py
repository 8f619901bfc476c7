"""The frozen stages as they are stored are those that training runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lit_transfer.activations import prefix as prefix_module
from lit_transfer.activations.prefix import (
    MIN_COSINE,
    Prefix,
    Recipe,
    cosines,
    fast_recipe,
    folded,
    is_near,
    plain_recipe,
)
from lit_transfer.config import Image
from lit_transfer.model.backbone import Backbone, build_backbone
from lit_transfer.model.network import batch_norms
from lit_transfer.model.stages import Stage, Step
from lit_transfer.recipe import Model

SIZE = 64
PLAIN = plain_recipe(torch.device("cpu"))
FOLDED = replace(PLAIN, folded=True)
NETWORKS = {  # and how many BatchNorm layers cannot be folded: no convolution feeds them alone
    "timm/test_resnet": 0,
    "timm/test_efficientnet": 0,
    "timm/test_efficientnet_gn": 0,
    "timm/test_convnext": 0,
    "timm/test_vit": 0,
    "timm/tf_efficientnet_lite0": 0,
    "timm/mobilenetv3_small_050": 0,
    "torchvision/resnet18": 0,
    "torchvision/mobilenet_v2": 0,
    "torchvision/squeezenet1_1": 0,
    "torchvision/shufflenet_v2_x1_0": 0,
    "torchvision/googlenet": 0,
    "torchvision/densenet121": 62,
}


def build(name: str) -> Backbone:
    """A network whose BatchNorm layers do something, in training mode."""
    torch.manual_seed(0)
    size = 160 if "vit" in name else SIZE
    return noisy(build_backbone(Model(backbone=name, weights="none"), image_size=size))


def noisy(backbone: Backbone) -> Backbone:
    with torch.no_grad():
        for norm in batch_norms(backbone):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.3)
    return backbone.train()


def images(backbone: Backbone, count: int = 2) -> Tensor:
    size = backbone.image.size if "vit" in backbone.name else SIZE
    return torch.randn(count, 3, size or SIZE, size or SIZE, generator=torch.Generator().manual_seed(1))


def expected(backbone: Backbone, x: Tensor, cut: int) -> Tensor:
    """What the stages give in evaluation, in the memory format in which a network runs them."""
    with torch.no_grad():
        return copy.deepcopy(backbone).eval().run(x.contiguous(memory_format=torch.channels_last), 0, cut)


def apart(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).norm() / wanted.norm())


def state(backbone: Backbone) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.state_dict().items()}


def assert_unchanged(backbone: Backbone, before: dict[str, Tensor]) -> None:
    assert all(module.training for module in backbone.modules()), "it is put back in training mode"
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.full("plain")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_plain_prefix_is_the_network_to_the_bit_at_every_cut(name: str) -> None:
    backbone = build(name)
    before, x, count = state(backbone), images(backbone), len(backbone.stages)
    together = Prefix(backbone, range(1, count + 1), PLAIN, SIZE)(x)
    assert list(together) == [*range(1, count + 1)]
    for cut in {1, count // 2 or 1, count}:
        assert torch.equal(together[cut], expected(backbone, x, cut))
        assert torch.equal(Prefix(backbone, [cut], PLAIN, SIZE)(x)[cut], together[cut])
    assert_unchanged(backbone, before)


@pytest.mark.full("folded")
@pytest.mark.parametrize("name", NETWORKS)
def test_folding_keeps_the_result_at_every_cut(name: str) -> None:
    backbone = build(name)
    before, x, cuts = state(backbone), images(backbone), range(1, len(backbone.stages) + 1)
    given = Prefix(backbone, cuts, FOLDED, x.shape[-1])(x)
    for cut in cuts:
        assert apart(given[cut], expected(backbone, x, cut)) < 1e-5
    assert len(batch_norms(folded(backbone, x.shape[-1]))) == NETWORKS[name]
    assert_unchanged(backbone, before)


class Convolutions(nn.Module):
    """Layers for networks that use convolutions otherwise than one before each BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 3)


def pre_activation(net: Convolutions, x: Tensor) -> Tensor:
    return x + net.conv(net.norm(x).relu())


def used_twice(net: Convolutions, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.norm(y).relu() + y


def shared_conv(net: Convolutions, x: Tensor) -> Tensor:
    return net.other(net.conv(net.norm(net.conv(x)).relu()))


def called_again(net: Convolutions, x: Tensor) -> Tensor:
    return net.conv(net.norm(net.conv(x)).relu())


def shared_norm(net: Convolutions, x: Tensor) -> Tensor:
    return net.norm(net.conv(net.norm(x).relu()))


def big_offset(net: Convolutions, x: Tensor) -> Tensor:
    """In bf16 nothing of x is left."""
    return (x + 1e4) - 1e4


def made_of(*stages: Step) -> Backbone:
    torch.manual_seed(0)
    table = tuple(
        Stage(f"s{i}", (step,), () if isinstance(step, str) else ("conv", "norm", "other"))
        for i, step in enumerate(stages)
    )
    image = Image(size=16, crop=1.0, interpolation="bilinear", mean=[0.5] * 3, std=[0.5] * 3)
    net = Convolutions()
    for name in {name for name, _ in net.named_children()} - {path for stage in table for path in stage.prefixes}:
        delattr(net, name)
    return noisy(Backbone("made", net, table, 8, image, {}))


@pytest.mark.parametrize("step", [pre_activation, used_twice, shared_conv, called_again], ids=lambda f: f.__name__)
def test_what_cannot_be_folded_stays_right(step: Step) -> None:
    backbone = made_of("first", step)
    x = torch.randn(4, 3, 16, 16)
    recipe = replace(fast_recipe(backbone, 2, x, compiled=False), bf16_from=None)
    given = Prefix(backbone, [1, 2], recipe, 16)(x)
    for cut in (1, 2):
        assert apart(given[cut], expected(backbone, x, cut)) < 1e-5


@pytest.mark.parametrize("step", [shared_conv, shared_norm], ids=lambda f: f.__name__)
def test_only_pairs_that_stand_alone_are_folded(step: Step) -> None:
    backbone = made_of("first", step)
    x = torch.randn(4, 3, 16, 16)
    assert apart(Prefix(backbone, [2], FOLDED, 16)(x)[2], expected(backbone, x, 2)) < 1e-5


def test_bf16_begins_with_its_stage() -> None:
    backbone = build("timm/test_efficientnet")
    x, names = images(backbone), backbone.stage_names
    given = Prefix(backbone, range(1, len(names) + 1), replace(PLAIN, bf16_from=names[3]), SIZE)(x)
    for cut, output in given.items():
        wanted = expected(backbone, x, cut)
        if cut <= 3:
            assert torch.equal(output, wanted)
        else:
            assert output.dtype == torch.bfloat16 and not torch.equal(output.float(), wanted)
            assert cosines({cut: output}, {cut: wanted})[cut] > 0.99


def test_the_cosine_is_the_mean_over_samples() -> None:
    wanted = {2: torch.tensor([[3.0, 4.0], [1.0, 0.0]]), 5: torch.ones(2, 3, 4, 4)}
    given = {2: torch.tensor([[4.0, 3.0], [2.0, 0.0]]).bfloat16(), 5: -torch.ones(2, 3, 4, 4)}
    assert cosines(given, wanted) == {2: pytest.approx((24 / 25 + 1) / 2), 5: pytest.approx(-1)}


def timed(recipes: dict[str | None, float], function: Prefix, _: Tensor) -> float:
    return recipes.get(function.recipe.bf16_from, 1.0)


@pytest.mark.parametrize(("seconds_in_fp32", "first"), [(2.0, "s2"), (0.5, None)])
def test_bf16_only_where_it_is_faster_and_near(
    monkeypatch: pytest.MonkeyPatch, seconds_in_fp32: float, first: str | None
) -> None:
    """Not from the stage on in which it would lose the activations, nor from an earlier one."""
    monkeypatch.setattr(prefix_module, "seconds", partial(timed, {None: seconds_in_fp32}))
    backbone = made_of("first", big_offset, "last")
    x = torch.randn(4, 3, 16, 16)
    assert fast_recipe(backbone, 3, x, compiled=False).bf16_from == first


def test_a_recipe_is_near_as_deep_as_its_stages_are() -> None:
    x = torch.randn(4, 3, 16, 16)
    lossy, twice = made_of("first", big_offset, "last"), made_of("first", used_twice)
    for backbone, recipe in ((lossy, replace(PLAIN, bf16_from="s0")), (twice, FOLDED)):
        assert is_near(backbone, 1, recipe, x) and not is_near(backbone, 2, recipe, x)
    assert is_near(lossy, 3, replace(PLAIN, bf16_from="s2"), x)


@pytest.mark.full("fast")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fast_recipe_keeps_the_cosine_at_each_cut(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(prefix_module, "seconds", partial(timed, {None: 2.0}))  # bf16 wherever it is near enough
    backbone = build(name)
    x, cuts = images(backbone, 4), range(1, len(backbone.stages) + 1)
    recipe = fast_recipe(backbone, len(backbone.stages), x, compiled=False)
    given = Prefix(backbone, cuts, recipe, x.shape[-1])(x)
    assert recipe.folded
    assert min(cosines(given, {cut: expected(backbone, x, cut) for cut in cuts}).values()) >= MIN_COSINE


def test_a_compiled_prefix_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def compile_eagerly(function: object) -> object:
        calls.append(function)
        return torch._dynamo.optimize("eager")(function)

    backbone = build("timm/test_resnet")
    x, cuts = images(backbone), [2, len(backbone.stages)]
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    given = Prefix(backbone, cuts, replace(PLAIN, compiled=True), SIZE)(x)
    assert len(calls) == 1
    for cut in cuts:
        assert torch.equal(given[cut], expected(backbone, x, cut))


def test_recipes_survive_their_plain_form() -> None:
    recipe: Recipe = replace(FOLDED, bf16_from="s2", compiled=True)
    assert Recipe.from_plain(recipe.to_plain()) == recipe
    different: Sequence[Recipe] = [PLAIN, FOLDED, recipe, replace(PLAIN, batch=8), replace(PLAIN, device="other")]
    assert len({str(r.to_plain()) for r in different}) == len(different)
