"""The BVLC AlexNet against a reference in NumPy, from a file such as Python 2 wrote, and files that mean harm."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packing import draw

from lit_transfer.data.packing.items import Pack
from lit_transfer.data.packing.pack import pack
from lit_transfer.errors import UserError
from lit_transfer.model import caffe, pickled
from lit_transfer.model.augment import normalise, settle_image
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.sources import build_net
from lit_transfer.reading import load
from lit_transfer.recipe import Model

Array = NDArray[Any]
HEADER = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
CONFIGS = Path(__file__).parents[2] / "configs"


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes what NumPy wrote under Python 2: protocol 2, texts and the bytes of arrays as `str`."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_python2_str(self, value: str | bytes) -> None:
        data = value.encode("latin-1") if isinstance(value, str) else value
        self.write(b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data)))
        self.write(data)
        self.memoize(value)

    def save_global(self, value: Any, name: str | None = None) -> None:
        if getattr(value, "__name__", "") == "_reconstruct":
            self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
            self.memoize(value)
        else:
            super().save_global(value, name)

    dispatch[str] = dispatch[bytes] = save_python2_str


def npy(path: Path, pickled_object: bytes, header: bytes = HEADER) -> Path:
    """A .npy file of version 1.0."""
    padded = header.ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + pickled_object)
    return path


def save_python2(path: Path, layers: object) -> Path:
    wrapped = np.empty((), dtype=object)
    wrapped[()] = layers
    with npy(path, b"").open("ab") as file:
        Python2Pickler(file, protocol=2, fix_imports=False).dump(wrapped)
    return path


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


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_python_3_saves_is_read_too(tmp_path: Path, protocol: int) -> None:
    layers = {
        "a": [np.arange(24, dtype="<f4").reshape(2, 3, 4), np.asfortranarray(np.arange(6.0).reshape(2, 3))],
        "b": (np.arange(300, dtype=">i2"), np.array([True, False]), np.array(7, dtype=np.float16)),
        "c": [],
    }
    wrapped = np.empty((), dtype=object)
    wrapped[()] = layers
    read = pickled.read_arrays(npy(tmp_path / "a.npy", pickle.dumps(wrapped, protocol=protocol)))
    assert list(read) == ["a", "b", "c"]
    for name, arrays in layers.items():
        for ours, theirs in zip(read[name], arrays, strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs) and ours.shape == theirs.shape
    np.save(tmp_path / "b.npy", layers, allow_pickle=True)
    assert np.array_equal(pickled.read_arrays(tmp_path / "b.npy")["a"][0], layers["a"][0])


class Calls:
    """Pickled, a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        pickled.read_arrays(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is not a dictionary of lists of arrays") and len(message) < 600
    assert "\n" not in message
    return message


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (Calls(os.system, "touch harm"), "system"),
        (Calls(eval, "open('harm', 'w')"), "eval"),
        (Calls(getattr, "", "join"), "getattr"),
        (Calls(np.load, "other.npy", None, True), "load"),
        (Calls(np.fromfile, "/dev/zero"), "fromfile"),
        (Calls(np.zeros, 10**15), "zeros"),
        (Calls(pickle.loads, pickle.dumps(Calls(os.system, "touch harm"))), "loads"),
        (Calls(np.memmap, "harm", "u1", "w+", 0, (9,)), "memmap"),
    ],
)
def test_nothing_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, call: Calls, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = refused(npy(tmp_path / "a.npy", pickle.dumps({"conv1": [call]}, protocol=protocol)))
    assert named in text or protocol == 0
    assert not (tmp_path / "harm").exists()


NDARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
"""Instructions for an array without a state."""


def dtype(code: bytes, parts: bytes = b"NNN") -> bytes:
    """Instructions for a little-endian type."""
    return (
        b"cnumpy\ndtype\nU"
        + bytes([len(code)])
        + code
        + b"K\x00K\x01\x87R(K\x03U\x01<"
        + parts
        + b"J\xff\xff\xff\xff" * 2
        + b"K\x00tb"
    )


def array(shape: bytes, code: bytes = b"f4", data: bytes = b"U\x04abcd", parts: bytes = b"NNN") -> bytes:
    """Instructions for a dictionary of a list of one array."""
    return b"\x80\x02}U\x01a](" + NDARRAY + b"(K\x01" + shape + dtype(code, parts) + b"\x89" + data + b"tbes."


HUGE = b"\x8a\x08" + (2**62).to_bytes(8, "little")
LONGEST = b"\x8a\xff" + b"\x7f" * 255
DEEP = b")" + b"\x85" * 5000


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (array(HUGE + b"\x85"), r"an array of 4 bytes says that its shape is \(4611686018427387904,\)"),
        (array(HUGE + HUGE + HUGE + b"\x87"), "an array of 4 bytes says"),
        (array(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86"), "a side that is not 1 or more"),
        (array(HUGE + b"K\x00\x86", data=b"U\x00"), "a side that is not 1 or more"),
        (array(b"\x88\x85"), "a side that is not 1 or more"),
        (array(DEEP), "a side that is not 1 or more"),
        (array(b"(" + b"K\x01" * 9 + b"t"), "an array has 9 sides, more than 8"),
        (array(b"(" + LONGEST + b"q\x01" + b"h\x01" * 9900 + b"t"), "an array has 9901 sides, more than 8"),
        (b"\x80\x02}T\x01\x01\x00\x00" + b"a" * 257 + b"Ns.", "a text of 257 characters stands where a name should"),
        (array(b"K\x02\x85"), "an array of 4 bytes says that its shape is .2,. and its type f4"),
        (array(b"K\x01\x85", data=b"]NaK\x01a"), "neither one of numbers nor without dimensions"),
        (array(b"K\x01\x85", data=b"K\x04"), "neither one of numbers nor without dimensions"),
        (array(b"K\x01\x85", b"O8", b"](Ne"), "neither one of numbers nor without dimensions"),
        (array(b"K\x01\x85", b"O8", b"U\x08abcdefgh"), "neither one of numbers nor without dimensions"),
        (array(b")", b"O8", b"](NNe"), "neither one of numbers nor without dimensions"),
        (array(b")", b"O8", b"]Na"), "'a' holds other things than arrays of numbers"),
        (array(b"K\x01\x85", b"V4"), "'numpy dtype' with arguments"),
        (array(b"K\x01\x85", b"f4,O8"), "'numpy dtype' with arguments"),
        (array(b"K\x01\x85", parts=b"U\x01x\x85N}"), "the type f4 is no plain one"),
        (array(b"K\x01\x85", parts=DEEP + b"NN"), "the type f4 is no plain one"),
        (b"\x80\x02}U\x01a]" + NDARRAY + b"as.", "other things than arrays of numbers"),
        (b"\x80\x02}U\x01a](K\x01es.", "other things than arrays of numbers"),
        (b"\x80\x02}U\x01aK\x01s.", "'a' is a int"),
        (b"\x80\x02}" + DEEP + b"Ns.", "a tuple stands where a text should"),
        (b"\x80\x02}K\x01Ns.", "a int stands where a text should"),
        (b"\x80\x02].", "it holds a list"),
        (b"\x80\x02}N}b.", "it builds a NoneType"),
        (b"\x80\x02}}a.", "it appends to what is no list"),
        (b"\x80\x02]U\x01aNs.", "sets keys of what is no dictionary"),
        (b"\x80\x02}U\x01a](" + DEEP + b"NRes.", "calls 'tuple' with"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "'_codecs encode' with"),
        (b"\x80\x02c_codecs\nencode\nX\x03\x00\x00\x00\xe2\x82\xacX\x06\x00\x00\x00latin1\x86R.", "can't encode"),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\n.", "asks for 'numpy.core.multiarray scalar'"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "asks for 'posix system'"),
        (b"\x80\x02cos\nsystem\n.", "asks for 'os system'"),
        (b"(ios\nsystem\n.", "uses INST"),
        (b"(cos\nsystem\no.", "asks for 'os system'"),
        (b"\x80\x02P1\n.", "uses PERSID"),
        (b"\x80\x02\x82\x01.", "uses EXT1"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "uses NEWOBJ"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "uses BYTEARRAY8"),
        (b"\x80\x02T\xff\xff\xff\x7fabc", "but only 3 remain"),
        (b"\x80\x02}2", "uses DUP"),
        (b"\x80\x02}r\xff\xff\xff\xff.", None),
        (b"\x80\x02}h\x07.", "do not fit together"),
        (b"\x80\x02}s.", "do not fit together"),
        (b"\x80\x02}\x87.", "do not fit together"),
        (b"\x80\x02}t.", "do not fit together"),
        (b"\x80\x02(U\x01ae.", "do not fit together"),
        (b"\x80\x02}(U\x01au.", "shorter"),
        (b"\x80\x02}}.", "leaves 2 objects"),
        (b"\x80\x02}.}.", "something follows"),
        (b"\x80\x02}", "has no end"),
        (b"\x80\x02\xff.", "uses b'.xff'"),
        (b"\x80\x02" + b"N" * 20_000 + b".", "more than 10000 instructions"),
    ],
)
def test_instructions_that_mean_harm(tmp_path: Path, instructions: bytes, message: str | None) -> None:
    path = npy(tmp_path / "a.npy", instructions)
    if message is None:  # a place in the memo is only a key
        assert pickled.read_arrays(path) == {}
        return
    with pytest.raises(UserError, match=message):
        pickled.read_arrays(path)
    refused(path)


def test_the_instructions_of_these_tests_else_make_an_array(tmp_path: Path) -> None:
    (read,) = pickled.read_arrays(npy(tmp_path / "a.npy", array(b"K\x02K\x01\x86", b"f2")))["a"]
    assert read.shape == (2, 1) and read.tobytes() == b"abcd" and not read.flags.writeable


def test_a_text_encoded_again_and_again_does_not_fill_the_memory(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 10_000) + b"a" * 10_000
    again = b"h\x00h\x01h\x02\x86R"
    names = b"c_codecs\nencode\nq\x00" + text + b"q\x01X\x06\x00\x00\x00latin1q\x02"
    assert "encodes more text" in refused(npy(tmp_path / "a.npy", b"\x80\x02" + names + again * 3 + b"."))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 a zip file, as of np.savez", "does not begin as a .npy file"),
        (b"\x93NUMPY\x02\x00", "does not begin as a .npy file"),
        (b"\x93NUMPY\x01\x00\xff\xff{'descr': '|O'", "its header"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    assert message in refused(path)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (), 'more': 1}",
        b"[" * 80,
    ],
)
def test_other_headers(tmp_path: Path, header: bytes) -> None:
    assert "its header" in refused(npy(tmp_path / "a.npy", b"\x80\x02}.", header))


def test_a_file_cut_at_any_place_is_refused(tmp_path: Path) -> None:
    layers = {"conv1": [np.ones((2, 3), np.float32), np.ones(3, np.float32)]}
    whole = save_python2(tmp_path / "whole.npy", layers).read_bytes()
    assert np.array_equal(pickled.read_arrays(tmp_path / "whole.npy")["conv1"][0], layers["conv1"][0])
    for length in range(len(whole)):
        (tmp_path / "cut.npy").write_bytes(whole[:length])
        refused(tmp_path / "cut.npy")


def test_a_file_with_any_wrong_byte_is_read_or_refused(tmp_path: Path) -> None:
    layers = {"conv1": [np.ones((2, 3), np.float32), np.ones(3, np.float32)]}
    whole = save_python2(tmp_path / "a.npy", layers).read_bytes()
    draws = np.random.default_rng(0)
    for _ in range(1000):
        damaged = bytearray(whole)
        damaged[draws.integers(len(whole))] = draws.integers(256)
        (tmp_path / "a.npy").write_bytes(damaged)
        try:
            assert all(isinstance(arrays, list) for arrays in pickled.read_arrays(tmp_path / "a.npy").values())
        except UserError as error:
            assert "not a dictionary" in str(error)


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
