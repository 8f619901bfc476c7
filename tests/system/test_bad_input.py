"""Bad input to `lit-transfer train`: one sentence with value, rule and remedy, exit status 2, no run directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from digits import digits, tiny_config
from packing import packed, table

from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.launch import main
from lit_transfer.reading import to_yaml


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return digits(tmp_path_factory.mktemp("digits") / "data")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--trainer.precision", "16-mixed"], "16-mixed needs a GPU"),
        (["--trainer.precision", "16-mixed", "--trainer.accelerator", "auto"], "use bf16-mixed or 32"),
        (["--trainer.accelerator", "gpu"], "accelerator gpu needs a GPU and none is visible"),
        (["--data.train.split", "trian"], "trian"),
        (["--data.train.manifest", "nowhere"], "nowhere"),
        (["--data.label", "color"], "parity"),
        (["--data.worker", "1"], "Did you mean 'workers'?"),
        (["--model.backbone", "timm/test_efficientnt"], "test_efficientnet"),
        (["--model.weights", "file:nowhere.pth"], "nowhere.pth"),
        (["--model.weights", "packge:x"], "package:MODULE"),
        (["--phases.0.train", "{from: blocks.9}", "--phases.0.backbone_lr", "0.1"], "blocks.9"),
        (["--phases.0.train", "all"], "backbone_lr"),
        (["--phases", "{preset: freezethaw}"], "freeze_thaw"),
        (["--phases", "{preset: freeze_thaw, thaw_from: all, head_epoch: 3}"], "Did you mean 'head_epochs'?"),
        (["--monitor", "val/acuracy"], "Did you mean 'val/accuracy'?"),
        (["--objective.class_weights", "[1, 2, 3]"], "class_weights"),
        (["--objective.threshold_metric", "f2"], "threshold_metric"),
        (["--phases.0.schedule", "warmup_cosine", "--phases.0.warmup_steps", "99"], "warmup_steps 99"),
        (["--phases.0.until", "{metric: val/los, patience: 2}"], "val/loss"),
    ],
)
def test_one_sentence_and_nothing_written(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], sentence: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(tiny_config(manifest, tmp_path / "runs")))
    assert main(["train", "--config", str(file), *changes]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


THAW = "name: a, max_epochs: 2, lr: 0.1, backbone_lr: 0.1"


@pytest.mark.parametrize(
    ("phases", "sentence"),
    [
        (f"[{{{THAW}, train: {{from: layr9}}}}]", "'layr9' is not a stage of timm/test_resnet; its stages are stem, "),
        (f"[{{{THAW}, train: {{last: 9}}}}]", "train.last 9 is over the 5 stages of timm/test_resnet (stem, "),
        (
            "[{name: a, max_epochs: 2, train: {params: {stem/*: 0.1, '*.weight': 0.2}}}]",
            "train.params 'stem/*' and '*.weight' both match stem/conv1.0.weight with different rates, 0.1 and 0.2",
        ),
        (f"[{{{THAW}, train: {{params: [nothing/*]}}}}]", "'nothing/*' matches no parameter, so it trains nothing"),
        (f"[{{{THAW}, train: {{params: []}}}}]", "train.params is empty, so the phase trains nothing; give a pattern"),
        (f"[{{{THAW}, train: all, restore_best: true}}]", "phase 'a': restore_best needs validation; give data.val"),
        (
            f"[{{{THAW}, train: all, until: {{metric: val/auc, patience: 1}}}}]",
            "until.metric 'val/auc' is not a metric of this task; there are val/loss, ",
        ),
        (
            f"[{{{THAW}, train: all, schedule: plateau, schedule_args: {{metric: val/los}}}}]",
            "schedule_args.metric 'val/los' is not a metric of this task",
        ),
        (f"[{{{THAW}, train: all, max_steps: 3}}]", "max_epochs 2 and max_steps 3 are both given; remove one"),
        (f"[{{{THAW}, train: all, optimizer: admw}}]", "'admw' is not in torch.optim, which has adadelta, "),
        (
            f"[{{{THAW}, train: all, optimizer_args: {{beta: 0.9}}}}]",
            "optimizer adamw with {'beta': 0.9} cannot be made (",
        ),
        (
            f"[{{{THAW}, train: all, optimizer_args: {{betas: [0.9, 2]}}}}]",
            "cannot be made (Invalid beta parameter at index 1: 2)",
        ),
        (f"[{{{THAW}, train: all, optimizer_args: {{lr: 0.9}}}}]", "optimizer_args.lr stands in a field of its own"),
        (f"[{{{THAW}, train: all, label_smoothing: 1}}]", "label_smoothing 1.0 is outside [0, 1)"),
        (f"[{{{THAW}, train: all, global_batch: 4, accumulate: 5}}]", "accumulate 5 is over global_batch 4"),
        (f"[{{{THAW}, train: all}}, {{{THAW}, train: all}}]", "two phases have one name"),
    ],
)
def test_a_fault_of_the_schedule_is_told_before_anything_is_loaded(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], phases: str, sentence: str
) -> None:
    """The weights do not exist, so any attempt to load them would be told in the place of the fault."""
    config = tiny_config(manifest, tmp_path / "runs")
    if "restore_best" in phases:
        config = replace(config, data=replace(config.data, val=None))
    error = told(config, tmp_path, capsys, "--model.weights", "file:nowhere.pth", "--phases", phases)
    assert sentence in error and "nowhere" not in error
    assert not (tmp_path / "runs").exists()


def told(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], *changes: str) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert main(["train", "--config", str(file), *changes]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_a_metric_that_is_not_a_number_names_no_best_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{i}.png,{'ab'[i % 2] if i < 8 else 'a'},{'train' if i < 8 else 'val'}" for i in range(12)]
    data = packed(table(tmp_path / "source", "path,label,split", rows), tmp_path / "data")
    config = tiny_config(data, tmp_path / "runs")
    one_class = replace(config, data=replace(config.data, test=None))
    error = told(one_class, tmp_path, capsys, "--monitor", "val/auroc")
    assert "val/auroc is nan after step 1 of phase 'head'" in error
    assert "monitor val/loss" in error


def test_a_damaged_shard_is_one_sentence_also_from_a_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = digits(tmp_path / "data")
    shard = data.path / next(s.name for s in data.shards if s.split == "train")
    content = bytearray(shard.read_bytes())
    content[data.table["offset"][int(data.rows("train")[0])].as_py() + 20] ^= 1
    shard.write_bytes(content)
    error = told(tiny_config(data, tmp_path / "runs"), tmp_path, capsys, "--data.workers", "1")
    assert "1 of the 24 samples of data.train are damaged, more than data.max_bad_fraction 0.001 allows" in error
    listed = (tmp_path / "runs" / "tiny" / "quarantine.jsonl").read_text()
    assert str(shard) in listed and "not those that were packed" in listed
