"""The BVLC AlexNet against a reference in NumPy, from a file such as Python 2 wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packing import draw
from python2 import save_python2

from lit_transfer.data.packing.items import Pack
from lit_transfer.data.packing.pack import pack
from lit_transfer.errors import UserError
from lit_transfer.model import caffe
from lit_transfer.model.augment import normalise, settle_image
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.sources import build_net
from lit_transfer.reading import load
from lit_transfer.recipe import Model

Array = NDArray[Any]
CONFIGS = Path(__file__).parents[2] / "configs"


def generated(name: str) -> list[Array]:
    """A layer's weights and biases, of the true shapes, the same at each call."""
    shape = caffe.SHAPES[name]
    draws = np.random.default_rng([4, *name.encode()])
    spread = np.sqrt(2 / np.prod(shape[:-1])).astype(np.float32)
    weights = draws.standard_normal(shape, dtype=np.float32) * spread
    return [weights, draws.standard_normal(shape[-1], dtype=np.float32)]


@pytest.fixture(scope="module")
def bvlc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bvlc")
    yield save_python2(folder / "bvlc_alexnet.npy", {name: generated(name) for name in caffe.SHAPES})
    (folder / "bvlc_alexnet.npy").unlink()  # 244 MB


def convolve(x: Array, name: str, stride: int = 1, pad: int = 0, groups: int = 1) -> Array:
    """`[H, W, C]` to `[h, w, out]` by im2col, rectified."""
    weights, biases = (array.astype(np.float64) for array in generated(name))
    side = weights.shape[0]
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(0, 1))[::stride, ::stride]
    outputs = []
    for inputs, kernels in zip(np.split(windows, groups, axis=2), np.split(weights, groups, axis=3), strict=True):
        columns = inputs.transpose(0, 1, 3, 4, 2).reshape(*inputs.shape[:2], -1)
        outputs.append(columns @ kernels.reshape(-1, kernels.shape[-1]))
    return np.maximum(np.concatenate(outputs, axis=-1) + biases, 0)


def normalise_channels(x: Array) -> Array:
    """Caffe: x_c / (1 + alpha / 5 * the sum of x^2 over 5 channels around c) ^ beta."""
    squares = np.pad(x**2, ((0, 0), (0, 0), (2, 2)))
    sums = sum(squares[:, :, i : i + x.shape[2]] for i in range(5))
    return x / (1 + 1e-4 / 5 * sums) ** 0.75


def pool(x: Array) -> Array:
    """The maximum over 3x3 windows at each second place; a window may reach over the edge."""
    count = -(-(len(x) - 3) // 2) + 1
    rows = [[x[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((0, 1)) for j in range(count)] for i in range(count)]
    return np.array(rows)


def connect(x: Array, name: str) -> Array:
    weights, biases = generated(name)
    parts = range(0, len(x), 1024)  # in parts, for in double precision the whole matrix is large
    return sum(x[i : i + 1024] @ weights[i : i + 1024].astype(np.float64) for i in parts) + biases


def reference(picture: Array) -> Array:
    """The logits of an RGB picture `[H, W, 3]` of uint8, as Caffe's prototxt has them, in double precision."""
    x = picture[:, :, ::-1].astype(np.float64) - np.array([104.00698793, 116.66876762, 122.67891434])
    x = pool(normalise_channels(convolve(x, "conv1", stride=4)))
    x = pool(normalise_channels(convolve(x, "conv2", pad=2, groups=2)))
    x = convolve(x, "conv3", pad=1)
    x = convolve(x, "conv4", pad=1, groups=2)
    x = pool(convolve(x, "conv5", pad=1, groups=2))
    for name in ("fc6", "fc7"):
        x = np.maximum(connect(x.reshape(-1), name), 0)
    return connect(x, "fc8")


@torch.no_grad()
def test_the_network_computes_what_caffe_does(bvlc: Path) -> None:
    network = build_net(Model(backbone="caffe/alexnet", weights=f"caffe_npy:{bvlc}", drop=[]))
    _, preprocessing = settle_image(network.image, network.image)
    for size in (227, 199):  # at 199 each of the three poolings has a window that reaches over the edge
        picture = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
        picture[: size // 2, :, 0] //= 3  # a picture without structure would hide a transposed axis
        picture[:, : size // 3] //= 2
        images = normalise(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, preprocessing)
        logits = network.net.eval()(images)[0].double().numpy()
        expected = reference(picture)
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
        assert logits.argsort()[::-1][:5].tolist() == expected.argsort()[::-1][:5].tolist()


def test_the_backbone_has_the_weights_and_says_where_from(bvlc: Path) -> None:
    backbone = build_backbone(Model(backbone="caffe/alexnet", weights=f"caffe_npy:{bvlc}", last_stage="conv2"))
    weights, biases = generated("conv2")
    state = backbone.state_dict()
    assert torch.equal(state["net.conv2.weight"], torch.from_numpy(weights).permute(3, 2, 0, 1))
    assert torch.equal(state["net.conv2.bias"], torch.from_numpy(biases))
    assert backbone.provenance["origin"] == f"caffe_npy:{bvlc}" and backbone.provenance["sha256"]
    assert (backbone.image.size, backbone.features) == (227, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc7": None}, "it lacks fc7 and has no other besides"),
        ({"prob": []}, "it lacks no layer and has prob besides"),
        ({"conv1": []}, r"conv1 has nothing instead of float32 \[11, 11, 3, 96\]"),
        ({"conv1": [np.zeros((11, 11, 3, 96), np.float32)]}, r"has float32 \[11, 11, 3, 96\] instead of"),
        (
            {"conv1": [np.zeros((96, 3, 11, 11), np.float32), np.zeros(96, np.float32)]},
            r"has float32 \[96, 3, 11, 11\]",
        ),
        ({"conv1": [np.zeros((11, 11, 3, 96)), np.zeros(96)]}, r"conv1 has float64 \[11, 11, 3, 96\] and float64"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    layers = {name: [np.zeros(1, np.float32)] * 2 for name in caffe.SHAPES} | change
    path = save_python2(tmp_path / "a.npy", {name: arrays for name, arrays in layers.items() if arrays is not None})
    with pytest.raises(UserError, match=message) as caught:
        caffe.read(path)
    assert str(caught.value).startswith(f"{path} is not the BVLC AlexNet: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "caffe/alexnet"}, "no hub has weights of caffe/alexnet; bring bvlc_alexnet.npy"),
        ({"backbone": "timm/resnet18", "weights": "caffe_npy:a.npy"}, "is for model.backbone caffe/alexnet, not timm"),
        ({"backbone": "caffe/googlenet", "weights": "none"}, "only caffe/alexnet is known"),
        ({"backbone": "caffe/alexnet", "weights": "caffe_npy:nowhere.npy"}, "nowhere.npy does not exist"),
    ],
)
def test_faulty_settings(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_net(Model(**settings))  # type: ignore[arg-type]


def test_the_config_of_the_signs_gives_43_of_them_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Pack = load(CONFIGS / "data" / "signs.yaml", cls=Pack)
    rows = [f"{k:05}/{k:05}_{track:05}_00000.png,{k:05},{k:05}_{track:05}" for k in range(43) for track in range(4)]
    for i, row in enumerate(rows):
        draw(tmp_path / settings.source.rpartition("/")[0] / row.split(",")[0], i)
    (tmp_path / settings.source).write_text("\n".join(["path,label,group", *rows]) + "\n")
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    manifest = pack(settings).manifest
    names = manifest.display()
    assert len(set(names)) == 43
    assert (names[0], names[14], names[42]) == ("Speed limit (20 km/h)", "Stop", "End of no overtaking for trucks")
    assert manifest.classes()[14] == "00014"
