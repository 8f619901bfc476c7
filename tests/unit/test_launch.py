from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_transfer import launch
from lit_transfer.errors import UserError
from lit_transfer.launch.options import read_config

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
    assert callable(importlib.import_module(f"lit_transfer.launch.{verb}").main)


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
        (["--config"], "--config needs a file."),
        (["--config", "none.yaml"], "config file 'none.yaml' does not exist."),
        (["--config", "FILE", "--sed", "1"], "'sed' is not a key of the config. Did you mean 'seed'?"),
    ],
)
def test_what_is_wrong_with_the_options_is_said(file: str, arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        read_config([file if a == "FILE" else a for a in arguments], "lit-transfer train", None)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--config", "x", "-h"]])
def test_help_lists_the_keys_of_a_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read_config(arguments, "lit-transfer train", "What it does.")
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for text in (
        "What it does.",
        "--config FILE",
        "--model.backbone",
        "--trainer.precision",
        "of the order of samples",
    ):
        assert text in said
