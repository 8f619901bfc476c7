"""Config dataclasses from YAML and the command line, and back to YAML."""

from __future__ import annotations

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from lit_transfer.blocks import FeaturesConfig
from lit_transfer.config import Config
from lit_transfer.errors import UserError, nearest, require

_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", "~nN"),
    "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+.0123456789",
    ),
}
"""What plain scalars mean in YAML 1.2 (core schema, decimal numbers), with the characters they begin with."""


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: `off`, `no` and dates stay text, `1e-3` is a number, `012` and `1:30` are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping; a key given twice is an error, where YAML would forget the first."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1} repeats the key '{key.value}'; remove one.")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _YamlDumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else, such as `off` and `1e-3`."""


_YamlLoader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_YamlLoader, _YamlDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [*_first, ""])


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
    return typing.cast(ConfigT, _build(cls, plain, ""))


def load(path: str | Path, overrides: Sequence[str] = (), cls: type[ConfigT] = Config) -> ConfigT:  # type: ignore[assignment]
    """Build a config from a YAML file and command-line overrides (`--a.b VALUE`, `--phases.0.lr=VALUE`)."""
    return parse(cls, override(_read_file(path), overrides))


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> Config | FeaturesConfig:
    """As `load`, the config of a training run or, where it has backbones, of features."""
    plain = override(_read_file(path), overrides)
    return parse(FeaturesConfig, plain) if "backbones" in plain else parse(Config, plain)


def _read_file(path: str | Path) -> dict[str, Any]:
    require(Path(path).is_file(), f"config file '{path}' does not exist.")
    plain = read_yaml(Path(path).read_text(encoding="utf-8"))
    require(isinstance(plain, dict), f"config file '{path}' must hold keys and values.")
    return typing.cast(dict[str, Any], plain)


def override(plain: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """A copy of nested plain values with `--dotted.key VALUE` pairs applied; numbers step into lists."""
    result = copy.deepcopy(plain)
    pending = list(arguments)
    while pending:
        flag = pending.pop(0)
        require(flag.startswith("--"), f"'{flag}' is not an option; overrides are written --section.key VALUE.")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            require(bool(pending), f"--{key} has no value; write --{key} VALUE.")
            text = pending.pop(0)
        _assign(result, key, read_yaml(text))
    return result


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain values, every field present, in order."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """A config dataclass as YAML text that `load` reads back to an equal config."""
    return yaml.dump(to_plain(config), Dumper=_YamlDumper, sort_keys=False, allow_unicode=True, width=110)


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


_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    types.NoneType: "null",
}


def _build(hint: Any, value: Any, path: str) -> Any:
    """A plain value as the type that is asked for; `UserError` if it is none of its options."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    option = next((option for option in options if _fits(option, value)), None)
    if option is None:
        words = [word for option in options for word in _words(option)]
        listed = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
        raise UserError(f"{path or 'the config'} {value!r} is not {listed}.{nearest(str(value), words)}")
    if dataclasses.is_dataclass(option):
        return _build_fields(typing.cast(type, option), value, path)
    if typing.get_origin(option) is list:
        return [_build(typing.get_args(option)[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    if typing.get_origin(option) is dict:
        _, items = typing.get_args(option)
        return {str(key): _build(items, item, f"{path}.{key}") for key, item in value.items()}
    # 1.10 has become 1.1 by now: only of a whole number can the text still be told.
    is_text = option is str or typing.get_origin(option) is Literal
    require(not (is_text and isinstance(value, float)), f"{path} is text, but {value} a number; quote it.")
    if is_text:
        return _at_home(str(value))
    if option is bool:
        return _as_bool(value)
    return float(value) if option is float else value


def _at_home(text: str) -> str:
    """Only paths begin with ~/: below the home folder, as a shell would have it, which does not see into files."""
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def _fits(option: Any, value: Any) -> bool:
    """Whether a plain value can become an option of a type, apart from what is inside lists and mappings."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if typing.get_origin(option) is Literal:
        return str(value) in typing.get_args(option)
    if dataclasses.is_dataclass(option) or typing.get_origin(option) is dict:
        return isinstance(value, Mapping)
    if typing.get_origin(option) is list:
        return isinstance(value, list)
    if option is str:
        return isinstance(value, str) or is_number
    if option in (int, float):
        return is_number and (option is float or isinstance(value, int))
    if option is bool:
        return _as_bool(value) is not None
    return option is Any or isinstance(value, option)


def _as_bool(value: Any) -> bool | None:
    """Where the type asks for true or false, the words of YAML 1.1 also mean them; elsewhere they stay text."""
    return value if isinstance(value, bool) else _SWITCHES.get(value.lower()) if isinstance(value, str) else None


def _words(option: Any) -> list[str]:
    """What an option of a type is called in a sentence."""
    if typing.get_origin(option) is Literal:
        return list(typing.get_args(option))
    if dataclasses.is_dataclass(option) or typing.get_origin(option) is dict:
        return ["keys with values"]
    return ["a list"] if typing.get_origin(option) is list else [_NAMES[option]]


def _build_fields(cls: type, value: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    where = path or "the config"
    for key in value:
        require(key in fields, f"'{key}' is not a key of {where}.{nearest(str(key), list(fields))}")
    for name, spec in fields.items():
        optional = spec.default is not dataclasses.MISSING or spec.default_factory is not dataclasses.MISSING
        require(optional or name in value, f"{where} lacks '{name}'.")
    return cls(**{key: _build(hints[key], item, f"{path}.{key}".lstrip(".")) for key, item in value.items()})
