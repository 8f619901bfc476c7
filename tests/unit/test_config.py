from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_transfer.config import Config
from lit_transfer.data.packing.items import Pack
from lit_transfer.errors import UserError
from lit_transfer.reading import load, override, parse, read_yaml, to_plain, to_yaml

SMALL = """
name: run
data: {train: {manifest: data/x, split: train}}
model: {backbone: timm/resnet18}
phases:
  - {name: head, max_epochs: 1, lr: 1e-3}
  - {name: thaw, max_epochs: 2, lr: 3e-4, backbone_lr: 1e-4, train: {from: layer4}}
"""


def small(*overrides: str) -> Config:
    return parse(Config, override(read_yaml(SMALL), overrides))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("y", "y"),
        ("012", "012"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("<<", "<<"),
        ("'7'", "7"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("7", 7),
        ("-3", -3),
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-.5", -0.5),
        ("2.", 2.0),
        ("-.inf", -math.inf),
    ],
)
def test_scalars_are_what_a_person_expects(text: str, value: Any) -> None:
    read = read_yaml(f"key: {text}")["key"]
    assert read == value and type(read) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(read_yaml(".nan"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "line 3 repeats the key 'a'"),
        ("a:\n  b: {c: 1, c: 2}", "line 2 repeats the key 'c'"),
        ("a: [1", "not valid YAML"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
    ],
)
def test_bad_yaml_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_yaml(text)
    assert "\n" not in str(caught.value)


def test_two_mappings_may_have_the_same_key() -> None:
    assert read_yaml("a: {x: 1}\nb: {x: 2}\nc: [{x: 3}, {x: 4}]")["c"] == [{"x": 3}, {"x": 4}]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--sed", "1"], "'sed' is not a key of the config. Did you mean 'seed'?"),
        (["--model.bakbone", "x"], "'bakbone' is not a key of model. Did you mean 'backbone'?"),
        (["--model.head.hiden", "[]"], "'hiden' is not a key of model.head. Did you mean 'hidden'?"),
        (["--phases.1.learning_rate", "1"], "'learning_rate' is not a key of phases[1]."),
        (["--phases.0.until.patiense", "1"], "'patiense' is not a key of phases[0].until. Did you mean"),
        (["--data.val.split", "val"], "data.val lacks 'manifest'."),
    ],
)
def test_an_unknown_key_names_the_nearest_at_every_depth(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        small(*overrides)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seed", "abc", "seed 'abc' is not a whole number."),
        ("seed", "1.5", "seed 1.5 is not a whole number."),
        ("seed", "null", "seed None is not a whole number."),
        ("data.workers", "true", "data.workers True is not a whole number."),
        ("augment.quarter_turns", "1", "augment.quarter_turns 1 is not true or false."),
        ("trainer.progress", "offf", "trainer.progress 'offf' is not true or false."),
        ("trainer.progress", "y", "trainer.progress 'y' is not true or false."),
        ("trainer.progress", "null", "trainer.progress None is not true or false."),
        ("trainer.progress", "[on]", "trainer.progress ['on'] is not true or false."),
        ("augment.flip_h", "often", "augment.flip_h 'often' is not a number."),
        ("image.fit", "crob", "image.fit 'crob' is not crop, squash or pad. Did you mean 'crop'?"),
        ("image.mean", "[0, 0, x]", "image.mean[2] 'x' is not a number."),
        ("model", "resnet", "model 'resnet' is not keys with values."),
        ("model.drop", "head", "model.drop 'head' is not a list."),
        ("tracking.wandb", "no", "tracking.wandb 'no' is not auto, online, offline or off."),
        ("trainer.devices", "two", "trainer.devices 'two' is not a whole number or auto."),
        ("phases", "3", "phases 3 is not a list or keys with values."),
        ("phases.0", "3", "phases[0] 3 is not keys with values."),
        ("phases.1.lr", "fast", "phases[1].lr 'fast' is not a number or null."),
        ("name", "1.10", "name is text, but 1.1 a number; quote it."),
    ],
)
def test_a_wrong_type_is_one_sentence(key: str, value: str, said: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(said)) as caught:
        small(f"--{key}", value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("name", "a/b", "must be a plain folder name"),
        ("seed", "-1", "seed -1 is outside [0, 2^63)"),
        ("monitor", "loss", "must be a validation metric"),
        ("phases", "[]", "phases is empty"),
        ("phases.1.name", "head", "two phases have one name"),
        ("data.train.fraction", "0", "fraction 0.0 is outside (0, 1]; use 1.0 for the whole split"),
        ("data.workers", "-1", "data.workers -1 is negative; use 0 or more"),
        ("image.crop", "1.5", "image.crop 1.5 is outside (0, 1]"),
        ("image.mean", "[0.5]", "image.mean [0.5] needs three values"),
        ("image.std", "[1, 0, 1]", "has a value that is not positive"),
        ("augment.crop_area", "0", "augment.crop_area 0.0 is outside (0, 1]"),
        ("augment.zoom", "1", "augment.zoom 1.0 is outside [0, 1)"),
        ("model.weights", "hub", "'hub' is not pretrained, none, file:PATH, package:MODULE, run:DIR or caffe_npy:PATH"),
        ("model.resample", "[conv]", "['conv'] cannot be resampled; only pos_embed can"),
        ("model.head.hidden", "[8, 0]", "has a width under 1"),
        ("model.head.dropout", "[0.1, 0.1]", "has 2 rates for 1 place(s)"),
        ("objective.label_smoothing", "1", "is outside [0, 1)"),
        ("objective.class_weights", "[-1, 1]", "has a negative weight"),
        ("trainer.devices", "0", "trainer.devices 0 is under 1"),
    ],
)
def test_a_broken_rule_is_one_sentence(key: str, value: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        small(f"--{key}", value)
    assert "\n" not in str(caught.value)


def test_half_precision_on_a_cpu_says_what_to_use() -> None:
    with pytest.raises(UserError, match="use bf16-mixed or 32"):
        small("--trainer.precision", "16-mixed", "--trainer.accelerator", "cpu")


@pytest.mark.parametrize("word", ["true", "yes", "on", "false", "no", "off"])
@pytest.mark.parametrize("form", [str.lower, str.upper, str.capitalize, str.swapcase, "'{}'".format])
def test_a_switch_takes_the_words_that_people_write(word: str, form: Callable[[str], str]) -> None:
    config = small("--trainer.progress", form(word), "--trainer.deterministic", form(word))
    expected = word in ("true", "yes", "on")
    assert config.trainer.progress is expected and config.trainer.deterministic is expected


def test_the_words_of_a_switch_stay_text_elsewhere() -> None:
    config = small("--tracking.wandb", "off", "--name", "on", "--tracking.tags", "[yes, No]")
    assert (config.tracking.wandb, config.name, config.tracking.tags) == ("off", "on", ["yes", "No"])
    for text in ("true", "True"):
        with pytest.raises(UserError, match="name True is not text"):
            small("--name", text)


def test_whole_numbers_become_what_is_meant() -> None:
    config = small("--trainer.precision", "32", "--name", "7", "--tracking.tags", "[1, a]", "--phases.0.lr", "1")
    assert (config.trainer.precision, config.name, config.tracking.tags) == ("32", "7", ["1", "a"])
    assert isinstance(config.phases, list)
    assert config.phases[0].lr == 1.0 and isinstance(config.phases[0].lr, float)
    assert small("--trainer.devices", "2").trainer.devices == 2


def test_overrides_reach_list_items_and_new_sections_without_changing_the_input() -> None:
    plain = read_yaml(SMALL)
    arguments = [
        "--phases.1.lr=0.5",
        "--data.val.manifest",
        "v",
        "--data.val.split",
        "test",
        "--augment",
        "{zoom: 0.1}",
    ]
    config = parse(Config, override(plain, arguments))
    assert isinstance(config.phases, list)
    assert [phase.lr for phase in config.phases] == [0.001, 0.5]
    assert config.data.val is not None and config.data.val.split == "test"
    assert config.augment.zoom == 0.1
    assert plain == read_yaml(SMALL)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed", "1"], "'seed' is not an option; overrides are written --section.key VALUE."),
        (["--seed"], "--seed has no value"),
        (["--phases.2.lr", "1"], "'2' is not a place in a list of 2; count from 0."),
        (["--phases.last.lr", "1"], "'last' is not a place in a list of 2"),
        (["--name.first", "x"], "--name.first: there is no 'first' below a plain value."),
        (["--name.a.b", "x"], "--name.a.b: there is no 'a' below a plain value."),
    ],
)
def test_an_override_that_leads_nowhere_says_so(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        override(read_yaml(SMALL), arguments)


def test_yaml_round_trip_keeps_every_text(tmp_path: Path) -> None:
    texts = [
        "off",
        "no",
        "1e-3",
        "012",
        "1:30",
        "2024-01-31",
        "7",
        "1.10",
        "null",
        "~",
        "",
        "<<",
        "1_000",
        "é",
        "a: b",
    ]
    config = small("--trainer.deterministic", "true", "--phases.1.until", "{metric: val/loss, patience: 3}")
    config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, tags=texts), name="1e-3")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load(file) == config
    assert override(to_plain(config), ["--seed", "0"]) == to_plain(config)


def test_every_field_is_written_and_can_be_overridden() -> None:
    plain = to_plain(small())
    assert set(plain) == {field.name for field in dataclasses.fields(Config)}
    assert set(plain["trainer"]) == {field.name for field in dataclasses.fields(small().trainer)}


def test_a_missing_file_and_one_without_keys_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(UserError, match="must hold keys and values"):
        load(tmp_path / "list.yaml")


def test_a_preset_stays_as_it_is_written() -> None:
    config = small("--phases", "{preset: freeze_thaw, thaw_from: layer4}")
    assert config.phases == {"preset": "freeze_thaw", "thaw_from": "layer4"}


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = small("--runs_dir=~/runs", "--activations.folder=~/a", "--data.train.manifest", "[~/x, s3://b/~/y, a/~]")
    assert config.run_dir == Path("/home/someone/runs/run")
    assert config.activations.folder == "/home/someone/a"
    assert config.data.train.manifest == ["/home/someone/x", "s3://b/~/y", "a/~"]


def test_packing_is_read_by_the_same_rules() -> None:
    pack = parse(Pack, override({}, ["--source", "a", "--out", "b", "--splits", "{train: 1}", "--classes", "[no, 1]"]))
    assert pack.splits == {"train": 1.0} and pack.classes == ["no", "1"]
    with pytest.raises(UserError, match=re.escape("splits.train 'most' is not a number.")):
        parse(Pack, override({}, ["--source", "a", "--out", "b", "--splits.train", "most"]))
