from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lit_transfer.errors import UserError
from lit_transfer.model import backbone as backbone_module
from lit_transfer.model import families, sources, stages
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
    "torchvision/vgg19": (
        32,
        "conv1_1, conv1_2, conv2_1, conv2_2, conv3_1 to conv3_4, conv4_1 to conv4_4, conv5_1 to conv5_4, fc6, fc7",
    ),
    "torchvision/googlenet": (
        64,
        "conv1 to conv3, inception3a, inception3b, inception4a, inception4b, inception4c, inception4d, inception4e, "
        "inception5a, inception5b",
    ),
    "torchvision/inception_v3": (
        96,
        "Conv2d_1a_3x3, Conv2d_2a_3x3, Conv2d_2b_3x3, Conv2d_3b_1x1, Conv2d_4a_3x3, Mixed_5b, Mixed_5c, Mixed_5d, "
        "Mixed_6a, Mixed_6b, Mixed_6c, Mixed_6d, Mixed_6e, Mixed_7a, Mixed_7b, Mixed_7c",
    ),
    "torchvision/resnet18": (64, "stem, layer1 to layer4"),
    "torchvision/resnet50": (64, "stem, layer1 to layer4"),
    "torchvision/squeezenet1_1": (64, "conv1, fire2 to fire9"),
    "torchvision/mobilenet_v2": (64, "features.0 to features.18"),
    "torchvision/mobilenet_v3_small": (64, "features.0 to features.12, top"),
    "torchvision/shufflenet_v2_x1_0": (
        64,
        "stem, stage2.0 to stage2.3, stage3.0 to stage3.7, stage4.0 to stage4.3, conv5",
    ),
    "torchvision/densenet121": (
        64,
        "stem, denseblock1, transition1, denseblock2, transition2, denseblock3, transition3, denseblock4, top",
    ),
    "torchvision/efficientnet_b0": (64, "features.0 to features.8"),
    "torchvision/convnext_tiny": (64, "stem, stage1 to stage4, top"),
    "torchvision/swin_t": (64, "stem, stage1 to stage4, top"),
    "torchvision/vit_b_16": (32, "stem, encoder_layer_0 to encoder_layer_11, top"),
    "caffe/alexnet": (199, "conv1 to conv5, fc6, fc7"),
    "timm/resnet50": (64, "stem, layer1 to layer4"),
    "timm/tf_efficientnet_lite0": (64, "stem, blocks.0 to blocks.6, top"),
    "timm/mobilenetv4_conv_small": (64, "stem, blocks.0 to blocks.4, top"),
    "timm/convnext_atto": (64, "stem, stages.0 to stages.3, top"),
    "timm/swin_tiny_patch4_window7_224": (64, "stem, layers.0 to layers.3, top"),
    "timm/vit_tiny_patch16_224": (32, "stem, blocks.0 to blocks.11, top"),
    "timm/vit_small_patch14_dinov2": (28, "stem, blocks.0 to blocks.11, top"),
    "timm/vit_base_patch16_siglip_224": (32, "stem, blocks.0 to blocks.11, top"),
    "timm/eva02_tiny_patch14_224": (28, "stem, blocks.0 to blocks.11, top"),
    "timm/vit_small_patch16_dinov3": (32, "stem, blocks.0 to blocks.11, top"),
    "timm/vit_small_patch16_rope_mixed_224": (32, "stem, blocks.0 to blocks.11, top"),
}


def expanded(listed: str) -> list[str]:
    """The names of a list of stages such as `stem, layer1 to layer4`."""
    names = []
    for part in listed.split(", "):
        first, _, last = part.partition(" to ")
        stem = first.rstrip("0123456789") if last else first
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
    """Statistics, scales and tokens that make normalisation, layer scale and position embeddings visible."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point() and (tensor.ndim == 1 or tensor.abs().max() < 1e-3):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


class Whole:
    """A backbone, and the untouched network it was cut from."""

    def __init__(self, name: str, size: int) -> None:
        torch.manual_seed(0)
        network = build_net(random_model(name), image_size=size)
        randomise(network.net)
        self.images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        self.classifier = network.net.get_submodule(network.classifier[0])
        given: list[Tensor] = []
        hook = self.classifier.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].clone()))
        with torch.no_grad():
            self.logits = network.net.eval()(self.images)
        hook.remove()
        # SqueezeNet's last layer is a convolution, which it averages over positions afterwards.
        self.expected = given[0].mean((2, 3)) if given[0].ndim == 4 else given[0]
        self.classifier_tensors = {f"{network.classifier[0]}.{n}" for n in self.classifier.state_dict()}
        self.tensors = set(network.net.state_dict())
        self.backbone = self._cut(name, size, network)

    def is_equal(self, features: Tensor) -> bool:
        """Whether features, and what the network's own last layer makes of them, are those of the whole network."""
        linear = isinstance(self.classifier, nn.Linear)
        same_logits = not linear or torch.equal(self.classifier(features), self.logits)
        return torch.equal(features, self.expected) and same_logits

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
    assert network.is_equal(network.backbone(network.images))
    assert network.expected.std() > 0 and not torch.equal(*network.expected)


@pytest.mark.parametrize(("name", "cut"), CUTS)
@torch.no_grad()
def test_a_cut_equals_the_whole_network_to_the_bit(whole: Networks, name: str, cut: str) -> None:
    network = whole(name)
    middle = network.backbone.prefix(network.images, cut)
    kept = middle.clone()
    features = network.backbone.suffix(middle, cut)
    assert features.shape == (2, network.backbone.features)
    assert network.is_equal(features)
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
    for i, stage in enumerate(backbone.stages):
        reached = {id(p) for module in backbone.stage_modules(i) for p in module.parameters()}
        direct = {id(p) for key, p in backbone.stage_parameters(i) if key.removeprefix("net.") in stage.owns}
        assert reached | direct == {id(p) for _, p in backbone.stage_parameters(i)}
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d | nn.Dropout)]
    frozen = [m for i in range(len(backbone.stages)) for own in backbone.stage_modules(i) for m in own.modules()]
    unused = {id(m) for m in norms} - {id(m) for m in frozen}
    assert all(isinstance(m, nn.Dropout) for m in norms if id(m) in unused), "a BatchNorm that no freeze reaches"


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full("copies")) for name in NETWORKS])
@torch.no_grad()
def test_a_copy_has_its_own_stages(whole: Networks, name: str) -> None:
    network = whole(name)
    copied = copy.deepcopy(network.backbone)
    for parameter in copied.parameters():
        parameter.zero_()
    assert not network.is_equal(copied(network.images))
    assert network.is_equal(network.backbone(network.images))


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
    right = families.FAMILIES[type(build_net(random_model("torchvision/resnet18"), device="meta").net)]

    def wrong(net: nn.Module) -> Table:
        table = right(net)
        kept = [replace(s, steps=change.get(s.name, s.steps)) for s in table.stages if s.name != drop]
        return replace(table, stages=tuple(kept))

    monkeypatch.setitem(families.FAMILIES, type(build_net(random_model("torchvision/resnet18")).net), wrong)


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
