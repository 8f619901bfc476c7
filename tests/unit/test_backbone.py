from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from lit_transfer.errors import UserError
from lit_transfer.model import backbone as backbone_module
from lit_transfer.model import sources, stages
from lit_transfer.model.backbone import Backbone, build_backbone
from lit_transfer.model.sources import build_net
from lit_transfer.model.stages import Table
from lit_transfer.recipe import Model

# name: image size, stages
NETWORKS = {
    "torchvision/alexnet": (64, "conv1 to conv5, fc6, fc7"),
    "torchvision/vgg16": (
        64,
        "conv1_1, conv1_2, conv2_1, conv2_2, conv3_1 to conv3_3, conv4_1 to conv4_3, conv5_1 to conv5_3, fc6, fc7",
    ),
    "torchvision/resnet18": (64, "stem, layer1 to layer4"),
    "torchvision/mobilenet_v2": (64, "features.0 to features.18"),
    "timm/tf_efficientnet_lite0": (64, "stem, blocks.0 to blocks.6, top"),
    "timm/convnext_atto": (64, "stem, stages.0 to stages.3, top"),
    "timm/vit_tiny_patch16_224": (32, "stem, blocks.0 to blocks.11, top"),
}


def expanded(listed: str) -> list[str]:
    """The names of a list of stages such as `stem, layer1 to layer4`."""
    names = []
    for part in listed.split(", "):
        first, _, last = part.partition(" to ")
        stem = first.rstrip("0123456789")
        numbers = range(int(first[len(stem) :]), int(last[len(stem) :]) + 1) if last else []
        names += [f"{stem}{i}" for i in numbers] or [first]
    return names


CUTS = [
    pytest.param(name, cut, marks=pytest.mark.full(name))
    for name, (_, listed) in NETWORKS.items()
    for cut in ("all", *expanded(listed), "head")
]


def random_model(name: str, **settings: object) -> Model:
    return Model(backbone=name, weights="none", **settings)  # type: ignore[arg-type]


def randomise(net: nn.Module) -> None:
    """Statistics and scales that make normalisation, layer scale and position embeddings visible."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


class Whole:
    """A backbone, and the untouched network it was cut from."""

    def __init__(self, name: str, size: int) -> None:
        torch.manual_seed(0)
        network = build_net(random_model(name), image_size=size)
        randomise(network.net)
        self.images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            self.expected = network.net.eval()(self.images)
        self.classifier = network.net.get_submodule(network.classifier[0])
        self.classifier_tensors = {f"{network.classifier[0]}.{n}" for n in self.classifier.state_dict()}
        self.tensors = set(network.net.state_dict())
        self.backbone = self._cut(name, size, network)

    def _cut(self, name: str, size: int, network: sources.Built) -> Backbone:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backbone_module, "build_net", lambda *_, **__: network)
            return build_backbone(random_model(name), image_size=size).eval()


Networks = Callable[[str], Whole]


@pytest.fixture(scope="module")
def whole() -> Networks:
    """Networks by name, each built once."""
    return functools.cache(lambda name: Whole(name, NETWORKS[name][0]))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_stages_together_equal_the_whole_network_to_the_bit(whole: Networks, name: str) -> None:
    network, listed = whole(name), NETWORKS[name][1]
    assert stages.summarise(network.backbone.stage_names) == listed
    assert list(network.backbone.stage_names) == expanded(listed)
    assert torch.equal(network.classifier(network.backbone(network.images)), network.expected)
    assert network.expected.std() > 0


@pytest.mark.parametrize(("name", "cut"), CUTS)
@torch.no_grad()
def test_a_cut_equals_the_whole_network_to_the_bit(whole: Networks, name: str, cut: str) -> None:
    network = whole(name)
    middle = network.backbone.prefix(network.images, cut)
    kept = middle.clone()
    features = network.backbone.suffix(middle, cut)
    assert features.shape == (2, network.backbone.features)
    assert torch.equal(network.classifier(features), network.expected)
    assert torch.equal(middle, kept), "the suffix changes its input in place"


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_has_one_stage(whole: Networks, name: str) -> None:
    network = whole(name)
    backbone = network.backbone
    held = {key.removeprefix("net.") for key in backbone.state_dict()}
    assert held == network.tensors - network.classifier_tensors
    named = [key for i in range(len(backbone.stages)) for key, _ in backbone.stage_parameters(i)]
    assert sorted(named) == sorted(key for key, _ in backbone.named_parameters())
    assert {backbone.stage_of(key) for key in backbone.state_dict()} == set(backbone.stage_names)
    for i in range(len(backbone.stages)):
        reached = {id(p) for module in backbone.stage_modules(i) for p in module.parameters()}
        direct = {id(p) for key, p in backbone.stage_parameters(i) if "." not in key.removeprefix("net.")}
        assert reached | direct == {id(p) for _, p in backbone.stage_parameters(i)}
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d | nn.Dropout)]
    frozen = [m for i in range(len(backbone.stages)) for own in backbone.stage_modules(i) for m in own.modules()]
    unused = {id(m) for m in norms} - {id(m) for m in frozen}
    assert all(isinstance(m, nn.Dropout) for m in norms if id(m) in unused), "a BatchNorm that no freeze reaches"


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_copy_has_its_own_stages(whole: Networks, name: str) -> None:
    network = whole(name)
    copied = copy.deepcopy(network.backbone)
    for parameter in copied.parameters():
        parameter.zero_()
    assert not torch.equal(network.classifier(copied(network.images)), network.expected)
    assert torch.equal(network.classifier(network.backbone(network.images)), network.expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_meta_device_gives_shapes_and_counts(whole: Networks, name: str) -> None:
    network = whole(name)
    size = network.images.shape[-1]
    meta = build_backbone(random_model(network.backbone.name), image_size=size, device="meta")
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert meta.features == network.backbone.features
    assert [[(n, p.shape) for n, p in meta.stage_parameters(i)] for i in range(len(meta.stages))] == [
        [(n, p.shape) for n, p in network.backbone.stage_parameters(i)] for i in range(len(meta.stages))
    ]


def _table_with(monkeypatch: pytest.MonkeyPatch, change: dict[str, tuple[str, ...]], drop: str = "") -> None:
    right = stages.FAMILIES[type(build_net(random_model("torchvision/resnet18"), device="meta").net)]

    def wrong(net: nn.Module) -> Table:
        table = right(net)
        kept = [replace(s, steps=change.get(s.name, s.steps)) for s in table.stages if s.name != drop]
        return replace(table, stages=tuple(kept))

    monkeypatch.setitem(stages.FAMILIES, type(build_net(random_model("torchvision/resnet18")).net), wrong)


def test_a_wrong_stage_table_is_caught_when_the_backbone_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    _table_with(monkeypatch, {"stem": ("conv1", "bn1", "maxpool")})  # the ReLU is forgotten
    with pytest.raises(UserError, match=r"stage table of torchvision/resnet18 .*layer1 to layer4.* is wrong"):
        build_backbone(random_model("torchvision/resnet18"), image_size=32)


def test_orphans_and_shared_tensors_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _table_with(monkeypatch, {}, drop="layer3")
    with pytest.raises(UserError, match=r"\d+ tensor\(s\) belong to no stage: layer3\.0\.conv1\.weight"):
        build_backbone(random_model("torchvision/resnet18"), image_size=32)


def test_a_tensor_in_two_stages_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _table_with(monkeypatch, {"layer2": ("layer2", "layer1")})
    with pytest.raises(UserError, match=r"belong to several stages: layer1\.0\.conv1\.weight"):
        build_backbone(random_model("torchvision/resnet18"), image_size=32)


def test_an_unknown_cut_lists_the_stages() -> None:
    backbone = build_backbone(random_model("timm/tf_efficientnet_lite0"), device="meta")
    with pytest.raises(UserError) as caught:
        backbone.cut_index("blocks.9")
    assert str(caught.value).startswith(
        "'blocks.9' is not a stage of timm/tf_efficientnet_lite0; its stages are stem, blocks.0 to blocks.6, top."
    )
    assert "Did you mean 'blocks." in str(caught.value)
    assert (backbone.cut_index("all"), backbone.cut_index("stem"), backbone.cut_index("blocks.0")) == (
        0,
        0,
        1,
    )
    assert backbone.cut_index("head") == 9
