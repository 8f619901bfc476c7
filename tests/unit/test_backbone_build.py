from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lit_transfer.errors import UserError
from lit_transfer.model import backbone as backbone_module
from lit_transfer.model import stages
from lit_transfer.model.backbone import Backbone, build_backbone
from lit_transfer.model.sources import build_net
from lit_transfer.model.stages import BODY, Stage
from lit_transfer.recipe import Model


def random_model(name: str, **settings: object) -> Model:
    return Model(backbone=name, weights="none", **settings)  # type: ignore[arg-type]


@torch.no_grad()
def test_googlenet_without_its_auxiliary_classifiers_has_only_head_and_all() -> None:
    network = build_net(random_model("torchvision/googlenet"), image_size=64)
    assert not any("aux" in name for name in network.net.state_dict())
    backbone = build_backbone(random_model("torchvision/googlenet"), image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    assert backbone.stage_names == ("body",) and backbone.features == 1024
    assert torch.equal(backbone.suffix(backbone.prefix(images, "all"), "all"), backbone.prefix(images, "head"))
    assert torch.is_tensor(backbone.train()(images)), "in training mode too, one vector and no auxiliary outputs"
    assert all(m.p == 0 for m in backbone.modules() if isinstance(m, nn.Dropout)), "the old head's dropout"
    with pytest.raises(UserError, match=r"'inception4a' .* no stage table.* only head and all"):
        backbone.cut_index("inception4a")


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("torchvision/inception_v3", 96, 2048),
        ("torchvision/regnet_x_400mf", 64, 400),
        ("timm/resnet18", 64, 512),
    ],
)
def test_networks_without_a_table_still_give_features(name: str, size: int, features: int) -> None:
    for device in ("cpu", "meta"):
        backbone = build_backbone(random_model(name), image_size=size, device=device)
        assert (backbone.stage_names, backbone.features) == (("body",), features)


@pytest.mark.parametrize(
    "name",
    [
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "inception_v3",
        "maxvit_t",
        "mnasnet0_5",
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "swin_t",
        "swin_v2_t",
        "vit_b_16",
        "wide_resnet50_2",
    ],
)
def test_the_classifier_of_a_torchvision_network_is_found(name: str) -> None:
    network = build_net(random_model(f"torchvision/{name}"), device="meta")
    last = network.net.get_submodule(network.classifier[0])
    assert (last.out_features if isinstance(last, nn.Linear) else last.out_channels) == 1000


class Declared(nn.Module):
    """A network of a user's own, which declares its stages."""

    stages: object = (("early", ("a", "relu")), ("late", ("b", "pool", "flat")))
    classifier = "last"

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.relu, self.pool, self.flat = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.last = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.flat(self.pool(self.b(self.relu(self.a(x))))))  # type: ignore[no-any-return]


class Undeclared(Declared):
    stages = None


class NoRelu(Declared):
    stages = (("early", ("a",)), ("late", ("b", "pool", "flat")))


class NoFlat(Declared):
    stages = (("early", ("a", "relu")), ("late", ("b", "pool")))


@pytest.fixture
def own_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_networks")
    module.__dict__.update(declared=Declared, undeclared=Undeclared, no_relu=NoRelu, no_flat=NoFlat)
    monkeypatch.setitem(sys.modules, "own_networks", module)


@torch.no_grad()
def test_a_network_of_ones_own_declares_its_stages(own_networks: None) -> None:
    backbone = build_backbone(random_model("own_networks:declared"), image_size=16)
    assert backbone.stage_names == ("early", "late") and backbone.features == 6
    assert backbone.prefix(torch.zeros(2, 3, 16, 16), "late").shape == (2, 4, 14, 14)
    whole_only = build_backbone(random_model("own_networks:undeclared"), image_size=16)
    assert whole_only.stage_names == (BODY.stages[0].name,)
    for name in ("no_relu", "no_flat"):
        with pytest.raises(UserError, match=rf"stage table of own_networks:{name} \(early, late\) is wrong"):
            build_backbone(random_model(f"own_networks:{name}"), image_size=16)
    with pytest.raises(UserError, match=r"own_networks:absent' cannot be imported"):
        build_backbone(random_model("own_networks:absent"), image_size=16)


@torch.no_grad()
def test_later_stages_are_removed_and_flattened() -> None:
    model = random_model("torchvision/vgg16", last_stage="conv5_3", pool="flatten")
    backbone = build_backbone(model, device="meta")
    assert backbone.features == 25088 and backbone.stage_names[-1] == "conv5_3"
    assert not any("classifier" in name for name in backbone.state_dict())
    assert [name for name in backbone.state_dict()][-1] == "net.features.28.bias"


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "last", "pool", "features"),
    [
        ("torchvision/resnet18", "layer3", "auto", 256),
        ("torchvision/resnet18", "layer4", "auto", 512),
        ("torchvision/resnet18", "layer4", "flatten", 512 * 2 * 2),
        ("timm/tf_efficientnet_lite0", "blocks.4", "avg", 112),
        ("timm/vit_tiny_patch16_224", "blocks.3", "auto", 192),
        ("timm/vit_tiny_patch16_224", "blocks.3", "flatten", 192 * 17),
    ],
)
def test_pooling_after_the_last_stage(name: str, last: str, pool: str, features: int) -> None:
    backbone = build_backbone(random_model(name, last_stage=last, pool=pool), image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    assert backbone.features == features and backbone(images).shape == (2, features)
    assert backbone.stage_names[-1] == last
    full = build_backbone(random_model(name), image_size=64, device="meta")
    later = full.stage_names[len(backbone.stages) :]
    kept = {tensor for tensor in full.state_dict() if full.stage_of(tensor) not in later}
    assert set(backbone.state_dict()) == kept


@torch.no_grad()
def test_tokens_are_pooled_as_the_network_does() -> None:
    torch.manual_seed(0)
    settings = {"last_stage": "blocks.0"}
    auto = build_backbone(random_model("timm/vit_tiny_patch16_224", **settings), image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = backbone_module.run_stages(auto.net, (Stage("x", ("patch_embed",)), *_bare(auto)), images)
    assert torch.equal(auto(images), tokens[:, 0])
    assert torch.equal(stages.average(auto.net, tokens), tokens[:, 1:].mean(1))


def _bare(backbone: Backbone) -> tuple[Stage, ...]:
    first = backbone.stages[0]
    return (replace(first, steps=first.steps[1:]), Stage("y", ("blocks.0",)))


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"name": "torchvision/resnet81"}, 32, r"'resnet81' is not .*Did you mean 'resnet"),
        (
            {"name": "timm/tf_efficientnet_lite9"},
            32,
            r"not a network of this timm .*Did you mean 'tf_efficientnet",
        ),
        ({"name": "timm/resnet18.nowhere"}, 32, r"timm cannot build timm/resnet18.nowhere: .*tag"),
        ({"name": "resnet18"}, 32, r"'resnet18' is not timm/NAME, torchvision/NAME"),
        ({"name": "local-dir:nowhere"}, 32, r"nowhere/config.json does not exist"),
        (
            {"name": "torchvision/resnet18", "last_stage": "layer9"},
            32,
            r"'layer9' is not a stage .*layer1 to layer4",
        ),
        (
            {"name": "timm/convnext_atto", "pool": "flatten"},
            32,
            r"model.pool flatten: .* already gives a vector",
        ),
        ({"name": "torchvision/inception_v3"}, 32, r"cannot take images of 32 pixels .* image.size to 299"),
    ],
)
def test_faults_are_told_in_a_sentence(settings: dict[str, str], size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_backbone(random_model(**settings), image_size=size)


def test_the_check_leaves_the_random_state_alone_but_for_new_weights() -> None:
    def state_after(build: object) -> Tensor:
        torch.manual_seed(5)
        build(random_model("torchvision/resnet18"), image_size=32)  # type: ignore[operator]
        return torch.get_rng_state()

    assert torch.equal(state_after(build_net), state_after(build_backbone))


def test_preprocessing_and_provenance_are_known() -> None:
    backbone = build_backbone(random_model("timm/tf_efficientnet_lite0"), device="meta")
    image = backbone.image
    assert (image.size, image.crop, image.interpolation, image.mean) == (
        224,
        0.875,
        "bicubic",
        [0.5, 0.5, 0.5],
    )
    mobile = build_backbone(random_model("torchvision/mobilenet_v2"), device="meta").image
    assert (mobile.size, mobile.crop, mobile.interpolation) == (224, 224 / 232, "bilinear")
    assert backbone.provenance["backbone"] == "timm/tf_efficientnet_lite0"
    assert backbone.provenance["weights"] == "none" and backbone.provenance["sha256"] is None
