"""Pickled arrays read without unpickling: what is sound, what is damaged, and what means harm."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from python2 import npy, save_python2

from lit_transfer.errors import UserError
from lit_transfer.model import pickled


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
