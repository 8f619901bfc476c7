"""Config dataclasses from YAML and the command line, and back to YAML."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser

from lit_transfer.config import Config
from lit_transfer.errors import UserError, nearest, require


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: `off`, `no` and dates stay text, `1e-3` is a number, `012` and `1:30` are text."""


_YamlLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+.0123456789",
    ),
):
    _YamlLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [*_first.replace("\0", ""), ""]
    )
_YamlLoader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def read_yaml(text: str) -> Any:
    """Parse YAML 1.2 scalars into plain Python values. Duplicate keys and syntax errors raise `UserError`."""
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from None


ConfigT = TypeVar("ConfigT")


def parse(cls: type[ConfigT], plain: Mapping[str, Any]) -> ConfigT:
    """Build a config dataclass from plain values (a parsed YAML file).

    Raises:
        UserError: an unknown key (the nearest one is named), a missing one, a wrong type or a broken rule.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "config")
    checked = _check_keys(cls, plain, "")
    try:
        return typing.cast(ConfigT, parser.instantiate(parser.parse_object({"config": checked})).config)
    except UserError:
        raise
    except Exception as error:  # jsonargparse raises several kinds; each holds one readable message
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise UserError(str(cause) if cause else _type_message(str(error))) from None


def _type_message(text: str) -> str:
    """jsonargparse's message on a wrong type as one sentence with key, value and rule."""
    words = " ".join(text.split())
    key = re.search(r'key "config\.([^"]+)"', words)
    value = re.search(r"(?:Got value|Given value): (.*)$", words)
    rules = re.findall(r"Expected an? (.+?)(?:\. Got value| - Expected| Given value|$)", words)
    if not (key and value and rules):
        return words
    expected = " or ".join(re.sub(r"<class '(\w+)'>|typing\.", r"\1", rule) for rule in rules)
    return f"{key[1]} {value[1]!r} is of the wrong type; it must be {expected}."


def load(path: str | Path, overrides: Sequence[str] = (), cls: type[ConfigT] = Config) -> ConfigT:  # type: ignore[assignment]
    """Build a config from a YAML file and command-line overrides (`--a.b VALUE`, `--phases.0.lr=VALUE`)."""
    require(Path(path).is_file(), f"config file '{path}' does not exist.")
    plain = read_yaml(Path(path).read_text())
    require(isinstance(plain, dict), f"config file '{path}' must hold keys and values.")
    return parse(cls, override(plain, overrides))


def override(plain: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """A copy of nested plain values with `--dotted.key VALUE` pairs applied; numbers step into lists."""
    result = read_yaml(yaml.safe_dump(plain))
    pending = list(arguments)
    while pending:
        flag = pending.pop(0)
        require(
            flag.startswith("--"), f"'{flag}' is not an option; overrides are written --section.key VALUE."
        )
        key, equals, text = flag[2:].partition("=")
        if not equals:
            require(bool(pending), f"--{key} has no value; write --{key} VALUE.")
            text = pending.pop(0)
        _assign(result, key, read_yaml(text))
    return typing.cast(dict[str, Any], result)


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain values, every field present, in order."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """A config dataclass as YAML text that `load` reads back to an equal config."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=110)


def _assign(node: Any, dotted: str, value: Any) -> None:
    keys = dotted.split(".")
    for key in keys[:-1]:
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = _item(node, key, dotted)
    if isinstance(node, list):
        _item(node, keys[-1], dotted)
        node[int(keys[-1])] = value
    else:
        require(isinstance(node, dict), f"--{dotted}: there is no '{keys[-1]}' below a plain value.")
        node[keys[-1]] = value


def _item(node: Any, key: str, dotted: str) -> Any:
    if isinstance(node, list):
        require(
            key.isdecimal() and int(key) < len(node),
            f"--{dotted}: '{key}' is not a place in a list of {len(node)}; count from 0.",
        )
        return node[int(key)]
    require(isinstance(node, dict), f"--{dotted}: there is no '{key}' below a plain value.")
    return node[key]


def _check_keys(hint: Any, value: Any, path: str) -> Any:
    """Refuse unknown and missing keys in a sentence, and read numbers as text where text is meant."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if isinstance(option, type) and dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return _check_fields(option, value, path)
        if typing.get_origin(option) is list and isinstance(value, list):
            return [
                _check_keys(typing.get_args(option)[0], item, f"{path}[{i}]") for i, item in enumerate(value)
            ]
    texts = {
        text for option in options if typing.get_origin(option) is Literal for text in typing.get_args(option)
    }
    wants_text = str in options or str(value) in texts
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and wants_text and not {int, float} & set(options) else value


def _check_fields(cls: type, value: Mapping[str, Any], path: str) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    where = path or "the config"
    for key in value:
        require(key in fields, f"'{key}' is not a key of {where}.{nearest(str(key), list(fields))}")
    for name, spec in fields.items():
        optional = spec.default is not dataclasses.MISSING or spec.default_factory is not dataclasses.MISSING
        require(optional or name in value, f"{where} lacks '{name}'.")
    return {key: _check_keys(hints[key], item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
