"""`lit-transfer plan` on every file of configs/, without a network, and what it prints."""

from __future__ import annotations

import math
import re
import socket
from pathlib import Path

import pytest
import torch
import yaml
from digits import digits

from lit_transfer.config import Config
from lit_transfer.data.packing.items import Pack
from lit_transfer.launch import main
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.heads import build_head
from lit_transfer.model.network import Network
from lit_transfer.phases.table import cut_of, expand
from lit_transfer.reading import load, parse
from lit_transfer.recipe import Phase

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(CONFIGS.glob("*.yaml"))
PACKS = sorted(CONFIGS.glob("data/*.yaml"))
QUICKSTART = str(CONFIGS / "quickstart.yaml")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No dataset, no weights and no network are at hand."""

    def refuse(*_: object) -> None:
        raise AssertionError("plan must not use the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def cells(text: str, title: str) -> list[dict[str, str]]:
    """The rows of a printed table; its columns stand at least two spaces apart."""
    block = next(block for block in text.split("\n\n") if block.startswith(title))
    lines = block.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("──"))
    spans = [match.span() for match in re.finditer("─+", lines[rule])]
    body = [line for line in lines[rule + 1 :] if line[spans[0][1] : spans[0][1] + 2] == "  "]
    names = [lines[rule - 1][a:b].strip() for a, b in spans]
    return [dict(zip(names, (line[a:b].strip() for a, b in spans), strict=True)) for line in body]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_there_are_configs() -> None:
    names = {path.stem for path in RUNS}
    assert {"quickstart", "elpv", "imagefolder", "vgg16_flowers", "scratch"} <= names and PACKS


@pytest.mark.parametrize("path", PACKS, ids=lambda path: path.stem)
def test_every_packing_config_is_parsed(path: Path) -> None:
    assert load(path, cls=Pack).out.startswith("data/")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_config_is_planned(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert path.read_text().startswith("# "), "a config begins with its lab note"
    text = planned(capsys, "--config", str(path), "--samples", "1000", "--classes", "5")
    config: Config = load(path)
    phases = expand(config)
    assert [row["phase"] for row in cells(text, "Phases")] == [phase.name for phase in phases]
    assert [row["phase"] for row in cells(text, "Memory")] == [phase.name for phase in phases]
    assert f"{config.data.train.manifest} is not there yet" in text and "5 classes" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_expanded_phases_can_be_pasted_into_the_config(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config: Config = load(path)
    text = planned(capsys, "--config", str(path), "--expand")
    assert [parse(Phase, row) for row in yaml.safe_load(text)] == expand(config)
    plain = yaml.safe_load(path.read_text())
    del plain["phases"]
    (tmp_path / "pasted.yaml").write_text(yaml.safe_dump(plain) + "phases:\n" + text)
    pasted: Config = load(tmp_path / "pasted.yaml")
    assert pasted.phases == expand(config)


def test_a_zero_is_written_out_where_it_is_not_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "--config", QUICKSTART, "--expand", "--phases.momentum", "0")
    assert [parse(Phase, row).momentum for row in yaml.safe_load(text)] == [0, 0]


def test_the_facts_of_the_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    head, thaw = expand(load(QUICKSTART))
    text = planned(capsys, "--config", QUICKSTART, "--samples", "1706", "--trainer.devices", "2")
    stages = {row["stage"]: row for row in cells(text, "Network")}
    assert list(stages) == ["stem", *(f"blocks.{i}" for i in range(7)), "top", "head"]
    assert stages["stem"]["parameters"] == str(3 * 32 * 9 + 2 * 32)
    assert stages["top"]["parameters"] == f"{320 * 1280 + 2 * 1280:,}"
    assert stages["head"]["parameters"] == f"{1280 * 2 + 2:,}"
    assert {row["lr in head"] for name, row in stages.items() if name != "head"} == {"frozen"}
    assert stages["head"]["lr in head"] == f"{head.lr:g}" and stages["head"]["lr in thaw"] == f"{thaw.lr:g}"
    cut = list(stages).index(cut_of(thaw))
    rates = [row["lr in thaw"] for row in list(stages.values())[:-1]]
    assert rates == ["frozen"] * cut + [f"{thaw.backbone_lr:g}"] * (len(rates) - cut)

    trained = [int(row["parameters"].replace(",", "")) for row in cells(text, "Phases")]
    counts = [int(row["parameters"].replace(",", "")) for row in stages.values()]
    assert trained == [2562, sum(counts[cut:])] and f"{sum(counts):,} parameters in all" in text

    for phase, row in zip((head, thaw), cells(text, "Batches"), strict=True):
        steps = math.ceil(1706 / phase.global_batch)
        assert int(row["rows/rank"]) * 2 == int(row["global batch"]) == phase.global_batch
        assert int(row["last batch"]) == 1706 - (steps - 1) * phase.global_batch
        assert (int(row["steps/epoch"]), int(row["epochs"])) == (steps, phase.max_epochs)
        assert int(row["steps"].replace(",", "")) == steps * phase.max_epochs
        assert int(row["warm-up"]) == phase.warmup_steps
    assert "2 ranks" in text and "then back to the best val/auroc" in text

    memory = cells(text, "Memory")
    assert float(memory[1]["optimizer"]) == pytest.approx(8 * trained[1] / 2**20, abs=0.1)
    assert float(memory[1]["gradients"]) == pytest.approx(2 * 4 * trained[1] / 2**20, abs=0.1)
    assert float(memory[0]["saved activations"]) < 1 < 50 < float(memory[1]["saved activations"])
    assert float(memory[0]["frozen forward"]) == float(memory[1]["frozen forward"]) > 10


def test_a_dataset_that_is_there_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = digits(tmp_path / "digits", "ordinal")
    at = [f"--data.{stream}.manifest={manifest.path}" for stream in ("train", "val", "test")]
    fitting = ["--phases.warmup_steps=0", "--objective.label_smoothing=0", "--monitor=val/loss"]
    text = planned(capsys, "--config", QUICKSTART, *at, *fitting, "--samples", "5")
    samples = {row["stream"]: int(row["samples"]) for row in cells(text, "Data")}
    assert samples == manifest.splits and samples["train"] == 24
    assert f"task ordinal, {len(manifest.classes())} classes: " + ", ".join(manifest.display()) in text
    assert "--samples and --classes are not used" in text
    assert {row["last batch"] for row in cells(text, "Batches")} == {"24"}
    head = cells(text, "Network")[-1]
    assert head["parameters"] == f"{1281 * (len(manifest.classes()) - 1):,}"


@pytest.mark.parametrize("weights", ["file:nowhere.pth", "run:nowhere", "package:nowhere_at_all"])
def test_weights_that_are_not_there_are_said(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--config", QUICKSTART, "--samples", "9", "--phases.warmup_steps=0", "--model.weights"]
    text = planned(capsys, *common, weights)
    assert f"train would refuse this yet: model.weights '{weights}': " in text
    assert max(map(len, text.splitlines())) <= 100
    assert "would refuse" not in planned(capsys, *common, "none")


def test_a_fraction_counts_as_training_counts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = digits(tmp_path / "digits")
    at = [f"--data.{stream}.manifest={manifest.path}" for stream in ("train", "val", "test")]
    common = ["--config", QUICKSTART, "--data.train.fraction", "0.3", "--phases.warmup_steps", "0"]
    there = planned(capsys, *common, *at)
    absent = planned(capsys, *common, "--samples", str(manifest.splits["train"]))
    assert "Batches: 7 samples an epoch" in there and "Batches: 7 samples an epoch" in absent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "holds no dataset; make it with lit-transfer prepare, or plan with --samples N"),
        (["--samples", "0"], "--samples 0 is not a whole number of at least 1"),
        (["--samples", "9", "--classes", "one"], "--classes one is not a whole number of at least 2"),
        (
            ["--samples", "900", "--phases.thaw_from", "blocks.9"],
            "stages are stem, blocks.0 to blocks.6, top",
        ),
        (["--samples", "900", "--objective.focal_gama", "2"], "Did you mean 'focal_gamma'?"),
        (["--samples", "900", "--monitor", "val/auc"], "monitor 'val/auc' is not a metric of this task"),
        (["--samples", "900", "--phases.until", "{metric: val/los, patience: 2}"], "Did you mean 'val/loss'?"),
        (["--samples", "900", "--objective.class_weights", "[1, 2, 3]"], "3 weights for 2 classes"),
        (["--samples", "900", "--phases.0.lr", "1"], "'0' is not a setting of preset freeze_thaw, which the"),
    ],
)
def test_a_fault_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", QUICKSTART, *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1 and not printed.out


def test_the_flower_recipe_freezes_three_convolutions_and_trains_the_rest() -> None:
    config: Config = load(CONFIGS / "vgg16_flowers.yaml")
    (phase,) = expand(config)
    backbone = build_backbone(config.model, image_size=config.image.size, device="meta", load_weights=False)
    network = Network(backbone, build_head(config.model.head, backbone.features, 17, seed=0).to("meta"))
    network.set_cut(cut_of(phase), phase.norm)
    convolutions = {name for name, m in backbone.net.named_modules() if isinstance(m, torch.nn.Conv2d)}
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    first = ["features.0", "features.2", "features.5"]  # conv1_1, conv1_2, conv2_1
    assert frozen == {f"backbone.net.{name}.{kind}" for name in first for kind in ("weight", "bias")}
    assert len(convolutions) == 13 and not any("classifier" in name for name, _ in network.named_parameters())
    widths = [(128, 128), (128, 256), (256, 256), (256, 256), (256, 512), *[(512, 512)] * 5]
    layers = [(7 * 7 * 512, 1024), (1024, 1024), (1024, 17)]
    expected = sum(9 * a * b + b for a, b in widths) + sum(a * b + b for a, b in layers)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == expected
    assert [type(layer).__name__ for layer in network.head] == [
        "Linear",
        "ReLU",
        "Dropout",
        "Linear",
        "ReLU",
        "Linear",
    ]
    assert (phase.optimizer, phase.lr, phase.backbone_lr, phase.momentum) == ("sgd", 1e-4, 1e-4, 0.9)
    a = config.augment
    assert (a.flip_h, a.flip_v, a.shift, a.zoom, a.rotate_degrees) == (0.5, 0, 0.3, 0.3, 30)
    assert phase.until is not None and phase.until.patience == 10 and phase.restore_best
