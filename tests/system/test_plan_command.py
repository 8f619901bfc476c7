"""`lit-transfer plan` on every file of configs/, without a network, and what it prints."""

from __future__ import annotations

import functools
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
from lit_transfer.phases.presets import PRESETS, expand
from lit_transfer.reading import load, parse
from lit_transfer.recipe import Model
from lit_transfer.schedule import Phase

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(CONFIGS.glob("*.yaml"))
PACKS = sorted(CONFIGS.glob("data/*.yaml"))
QUICKSTART = str(CONFIGS / "quickstart.yaml")


PRESET_SETTINGS = {
    "freeze_thaw": "thaw_from: blocks.3",
    "first_k_frozen": "k: 2",
    "fastai": "epochs: 3",
    "surgical": "stage: blocks.1",
}
"""What presets cannot do without, for `timm/test_efficientnet`."""
SMALL = {
    "name": "small",
    "data": {"train": {"manifest": "nowhere", "split": "train"}, "val": {"manifest": "nowhere", "split": "val"}},
    "model": {"backbone": "timm/test_efficientnet", "weights": "none"},
    "phases": {"preset": "linear_probe"},
    "trainer": {"accelerator": "cpu"},
}


@functools.cache
def stages_of(backbone: str) -> tuple[str, ...]:
    return build_backbone(Model(backbone=backbone, weights="none"), device="meta", load_weights=False).stage_names


def phases_of(config: Config, samples: int = 1000) -> list[Phase]:
    return expand(config, stages_of(config.model.backbone), samples)


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Arguments for a small network."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return ["--config", str(path), "--samples", "5000"]


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
    phases = phases_of(config)
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
    assert [parse(Phase, row) for row in yaml.safe_load(text)] == phases_of(config)
    plain = yaml.safe_load(path.read_text())
    del plain["phases"]
    (tmp_path / "pasted.yaml").write_text(yaml.safe_dump(plain) + "phases:\n" + text)
    pasted: Config = load(tmp_path / "pasted.yaml")
    assert pasted.phases == phases_of(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_expanded_and_planned(
    preset: str, small: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chosen = f"--phases={{preset: {preset}, {PRESET_SETTINGS.get(preset, '')}}}"
    text = planned(capsys, *small, chosen, "--expand")
    config: Config = load(tmp_path / "small.yaml", [chosen])
    phases = phases_of(config, 5000)
    assert [parse(Phase, row) for row in yaml.safe_load(text)] == phases
    short = planned(capsys, *small, chosen)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL | {"phases": yaml.safe_load(text)}, sort_keys=False))
    assert planned(capsys, *small) == short, "the list is the preset"
    assert max(map(len, short.splitlines())) <= 100
    assert [row["phase"] for row in cells(short, "Phases")] == [phase.name for phase in phases]


def test_more_phases_than_fit_beside_each_other_stand_below_each_other(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [{"name": f"a_long_name_of_phase_{i}", "max_steps": 1, "lr": 0.5 + i} for i in range(5)]
    text = planned(capsys, *small, "--phases", yaml.safe_dump(phases, default_flow_style=True, width=10_000))
    block = next(block for block in text.split("\n\n") if block.startswith("Network"))
    assert max(map(len, block.splitlines())) <= 100
    heads = [line.split() for line in block.splitlines() if line.startswith("stage ")]
    assert [len(head) for head in heads] == [5, 4]
    assert [name for head in heads for name in head[2:]] == [phase["name"] for phase in phases]
    rates = [line.split()[2:] for line in block.splitlines() if line.startswith("head ")]
    assert rates == [["0.5", "1.5", "2.5"], ["3.5", "4.5"]]


def test_what_patterns_train_at_which_rate(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    phases = (
        "[{name: own, max_steps: 9, train: {params: {stem/*: 1.0e-3, head/*: 0.02}}},"
        " {name: norms, max_epochs: 1, train: {params: [norms, head/*]}, lr: 0.1, backbone_lr: 0.01, layer_decay: 0.5}]"
    )
    text = planned(capsys, *small, "--phases", phases)
    own, norms = cells(text, "Phases")
    assert (own["trains"], own["head lr"], own["backbone lr"]) == ("stem/*, head/*", "0.02", "0.001")
    assert (norms["trains"], norms["head lr"]) == ("norms, head/*", "0.1")
    assert norms["backbone lr"] == f"{0.01 / 2**6:.3g} to 0.01", "seven stages"
    stages = {row["stage"]: (row["own"], row["norms"]) for row in cells(text, "Network")}
    assert stages["stem"] == ("0.001", f"{0.01 / 2**6:.3g} (part)")
    assert stages["top"] == ("frozen", "0.01 (part)") and stages["head"] == ("0.02", "0.1")


def test_what_ends_a_phase_and_what_else_it_sets(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    phases = (
        "[{name: plain, max_epochs: 3, lr: 0.1},"
        " {name: a, max_steps: 90, max_minutes: 3, lr: 0.1, until: {metric: val/loss, below: 0.25}},"
        " {name: b, max_epochs: 3, lr: 0.1, until: {metric: val/accuracy, above: 0.9}, validate_every_steps: 7},"
        " {name: c, max_epochs: 3, lr: 0.1, until: {metric: val/loss, patience: 2, min_delta: 0.1}, restore_best: true,"
        " optimizer_args: {betas: [0.9, 0.99]}, ema_decay: 0.999, mixup: 0.2, norm: batch},"
        " {name: d, max_epochs: 3, lr: 0.1, accumulate: 4, compile: true}]"
    )
    lines = planned(capsys, *small, "--phases", phases).replace("\n  ", " ").splitlines()
    for expected in (
        "a ends after 90 steps or 3 minutes or val/loss below 0.25",
        "b ends after val/accuracy above 0.9, is validated every 7 steps",
        "c ends after 2 validations without a better val/loss by 0.1, goes back to the best val/loss at its end",
        "also in c: optimizer_args: betas 0.9 0.99; mixup 0.2; ema_decay 0.999; BatchNorm uses and updates "
        "the statistics of the batch",
        "also in d: accumulate 4; compile",
    ):
        assert expected in lines
    assert not [line for line in lines if line.startswith(("plain ends", "d ends", "also in plain", "also in a"))]
    told = cells(planned(capsys, *small, "--phases", phases), "Batches")
    assert [row["rows/rank"] for row in told] == ["64", "64", "64", "64", "16"]


def test_a_zero_is_written_out_where_it_is_not_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "--config", QUICKSTART, "--expand", "--phases.momentum", "0")
    assert [parse(Phase, row).momentum for row in yaml.safe_load(text)] == [0, 0]


def test_the_facts_of_the_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    head, thaw = phases_of(load(QUICKSTART))
    text = planned(capsys, "--config", QUICKSTART, "--samples", "1706", "--trainer.devices", "2")
    stages = {row["stage"]: row for row in cells(text, "Network")}
    assert list(stages) == ["stem", *(f"blocks.{i}" for i in range(7)), "top", "head"]
    assert stages["stem"]["parameters"] == str(3 * 32 * 9 + 2 * 32)
    assert stages["top"]["parameters"] == f"{320 * 1280 + 2 * 1280:,}"
    assert stages["head"]["parameters"] == f"{1280 * 2 + 2:,}"
    assert {row["head"] for name, row in stages.items() if name != "head"} == {"frozen"}
    assert stages["head"]["head"] == f"{head.lr:g}" and stages["head"]["thaw"] == f"{thaw.lr:g}"
    assert isinstance(thaw.train, dict)
    cut = list(stages).index(thaw.train["from"])
    rates = [row["thaw"] for row in list(stages.values())[:-1]]
    assert rates == ["frozen"] * cut + [f"{thaw.backbone_lr:g}"] * (len(rates) - cut)

    trained = [int(row["parameters"].replace(",", "")) for row in cells(text, "Phases")]
    counts = [int(row["parameters"].replace(",", "")) for row in stages.values()]
    assert trained == [2562, sum(counts[cut:])] and f"{sum(counts):,} parameters in all" in text

    for phase, row in zip((head, thaw), cells(text, "Batches"), strict=True):
        steps = math.ceil(1706 / phase.global_batch)
        assert int(row["rows/rank"]) * 2 == int(row["global batch"]) == phase.global_batch
        assert int(row["last batch"]) == 1706 - (steps - 1) * phase.global_batch
        assert (int(row["steps/epoch"]), int(row["epochs"])) == (steps, phase.max_epochs)
        assert int(row["steps"].replace(",", "")) == steps * (phase.max_epochs or 0)
        assert int(row["warm-up"]) == phase.warmup_steps
    assert "2 ranks" in text and "goes back to the best val/auroc at its end" in text

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
    (phase,) = phases_of(config)
    backbone = build_backbone(config.model, image_size=config.image.size, device="meta", load_weights=False)
    network = Network(backbone, build_head(config.model.head, backbone.features, 17, seed=0).to("meta"))
    assert isinstance(phase.train, dict)
    network.set_cut(phase.train["from"], phase.norm)
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
