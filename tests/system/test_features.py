"""`lit-transfer features`: from pictures to a table, heads beside each other, and a model that the other verbs take."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import yaml
from digits import digits

import lit_transfer
from lit_transfer.blocks import FeaturesConfig
from lit_transfer.comparison import Result, conclude_features, fit_heads
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.streams import open_streams
from lit_transfer.features.classifiers import CLASSIFIERS
from lit_transfer.launch import main
from lit_transfer.launch.evaluate import main as evaluate
from lit_transfer.launch.features import extract
from lit_transfer.model.joined import open_blocks
from lit_transfer.phases.table import differences
from lit_transfer.reading import load, parse
from lit_transfer.tracking import ENVIRONMENT, open_run

CONFIGS = Path(__file__).parents[2] / "configs"
HEADS = ["logistic_regression", "linear_svm", "rbf_svm", "gaussian_nb", "lda", "knn", "nearest_centroid"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return digits(tmp_path_factory.mktemp("digits") / "set", count=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


def settings(manifest: Manifest, folder: Path, **more: Any) -> dict[str, Any]:
    streams = {name: {"manifest": str(manifest.path), "split": name} for name in ("train", "val", "test")}
    return {
        "name": "heads",
        "runs_dir": str(folder / "runs"),
        "data": streams | {"workers": 0},
        "image": {"crop": 0.9},
        "backbones": [
            {"model": {"backbone": "timm/test_resnet", "weights": "none"}, "size": 32},
            {"model": {"backbone": "timm/test_efficientnet", "weights": "none", "last_stage": "blocks.1"}, "size": 24},
        ],
        "folds": 2,
        "activations": {"store": "require", "prefix": "plain", "dtype": "float32", "folder": str(folder / "store")},
        "accelerator": "cpu",
        "progress": False,
    } | more


def written(plain: dict[str, Any], folder: Path) -> str:
    path = folder / f"{plain['name']}.yaml"
    path.write_text(yaml.safe_dump(plain))
    return str(path)


@pytest.fixture(scope="module")
def run(manifest: Manifest, folder: Path) -> Path:
    """A finished run of all heads."""
    assert main(["features", "--config", written(settings(manifest, folder), folder)]) == 0
    return folder / "runs" / "heads"


@pytest.fixture(autouse=True)
def _quickly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first run draws its report: pictures take most of the time of so small a run."""
    monkeypatch.setattr("lit_transfer.comparison.write_report", lambda *_: [])


def summary(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return read


def test_a_run_holds_features_a_table_a_picture_and_a_model(run: Path) -> None:
    with (run / "heads.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["head"] for row in rows] == HEADS
    values = {row["head"]: float(row["val/auroc"]) for row in rows}
    (chosen,) = (row for row in rows if row["chosen"] == "1")
    assert values[chosen["head"]] == max(values.values()) and len(set(values.values())) > 3
    assert summary(run)["head"] == chosen["head"] and (run / "report" / "heads.png").stat().st_size > 10_000
    for split in ("val", "test"):
        for metric in ("accuracy", "auroc", "f1"):
            assert summary(run)[f"{split}/{metric}"] == pytest.approx(float(chosen[f"{split}/{metric}"]), abs=1e-6)
        assert (run / "report" / split / "confusion.png").is_file()
    assert float(chosen["cv/auroc"]) == pytest.approx(summary(run)["cv_auroc"])
    table = pq.read_table(run / "features.parquet")
    assert table.num_rows == 96 and table["features"].type.list_size == summary(run)["features"]
    assert all(path.suffix in (".json", ".safetensors", ".md") for path in (run / "model").iterdir())


def test_evaluate_says_what_the_summary_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("val", "test"):
        assert evaluate(["--run", str(run), "--split", split, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)["overall"]
        assert figures == {name: summary(run)[f"{split}/{name}"] for name in figures}


@pytest.fixture(scope="module")
def results(manifest: Manifest, folder: Path) -> dict[str, Result]:
    """Every head as if it were the chosen one of a run."""
    config = parse(FeaturesConfig, settings(manifest, folder, name="each"))
    streams, blocks = open_streams(config.data, config.seed), open_blocks(config.backbones, config.image, config.seed)
    run = open_run(config, {"data": {}}, differences)
    os.environ.pop(ENVIRONMENT)
    features, norms = extract(config, run, blocks, streams, torch.device("cpu"))
    judged, _ = fit_heads(config, features, blocks.widths)
    return {one.fitted.name: Result(config, run, blocks, norms, features, one.fitted) for one in judged}


@pytest.mark.parametrize("name", HEADS)
def test_the_model_of_a_head_says_of_pictures_what_scikit_learn_says_of_features(
    name: str, results: dict[str, Result], manifest: Manifest
) -> None:
    result = results[name]
    conclude_features(result)
    test = result.features["test"]
    expected = result.fitted.classifiers[0].probabilities(test.values.double().numpy())
    model = lit_transfer.load(result.run.folder)
    sources = manifest.table["source"].take(test.rows).to_pylist()
    said = model(torch.stack([model.preprocess(manifest.path.parent / source) for source in sources]))
    assert np.allclose(said.numpy(), expected, atol=1e-4) and said.std(0).min() > 0.05


def test_predict_names_pictures(run: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--run", str(run), str(manifest.path.parent), "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said) == 96 and {one["prediction"] for one in said} == {"even", "odd"}
    threshold = summary(run)["threshold"][0]
    for one in said:
        shares = {each["name"]: each["probability"] for each in one["top"]}
        assert one["prediction"] == ("odd" if shares["odd"] >= threshold else "even") and sum(
            shares.values()
        ) == pytest.approx(1)


def test_a_finished_run_is_told_again_and_another_is_refused(
    run: Path, manifest: Manifest, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(folder / "heads.yaml")
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    monkeypatch.setattr("lit_transfer.launch.features.extract", None)
    assert main(["features", "--config", path]) == 0
    assert "run_id" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before
    assert main(["features", "--config", path, "--folds", "3"]) == 2
    told = "holds a run with other settings (folds: 2 -> 3); choose another name, or remove the directory.\n"
    assert capsys.readouterr().err.endswith(told)


def test_the_store_serves_a_second_run_and_training(run: Path, manifest: Manifest, folder: Path) -> None:
    shelves = {path.name for path in (folder / "store").iterdir()}
    again = settings(manifest, folder, name="again", heads=["lda"], export=None)
    assert main(["features", "--config", written(again, folder)]) == 0
    assert {path.name for path in (folder / "store").iterdir()} == shelves
    assert not (folder / "runs" / "again" / "features.parquet").exists()
    assert summary(folder / "runs" / "again")["head"] == "lda"
    training = {
        "name": "trained",
        **{key: again[key] for key in ("runs_dir", "data", "activations")},
        "image": again["image"] | {"size": 32},
        "model": again["backbones"][0]["model"],
        "phases": [{"name": "head", "max_epochs": 1, "lr": 0.01, "global_batch": 16}],
        "trainer": {"progress": False, "accelerator": "cpu"},
        "tracking": {"wandb": "off"},
    }
    assert main(["train", "--config", written(training, folder)]) == 0
    assert {path.name for path in (folder / "store").iterdir()} == shelves


def test_without_validation_cross_validation_chooses(run: Path, manifest: Manifest, folder: Path) -> None:
    plain = settings(manifest, folder, name="two", heads=["lda", "knn", "logistic_regression"], export=None)
    del plain["data"]["val"], plain["data"]["test"]
    assert main(["features", "--config", written(plain, folder)]) == 0
    with (folder / "runs" / "two" / "heads.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: float(row["cv/auroc"]))
    assert best["chosen"] == "1" and summary(folder / "runs" / "two")["threshold"] is None
    assert len({row["cv/auroc"] for row in rows}) == 3


def test_a_head_that_takes_too_many_samples_is_left_out_and_told(
    manifest: Manifest, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CLASSIFIERS, "rbf_svm", replace(CLASSIFIERS["rbf_svm"], most_samples=40))
    plain = settings(manifest, folder, name="few", heads=["rbf_svm", "lda"], export=None)
    assert main(["features", "--config", written(plain, folder)]) == 0
    assert "48 training samples are more than the 40" in capsys.readouterr().out
    assert main(["features", "--config", written(plain | {"name": "none", "heads": ["rbf_svm"]}, folder)]) == 2
    assert "none of the heads can be fitted (rbf_svm: 48 training samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "changes", "told"),
    [
        ("multiclass", {"monitor": "val/aurok"}, "Did you mean 'auroc'?"),
        ("multiclass", {"monitor": "val/loss"}, "monitor 'val/loss' is not a figure that heads of a multiclass"),
        ("ordinal", {"monitor": "val/mae"}, "use one of val/accuracy, val/balanced_accuracy, val/kappa"),
        ("regression", {}, "its heads are classifiers, but the dataset is regression"),
    ],
)
def test_what_cannot_be_fitted_is_one_sentence_before_any_work(
    task: str,
    changes: dict[str, Any],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lit_transfer.launch.features.open_blocks", None)
    plain = settings(digits(tmp_path / "set", task), tmp_path, **changes)
    assert main(["features", "--config", written(plain, tmp_path)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("task", ["multilabel", "ordinal"])
def test_other_tasks(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = settings(digits(tmp_path / "set", task), tmp_path, heads=["logistic_regression", "knn"])
    plain["monitor"] = "val/accuracy"
    assert main(["features", "--config", written(plain, tmp_path)]) == 0
    capsys.readouterr()
    assert evaluate(["--run", str(tmp_path / "runs" / "heads"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["overall"]
    assert figures["accuracy"] == summary(tmp_path / "runs" / "heads")["test/accuracy"] > 0.2


def test_a_damaged_model_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "model"
    shutil.copytree(run / "model", copy)
    plain = json.loads((copy / "model.json").read_text())
    plain["model"]["head"] = "gaussian_nb" if summary(run)["head"] != "gaussian_nb" else "lda"
    (copy / "model.json").write_text(json.dumps(plain))
    assert main(["predict", "--run", str(copy), "x.png"]) == 2
    assert "does not fit" in capsys.readouterr().err
    tensors = safetensors.torch.load_file(run / "model" / "weights.safetensors")
    gone = next(name for name in tensors if name.startswith("backbone.") and name.endswith(".weight"))
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != gone}, copy / "weights.safetensors")
    shutil.copy(run / "model" / "model.json", copy)
    assert main(["predict", "--run", str(copy), "x.png"]) == 2
    assert "does not fit" in capsys.readouterr().err


def test_a_backbone_that_a_folder_describes_travels_with_the_model(manifest: Manifest, folder: Path) -> None:
    place = folder / "own"
    place.mkdir()
    architecture = {"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (place / "config.json").write_text(json.dumps(architecture))
    backbones = [{"model": {"backbone": f"local-dir:{place}", "weights": "none"}, "size": 32}] * 2
    plain = settings(manifest, folder, name="local", heads=["lda"], export=None, backbones=backbones)
    assert main(["features", "--config", written(plain, folder)]) == 0
    shutil.rmtree(place)
    model = folder / "runs" / "local" / "model"
    assert (model / "block1" / "config.json").is_file()
    assert lit_transfer.load(model)(torch.rand(2, 3, 32, 32)).shape == (2, 2)


def test_fetch_says_of_each_backbone_where_its_weights_are(
    manifest: Manifest, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", "--config", written(settings(manifest, folder, name="fetched"), folder)]) == 0
    said = capsys.readouterr().out
    assert "backbone  timm/test_resnet" in said and "backbone  timm/test_efficientnet" in said


RECIPES = {
    "inception_v3_bottlenecks": (80, 2048, ["logistic_regression"]),
    "alexnet_svm": (64, 4096, ["linear_svm"]),
    "vgg16_bayes": (32, 4096, ["lda", "gaussian_nb"]),
    "alexnet_vgg16": (64, 8192, HEADS),
}
"""Of each classic recipe a small side of its pictures, the width of its features, and its heads."""


def test_every_recipe_is_known() -> None:
    known = {*RECIPES, "elpv_lite0"}  # which the test of the README runs
    assert {path.stem for path in CONFIGS.glob("features/*.yaml")} == known


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full("recipes")) for name in RECIPES])
def test_a_classic_recipe_runs_with_random_weights(name: str, manifest: Manifest, tmp_path: Path) -> None:
    size, width, heads = RECIPES[name]
    path = CONFIGS / "features" / f"{name}.yaml"
    assert path.read_text().startswith("# A classic recipe: ")
    config: FeaturesConfig = load(path, cls=FeaturesConfig)
    assert config.name == name and config.kinds == heads
    assert all(block.model.weights == "pretrained" for block in config.backbones)
    small = [f"--image.size={size}", "--export=null", "--accelerator=cpu", "--progress=false", "--folds=2"]
    # Behind many layers of random weights numbers are too small for float16.
    small += [f"--runs_dir={tmp_path}", f"--activations.folder={tmp_path / 'store'}", "--activations.dtype=float32"]
    small += ["--data.workers=0", "--activations.prefix=plain"]
    for place in range(len(config.backbones)):
        small += [f"--backbones.{place}.model.weights=none", f"--backbones.{place}.size={size}"]
    for stream in ("train", "val", "test"):
        small += [f"--data.{stream}.manifest={manifest.path}", f"--data.{stream}.fraction=0.5"]
    assert main(["features", "--config", str(path), *small]) == 0
    found = summary(tmp_path / name)
    assert found["features"] == width and found["head"] in heads and 0 <= found["test/accuracy"] <= 1
    shutil.rmtree(tmp_path)
