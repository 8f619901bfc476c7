from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from lit_transfer.errors import UserError
from lit_transfer.model import backbone as backbone_module
from lit_transfer.model import families, stages
from lit_transfer.model.backbone import Backbone, build_backbone
from lit_transfer.model.sources import build_net
from lit_transfer.model.stages import BODY, Stage
from lit_transfer.recipe import Model


def random_model(name: str, **settings: object) -> Model:
    return Model(backbone=name, weights="none", **settings)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_inception_has_no_auxiliary_classifiers_and_sees_the_input_of_its_weights(name: str, size: int) -> None:
    network = build_net(random_model(f"torchvision/{name}"), image_size=size)
    assert not any("aux" in tensor.lower() for tensor in network.net.state_dict())
    backbone = build_backbone(random_model(f"torchvision/{name}"), image_size=size).eval()
    first = backbone.stages[0]
    mean_half = first.steps[0](backbone.net, torch.zeros(1, 3, 1, 1))  # type: ignore[operator]
    assert torch.allclose(mean_half.flatten(), torch.tensor([-0.03, -0.088, -0.188]), atol=1e-6)
    images = torch.randn(2, 3, size, size)
    assert torch.is_tensor(backbone.train()(images)), "in training mode too, one vector and no auxiliary outputs"
    assert all(m.p == 0 for m in backbone.modules() if isinstance(m, nn.Dropout)), "the old head's dropout"


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "features"),
    [("torchvision/regnet_x_400mf", 400), ("torchvision/mnasnet0_5", 1280), ("timm/test_nfnet", 192)],
)
def test_networks_without_a_table_still_give_features(name: str, features: int) -> None:
    for device in ("cpu", "meta"):
        backbone = build_backbone(random_model(name), image_size=64, device=device).eval()
        assert (backbone.stage_names, backbone.features) == (("body",), features)
    backbone = build_backbone(random_model(name), image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(backbone.suffix(backbone.prefix(images, "all"), "all"), backbone.prefix(images, "head"))
    with pytest.raises(UserError, match=r"'layer4' .* no stage table.* only head and all"):
        backbone.cut_index("layer4")


@pytest.mark.parametrize("drawn", [{"rope_rescale_coords": 2.0}, {"patch_drop_rate": 0.5}])
def test_positions_drawn_anew_for_each_batch_are_never_cut(drawn: dict[str, float]) -> None:
    assert families.table_of(timm.create_model("eva02_tiny_patch14_224", img_size=28)).is_cut
    assert families.table_of(timm.create_model("eva02_tiny_patch14_224", img_size=28, **drawn)) == BODY


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
        ("timm/swin_tiny_patch4_window7_224", "layers.1", "auto", 192),
        ("timm/eva02_tiny_patch14_224", "blocks.3", "auto", 192),
        ("torchvision/squeezenet1_1", "fire7", "auto", 384),
        ("torchvision/mobilenet_v3_small", "features.12", "auto", 576),
        ("torchvision/swin_t", "stage3", "auto", 384),
        ("torchvision/swin_t", "top", "avg", 768),
        ("torchvision/vit_b_16", "encoder_layer_1", "auto", 768),
    ],
)
def test_pooling_after_the_last_stage(name: str, last: str, pool: str, features: int) -> None:
    size = 56 if "patch14" in name else 64
    backbone = build_backbone(random_model(name, last_stage=last, pool=pool), image_size=size).eval()
    images = torch.randn(2, 3, size, size)
    assert backbone.features == features and backbone(images).shape == (2, features)
    assert backbone.stage_names[-1] == last
    full = build_backbone(random_model(name), image_size=size, device="meta")
    later = full.stage_names[len(backbone.stages) :]
    kept = {tensor for tensor in full.state_dict() if full.stage_of(tensor) not in later}
    assert set(backbone.state_dict()) == kept


@torch.no_grad()
def test_torchvisions_tokens_are_pooled_as_the_network_does() -> None:
    images = torch.randn(2, 3, 32, 32)
    pooled = {}
    for pool in ("auto", "avg", "flatten"):
        torch.manual_seed(0)
        model = random_model("torchvision/vit_b_16", last_stage="encoder_layer_0", pool=pool)
        pooled[pool] = build_backbone(model, image_size=32).eval()(images)
    tokens = pooled["flatten"].view(2, 5, 768)
    assert torch.equal(pooled["auto"], tokens[:, 0]) and torch.equal(pooled["avg"], tokens[:, 1:].mean(1))


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
