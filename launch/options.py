"""What the verbs share on the command line: one reader of settings, one printer of help."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn, TypeVar

from lit_transfer.config import Config
from lit_transfer.errors import UserError, require
from lit_transfer.reading import load, override, parse

WIDTH, TEXT = 100, 44
"""Columns of the help, and the column where the text on a key begins."""

ConfigT = TypeVar("ConfigT")


class Parser(argparse.ArgumentParser):
    """argparse, with its faults as one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of printing the usage."""
        raise UserError(f"{message}; {self.prog} --help says what it takes.")


def read_config(
    argv: Sequence[str],
    program: str,
    doc: str | None,
    cls: type[ConfigT] = Config,  # type: ignore[assignment]
    *,
    needs_file: bool = True,
) -> ConfigT:
    """The settings of `--config FILE` with each `--section.key VALUE` applied; `--help` lists the keys.

    Args:
        argv: the arguments behind the verb; none at all is `--help`.
        program: as it is called, such as `lit-transfer train`.
        doc: of the verb, in the form "`USAGE`: what it does".
        cls: dataclass of the settings.
        needs_file: whether `--config` must be given.

    Raises:
        UserError: no file, an unknown key, or a value that breaks a rule.
    """
    path, overrides = find_config(argv, program, doc, cls, needs_file=needs_file)
    return parse(cls, override({}, overrides)) if path is None else load(path, overrides, cls)


def find_config(
    argv: Sequence[str], program: str, doc: str | None, cls: type, *, needs_file: bool = True
) -> tuple[str | None, list[str]]:
    """The path behind `--config`, None where there is none, and the other arguments; as `read_config` takes them."""
    arguments = list(argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text(doc or "", cls))
        sys.exit(0)
    places = [i for i, argument in enumerate(arguments) if argument.partition("=")[0] == "--config"]
    if not places and not needs_file:
        return None, arguments
    require(len(places) == 1, f"{program} needs --config FILE once; configs/ has examples.")
    place = places[0]
    _, equals, path = arguments.pop(place).partition("=")
    if not equals:
        require(place < len(arguments), "--config has no value; write --config FILE.")
        path = arguments.pop(place)
    return path, arguments


def help_text(doc: str, cls: type) -> str:
    """Usage, what the verb does, and every key with its type, default and meaning."""
    usage, _, what = doc.strip().removeprefix("`").partition("`: ")
    keys = "Keys of the config; each can be given as --key VALUE, which overrides the file:"
    return "\n".join([f"usage: {usage}\n", what[:1].upper() + what[1:], f"\n{keys}", *_section(cls, "", "")])


def _section(cls: type, path: str, about: str) -> Iterator[str]:
    """The keys of a dataclass, then the sections in it."""
    hints, meanings, inner = typing.get_type_hints(cls), _meanings(cls), {}
    yield from ["", *textwrap.wrap(about, WIDTH)] if path else [""]
    for field in dataclasses.fields(cls):
        found = _dataclass_in(hints[field.name])
        if found:
            inner[field] = found
        else:
            key = f"  --{path}.{field.name}".replace("--.", "--")
            yield _entry(f"{key} {_type(hints[field.name])} ({_default(field)})", meanings[field.name])
    for field, (section, place) in inner.items():
        name = f"{path}.{field.name}{place}".lstrip(".")
        more = (", .1, ..." if place else "") + (" (null by default)" if field.default is None else "")
        yield from _section(section, name, f"{name}{more}: {meanings[field.name]}")


def _entry(head: str, text: str) -> str:
    """A key and its meaning, beside each other as far as there is room."""
    lines = textwrap.wrap(text, WIDTH - TEXT, break_on_hyphens=False)
    if len(head) <= TEXT - 2:
        lines[0] = head.ljust(TEXT) + lines[0]
        return f"\n{' ' * TEXT}".join(lines)
    return f"\n{' ' * TEXT}".join([head, *lines])


def _meanings(cls: type) -> dict[str, str]:
    """What the docstring of a dataclass says of its fields, below `Args:`."""
    _, _, args = (inspect.getdoc(cls) or "").partition("Args:\n")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", args, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _dataclass_in(hint: Any) -> tuple[type, str] | None:
    """The dataclass that a field holds, and how its place is written where it holds a list of them."""
    for option in _options(hint):
        if dataclasses.is_dataclass(option):
            return typing.cast(type, option), ""
        items = typing.get_args(option)
        if typing.get_origin(option) is list and dataclasses.is_dataclass(items[0]):
            return typing.cast(type, items[0]), ".0"
    return None


_NAMES = {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false", types.NoneType: "null", Any: "VALUE"}


def _type(hint: Any) -> str:
    """A type as it is written behind a key; that null is possible is said by the default alone."""
    words: list[str] = []
    for option in _options(hint):
        origin, items = typing.get_origin(option), typing.get_args(option)
        if origin is Literal:
            words += items
        elif origin is list:
            words.append(f"[{_type(items[0])}, ...]")
        elif origin is dict:
            words.append(f"{{{_type(items[0])}: {_type(items[1])}, ...}}")
        elif option is not types.NoneType:
            words.append(_NAMES[option])
    return "|".join(words)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return field.default if isinstance(field.default, str) and field.default else json.dumps(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else json.dumps(field.default_factory())
