from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_transfer import launch
from lit_transfer.config import Config
from lit_transfer.data.packing.items import Pack
from lit_transfer.errors import UserError
from lit_transfer.launch.options import help_text, read_config
from lit_transfer.reading import to_plain

SMALL = """
name: run
data: {train: {manifest: x, split: train}}
model: {backbone: timm/net}
phases: [{name: a, max_epochs: 1, lr: 0.1}]
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text(SMALL)
    return str(tmp_path / "config.yaml")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: lit-transfer VERB")
    assert all(f"  {verb} " in said for verb in launch.VERBS)


@pytest.mark.parametrize("verb", launch.VERBS)
def test_every_verb_has_a_module_whose_main_takes_arguments(verb: str) -> None:
    assert callable(importlib.import_module(f"lit_transfer.launch.{verb.replace('-', '_')}").main)


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: 'trian' is not a verb of lit-transfer. Did you mean 'train'?\n"


def test_a_verb_gets_the_arguments_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    stand_in = SimpleNamespace(main=lambda argv: seen.append(list(argv)) or 3)
    monkeypatch.setitem(sys.modules, "lit_transfer.launch.train", stand_in)
    monkeypatch.setattr(sys, "argv", ["lit-transfer", "train", "--config", "x"])
    assert launch.main() == 3 and seen == [["--config", "x"]]


def fails(error: BaseException) -> launch.Callable[[launch.Sequence[str]], int]:
    def main(argv: launch.Sequence[str]) -> int:
        raise error

    return main


def test_a_fault_of_the_input_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.run(fails(UserError("seed x is wrong.")), []) == 2
    assert capsys.readouterr() == ("", "error: seed x is wrong.\n")


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        launch.run(fails(ZeroDivisionError()), [])


def test_an_interrupt_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.run(fails(KeyboardInterrupt()), []) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(close=lambda: None))
    assert launch.run(fails(BrokenPipeError()), []) == 0


@pytest.mark.parametrize("place", ["first", "last", "equals"])
def test_the_config_and_overrides_may_stand_in_any_order(file: str, place: str) -> None:
    overrides = ["--seed", "3", "--phases.0.lr=0.5"]
    arguments = {
        "first": ["--config", file, *overrides],
        "last": [*overrides, "--config", file],
        "equals": [overrides[0], overrides[1], f"--config={file}", overrides[2]],
    }[place]
    config = read_config(arguments, "lit-transfer train", None)
    assert config.seed == 3 and isinstance(config.phases, list) and config.phases[0].lr == 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seed", "1"], "lit-transfer train needs --config FILE once; configs/ has examples."),
        (["--config", "a", "--config", "b"], "lit-transfer train needs --config FILE once"),
        (["--config"], "--config has no value; write --config FILE."),
        (["--config", "none.yaml"], "config file 'none.yaml' does not exist."),
        (["--config", "FILE", "--sed", "1"], "'sed' is not a key of the config. Did you mean 'seed'?"),
    ],
)
def test_what_is_wrong_with_the_options_is_said(file: str, arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        read_config([file if a == "FILE" else a for a in arguments], "lit-transfer train", None)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--config", "x", "-h"]])
@pytest.mark.parametrize("verb", ["prepare", "fetch", "find-lr", "plan", "train", "features"])
def test_help_is_a_line_of_usage_what_the_verb_does_and_the_keys(
    verb: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        launch.main([verb, *arguments])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: lit-transfer {verb} ") and "--config FILE" in lines[0] and lines[1] == ""
    assert lines[2][0].isupper() and lines[2].endswith(".")
    assert max(map(len, lines)) <= 100
    key = "  --out TEXT (required) " if verb == "prepare" else "  --seed INT (0) "
    assert any(line.startswith(key) for line in lines)
    own = [line.split()[0] for line in lines if line.startswith("--")]
    options = {"plan": ["--samples", "--classes", "--expand"], "find-lr": ["--phase", "--steps", "--from", "--to"]}
    assert own == options.get(verb, [])


def keys_of(plain: object, path: str = "-") -> list[str]:
    """Dotted keys of nested plain values, without those that hold others."""
    is_table = isinstance(plain, list) and plain and isinstance(plain[0], dict)
    inner = plain.items() if isinstance(plain, dict) else enumerate(plain) if is_table else ()
    found = [key for name, value in inner for key in keys_of(value, f"{path}.{name}")]
    return found or [path.replace("-.", "--")]


def test_help_names_each_key_of_a_config_with_type_default_and_meaning(file: str) -> None:
    stream = "{manifest: x, split: y}"
    full = [f"--data.val={stream}", f"--data.test={stream}", "--phases.0.until={metric: val/loss, patience: 1}"]
    full += ["--phases.0.lr=null", "--phases.0.heads={lr: [0.1, 0.2], weight_decay: [0.0], seeds: [0]}"]
    text = help_text("`lit-transfer x`: what it does.", Config)
    heads = re.findall(r"^  (--[\w.]+) ", text, flags=re.MULTILINE)
    assert sorted(heads) == sorted(keys_of(to_plain(read_config(["--config", file, *full], "x", None))))
    for line in (
        "  --model.backbone TEXT (required) ",
        "  --image.fit crop|squash|pad (crop) ",
        "  --model.head.dropout NUMBER|[NUMBER, ...] (0.0)\n",
        '  --model.drop [TEXT, ...] (["head"]) ',
        "  --trainer.progress true|false (true) ",
        '  --model.strip_prefix TEXT ("") ',
        "\nphases.0, .1, ...: a list of phases, or ",
        "\ndata.val (null by default): what thresholds",
    ):
        assert line in text
    pack = help_text("`lit-transfer x`: what it does.", Pack)
    assert all(f"\n  --{field.name} " in pack for field in dataclasses.fields(Pack))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--config", "x", "--samples"], "argument --samples: expected one argument; lit-transfer plan --help"),
        (["plan", "--config", "x", "--expand=1"], "argument --expand: ignored explicit argument '1'"),
        (["plan", "--samples", "5"], "lit-transfer plan needs --config FILE once"),
        (["evaluate"], "the following arguments are required: --run; lit-transfer evaluate --help"),
        (["predict", "--run", "x", "y", "--top", "z"], "argument --top: invalid int value: 'z'; lit-transfer predict"),
    ],
)
def test_a_wrong_option_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {said}") and printed.err.count("\n") == 1 and not printed.out
