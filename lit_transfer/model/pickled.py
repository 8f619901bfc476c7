"""The arrays of a pickled dictionary in a .npy file, taken out without unpickling it.

Old weights are spread as `np.save(file, {layer: [weights, biases]})`, which NumPy stores as a pickle: a program that
may call whatever can be imported. Here it is only read: a stack of plain values follows those few instructions that
such a dictionary needs. Nothing that the file names is imported or called: the names are compared as text, and an
array is a view of bytes that stand in the file, so it cannot ask for more memory than the file has bytes. A
`pickle.Unpickler` with a short `find_class` would be less code, but it lets the file set the length of its memo and
hash keys of any depth, and hands the state of each array unchecked to NumPy's C code.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from lit_transfer.errors import UserError

Array = NDArray[Any]

MAX_INSTRUCTIONS = 10_000  # a dictionary of 8 layers takes some 400
MAX_SIDES = 8  # a product of thousands of long numbers takes minutes
MAX_NAME = 256  # so does a long text that is looked at again and again

_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_MAGIC = b"\x93NUMPY\x01\x00"
# Of an array without dimensions that holds one Python object; old versions of NumPy state the size of its pointer.
_HEADER = re.compile(r"\{'descr': '\|O[48]?', 'fortran_order': False, 'shape': \(\), \}\s*")
_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_OBJECT = ("O4", "O8")
_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NAMES = (*_RECONSTRUCT, "numpy ndarray", "numpy dtype", "_codecs encode")


def read_arrays(path: Path) -> dict[str, list[Array]]:
    """The dictionary of lists of arrays in a .npy file that `np.save` wrote, under Python 2 or 3.

    The arrays are read-only and hold numbers, in the byte order of the file.

    Raises:
        UserError: another kind of file, a damaged one, or one that holds or asks for anything else.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _layers(_follow(content))
    except ValueError as error:
        reason = str(error)
    except (IndexError, KeyError):  # a stack or a memo lacks what is taken from it
        reason = "the instructions of its pickle do not fit together"
    raise UserError(
        f"{path} is not a dictionary of lists of arrays as np.save writes it: {reason}; bring the original file, or "
        "save its tensors as .safetensors."
    )


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _follow(content: mmap.mmap) -> object:
    """The one object that the pickle of a .npy file describes."""
    _need(content.read(len(_MAGIC)) == _MAGIC, "it does not begin as a .npy file of version 1.0")
    header = content.read(int.from_bytes(content.read(2), "little")).decode("latin-1")
    _need(_HEADER.fullmatch(header) is not None, f"its header {header[:80]!a} is not that of one Python object")
    machine = _Machine(content.size())
    for count, (name, argument) in enumerate(_instructions(content)):
        _need(count < MAX_INSTRUCTIONS, f"its pickle has more than {MAX_INSTRUCTIONS} instructions")
        _INSTRUCTIONS[name](machine, argument)
    _need(content.tell() == content.size(), "something follows its pickle")
    _need(len(machine.stack) == 1, f"its pickle leaves {len(machine.stack)} objects")
    return machine.stack[0]


def _instructions(content: mmap.mmap) -> Iterator[tuple[str, Any]]:
    """Name and argument of each instruction up to the last; of those that are not known no argument is read."""
    name = ""
    while name != "STOP":
        code = content.read(1)
        _need(code != b"", "its pickle has no end")
        name = _OPCODES[code].name if code in _OPCODES else ascii(code)
        _need(name in _INSTRUCTIONS, f"its pickle uses {name}, which such a dictionary does not need")
        kind = _OPCODES[code].arg
        if name == "GLOBAL":  # pickletools would undo escapes, which the rest of Python does not
            yield name, b" ".join(content.readline().rstrip(b"\n") for _ in range(2)).decode("latin-1")
        else:
            yield name, None if kind is None else kind.reader(cast("IO[bytes]", content))


def _layers(saved: object) -> dict[str, list[Array]]:
    """The arrays by name, out of the array without dimensions in which `np.save` wraps the dictionary."""
    held = saved.content if isinstance(saved, _Array) else saved
    if not isinstance(held, dict):
        raise ValueError(f"it holds a {type(held).__name__}")
    layers: dict[str, list[Array]] = {}
    for name, items in held.items():
        _need(isinstance(items, list | tuple), f"{name[:40]!a} is a {type(items).__name__}")
        arrays = [item.content for item in items if isinstance(item, _Array)]
        layers[name] = [array for array in arrays if isinstance(array, np.ndarray)]
        _need(len(layers[name]) == len(items), f"{name[:40]!a} holds other things than arrays of numbers")
    return layers


@dataclass(eq=False)
class _Dtype:
    """A type such as f4, and its byte order."""

    code: str
    order: str = "="

    def build(self, state: object) -> None:
        """Take (version, order, base, names, fields, size, alignment, flags); a plain type has no base and fields."""
        match state:
            case (_, str() | bytes() as order, None, None, None, _, _, _) if _text(order) in ("<", ">", "|", "="):
                self.order = _text(order)
            case _:
                raise ValueError(f"the type {self.code} is no plain one")


@dataclass(eq=False)
class _Array:
    """An array of numbers, or what the array without dimensions holds; nothing until the file has given it."""

    content: object = None

    def build(self, state: object) -> None:
        """Take (version, shape, type, whether the order is Fortran's, bytes or a list of objects)."""
        match state:
            case (_, (), _Dtype(code=code), _, [held]) if code in _OBJECT:
                self.content = held
            case (_, tuple(shape), _Dtype(code=code, order=order), int(fortran), bytes(data)) if code in _NUMBERS:
                numbers = np.dtype(order + code)
                _need(len(shape) <= MAX_SIDES, f"an array has {len(shape)} sides, more than {MAX_SIDES}")
                _need(
                    all(type(side) is int and side > 0 for side in shape), "an array has a side that is not 1 or more"
                )
                _need(
                    math.prod(shape) * numbers.itemsize == len(data),
                    f"an array of {len(data)} bytes says that its shape is {str(shape)[:80]} and its type {code}",
                )
                self.content = np.frombuffer(data, numbers).reshape(shape, order="F" if fortran else "C")
            case _:
                raise ValueError("an array is neither one of numbers nor without dimensions")


class _Machine:
    """A stack of plain values: None, bool, int, str, bytes, list, tuple, dict, `_Dtype` and `_Array`.

    Args:
        text_bytes: how many characters may be encoded, so that a text met again and again does not fill the memory.
    """

    def __init__(self, text_bytes: int) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.text_bytes = text_bytes

    def take(self, count: int) -> list[Any]:
        """Pop the last `count` values."""
        start = len(self.stack) - count
        if start < 0:
            raise IndexError
        taken, self.stack[start:] = self.stack[start:], []
        return taken

    def take_marked(self) -> list[Any]:
        """Pop the values behind the last mark."""
        return self.take(len(self.stack) - self.marks.pop())

    def extend(self, items: list[Any]) -> None:
        """Append to the list on top."""
        _need(isinstance(self.stack[-1], list), "it appends to what is no list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Set keys and values, which alternate, in the dictionary on top; keys are texts."""
        _need(isinstance(self.stack[-1], dict), "it sets keys of what is no dictionary")
        names = [_text(name) for name in items[::2]]
        self.stack[-1].update(zip(names, items[1::2], strict=True))

    def name(self, named: str) -> None:
        """Push a name as text."""
        _need(named in _NAMES, f"its pickle asks for {named[:80]!a}, which such a dictionary does not need")
        self.stack.append(named)

    def reduce(self) -> None:
        """What a call would give; only four are known, and none is made."""
        match self.take(2):
            case ["numpy dtype", (str() | bytes() as code, *_)] if _text(code) in (*_NUMBERS, *_OBJECT):
                self.stack.append(_Dtype(_text(code)))
            case [function, ("numpy ndarray", *_)] if function in _RECONSTRUCT:
                self.stack.append(_Array())
            case ["_codecs encode", (str(text), "latin1")]:  # how protocol 2 of Python 3 writes bytes
                self.text_bytes -= len(text)
                _need(self.text_bytes >= 0, "it encodes more text than it holds")
                self.stack.append(text.encode("latin-1"))
            case [function, _]:
                called = function[:80] if isinstance(function, str) else type(function).__name__
                raise ValueError(f"its pickle calls {called!a} with arguments that no array has")

    def build(self) -> None:
        """Give a type or an array its state."""
        built, state = self.take(2)
        _need(isinstance(built, _Dtype | _Array), f"it builds a {type(built).__name__}")
        built.build(state)
        self.stack.append(built)


def _text(value: object) -> str:
    """A short text, which is bytes under Python 2."""
    if isinstance(value, bytes | str):
        _need(len(value) <= MAX_NAME, f"a text of {len(value)} characters stands where a name should")
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, str):
        return value
    raise ValueError(f"a {type(value).__name__} stands where a text should")


def _push(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _push_python2(machine: _Machine, argument: str) -> None:
    machine.stack.append(argument.encode("latin-1"))


def _remember(machine: _Machine, argument: int | None) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.stack[-1]


_Instruction = Callable[[_Machine, Any], None]
_ARGUMENTS = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES")
_INSTRUCTIONS: dict[str, _Instruction] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(_ARGUMENTS, _push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), _push_python2),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, place: _push(machine, machine.memo[place])),
    "NONE": lambda machine, _: _push(machine, None),
    "NEWTRUE": lambda machine, _: _push(machine, True),
    "NEWFALSE": lambda machine, _: _push(machine, False),
    "EMPTY_TUPLE": lambda machine, _: _push(machine, ()),
    "EMPTY_LIST": lambda machine, _: _push(machine, []),
    "EMPTY_DICT": lambda machine, _: _push(machine, {}),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.take_marked())),
    "TUPLE1": lambda machine, _: _push(machine, tuple(machine.take(1))),
    "TUPLE2": lambda machine, _: _push(machine, tuple(machine.take(2))),
    "TUPLE3": lambda machine, _: _push(machine, tuple(machine.take(3))),
    "APPEND": lambda machine, _: machine.extend(machine.take(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.take_marked()),
    "SETITEM": lambda machine, _: machine.update(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.take_marked()),
    "GLOBAL": lambda machine, named: machine.name(named),
    "STACK_GLOBAL": lambda machine, _: machine.name(" ".join(map(_text, machine.take(2)))),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}
