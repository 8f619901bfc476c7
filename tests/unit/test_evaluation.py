"""What a run leaves: figures, pictures and the model; measuring it again on a split or another dataset."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from digits import PREPROCESSING, digits, finished_run, streams_of, tiny_config, tiny_network
from PIL import Image

from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.errors import UserError
from lit_transfer.evaluation import predict_samples
from lit_transfer.launch.evaluate import main, stream_of
from lit_transfer.model.module import Predictions
from lit_transfer.model.portable import load
from lit_transfer.reading import parse, to_plain
from lit_transfer.report.split import Evaluation, write_mistakes, write_report

PICTURES = {
    "multiclass": {"confusion", "roc", "reliability", "mistakes"},
    "ordinal": {"confusion", "mistakes"},
    "multilabel": {"roc", "reliability", "predictions", "mistakes"},
    "regression": {"predictions", "mistakes"},
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return digits(tmp_path_factory.mktemp("digits") / "set")


@pytest.fixture(scope="module")
def config(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(manifest, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def summary(config: Config) -> dict[str, Any]:
    return finished_run(config)


def evaluation(manifest: Manifest, said: torch.Tensor, threshold: list[float] | None = None) -> Evaluation:
    """An evaluation of the test split with given probabilities, in the order of its rows."""
    samples = streams_of(tiny_config(manifest, Path("unused")))["test"]
    targets = torch.from_numpy(samples.targets[samples.rows])
    predictions = Predictions(samples.rows, said, targets, 0.0)
    return Evaluation(
        task=manifest.task,
        names=manifest.display(),
        threshold=threshold,
        samples=samples,
        predictions=predictions,
    )


def test_a_finished_run_has_its_figures_pictures_and_model(
    config: Config, summary: dict[str, Any], manifest: Manifest
) -> None:
    folder = config.run_dir
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    wanted = ("test/accuracy", "test/auroc", "val/f1", "seconds/head", "seconds/total", "images_per_s/head")
    assert all(isinstance(summary[key], float) for key in wanted)
    assert summary["dataset_digest"] == manifest.digest and summary["ended/head"] == "max_epochs 1 reached"
    assert summary["samples/train"] == 24 and summary["ranks"] == 1 and summary["peak_memory_mib"] > 50
    for split in ("val", "test"):
        names = {path.stem for path in (folder / "report" / split).glob("*.png")}
        assert names == PICTURES["multiclass"] | {"curves"}
    assert not list((folder / "report").glob("*.png")), "nothing was measured of the store"
    model = load(folder)
    assert model.threshold == summary["threshold"] and len(model.threshold or []) == 1
    provenance = model.info.provenance
    assert provenance["metrics"]["test/accuracy"] == summary["test/accuracy"]
    assert provenance["config"]["name"] == "tiny" and provenance["dataset"]["digest"] == manifest.digest


def test_measuring_again_gives_the_figures_of_the_run(
    config: Config, summary: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("test", "val"):
        arguments = [
            "--run",
            str(config.run_dir),
            "--split",
            split,
            "--json",
            "--batch",
            "5",
            "--by",
            "digit",
        ]
        assert main(arguments) == 0
        figures = json.loads(capsys.readouterr().out)
        for name, value in figures["overall"].items():
            assert value == pytest.approx(summary[f"{split}/{name}"], abs=1e-6)
        assert figures["threshold"] == summary["threshold"]
        assert sum(row["samples"] for row in figures["by"]["digit"]) == figures["samples"] == 12
        assert [row["value"] for row in figures["by"]["digit"]] == sorted(
            row["value"] for row in figures["by"]["digit"]
        )


def test_the_tables_name_split_classes_and_values(
    config: Config, summary: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(config.run_dir), "--by", "digit", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "balanced_accuracy" in printed and "\nodd " in printed and "\ndigit " in printed
    assert (tmp_path / "out" / "metrics.json").is_file() and (tmp_path / "out" / "confusion.png").is_file()


def test_the_threshold_of_validation_is_the_one_used(config: Config, manifest: Manifest) -> None:
    said = torch.tensor([[0.8, 0.2]]).repeat(12, 1)
    odd = evaluation(manifest, said, [0.1]).predictions.targets == 1
    assert evaluation(manifest, said, [0.1]).overall()["accuracy"] == pytest.approx(float(odd.double().mean()))
    assert evaluation(manifest, said, [0.3]).overall()["accuracy"] == pytest.approx(float((~odd).double().mean()))


def test_another_dataset_with_the_same_classes(
    config: Config, summary: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = digits(tmp_path / "other", count=64)
    assert main(["--run", str(config.run_dir), "--manifest", str(other.path), "--split", "train", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["samples"] == 32 and figures["dataset"] == other.digest
    assert (config.run_dir / "report" / "packed-train" / "roc.png").is_file()


def test_the_runs_dataset_packed_again_or_not_here_is_no_longer_its_own(
    config: Config, summary: dict[str, Any], manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(config.run_dir, run)
    other = digits(tmp_path / "other", split_seed=1)
    for stream, place in (("train", str(manifest.path)), ("val", str(other.path)), ("test", str(manifest.path))):
        assert other.digest != manifest.digest and other.classes() == manifest.classes()
        config_file = run / "config.yaml"
        plain = yaml.safe_load(config_file.read_text())
        plain["data"][stream]["manifest"] = place
        config_file.write_text(yaml.safe_dump(plain))
    moved = f"'{other.path}' is not the run's dataset any more: its digest is {other.digest[:12]}, the run's "
    with pytest.raises(UserError, match=re.escape(moved) + ".*--manifest"):
        main(["--run", str(run), "--split", "val"])
    assert main(["--run", str(run), "--split", "test", "--json"]) == 0, "the other streams are as they were"
    assert main(["--run", str(run), "--manifest", str(other.path), "--json"]) == 0
    record = json.loads((run / "run.json").read_text())
    record["fingerprint"]["data"]["val"]["digest"] = other.digest
    (run / "run.json").write_text(json.dumps(record))
    assert main(["--run", str(run), "--split", "val", "--json"]) == 0, "each stream has a digest of its own"

    config_file.write_text(config_file.read_text().replace(str(manifest.path), "data/digits"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"the run's dataset 'data/digits' is not here .*--manifest DIR"):
        main(["--run", str(run)])


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("ordinal", {}, "ordinal dataset but the run's model is multiclass"),
        ("multiclass", {"classes": ["odd", "even"]}, "in the same order"),
        ("multiclass", {"labels": ["digit"]}, r"missing \['even', 'odd'\], extra \['0', '1'"),
    ],
)
def test_a_dataset_with_other_classes_is_refused(
    config: Config, summary: dict[str, Any], tmp_path: Path, task: str, options: dict[str, Any], message: str
) -> None:
    other = digits(tmp_path / "other", task, **options)
    with pytest.raises(UserError, match=message):
        main(["--run", str(config.run_dir), "--manifest", str(other.path)])


def test_an_unknown_column_split_or_run_is_named_before_any_work(
    config: Config, summary: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_transfer.launch.evaluate.predict_samples", None)
    run = str(config.run_dir)
    for arguments, message in (
        (
            ["--run", run, "--by", "digits"],
            r"no metadata column 'digits'; it has .*digit.*Did you mean 'digit'",
        ),
        (["--run", run, "--split", "tset"], "no split 'tset'; its splits are"),
        (["--run", str(tmp_path)], "holds no model"),
        (["--run", run, "--batch", "0"], "--batch 0 is under 1"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)


def test_the_default_is_the_most_held_out_stream(config: Config) -> None:
    assert stream_of(config, None, None)[0] == "test"
    plain = to_plain(config)
    plain["data"]["test"] = None
    assert stream_of(parse(Config, plain), None, None)[0] == "val"
    plain["data"]["val"] = {"manifest": "elsewhere", "split": "valid"}
    assert stream_of(parse(Config, plain), None, "val") == ("val", parse(Config, plain).data.val)
    plain["data"]["val"] = None
    with pytest.raises(UserError, match="name a split with --split"):
        stream_of(parse(Config, plain), None, None)


@pytest.mark.parametrize("task", ["ordinal", "multilabel", "regression"])
def test_every_task_has_figures_and_pictures(task: str, tmp_path: Path) -> None:
    manifest = digits(tmp_path / "set", task)
    config = tiny_config(manifest, tmp_path)
    network = tiny_network(config.model, task, len(manifest.classes()))
    samples = streams_of(config)["test"]
    predictions = predict_samples(config, network, samples, PREPROCESSING, 5, tmp_path, "test")
    measured = Evaluation(task=task, names=manifest.display(), threshold=None, samples=samples, predictions=predictions)
    pictures = write_report(tmp_path / "report", measured, measured.figures("digit"), tmp_path / "absent.csv")
    assert {path.stem for path in pictures} == PICTURES[task]
    for path in pictures:
        with Image.open(path) as image:
            image.load()
    plain = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert len(plain["per_class"]) == len(manifest.classes()) and plain["by"]["digit"]


def test_the_worst_mistakes_come_first_with_both_names(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets: list[tuple[list[Image.Image], list[str]]] = []
    monkeypatch.setattr("lit_transfer.report.split.contact_sheet", lambda i, c, path: sheets.append((i, c)))
    truth = evaluation(manifest, torch.zeros(12, 2)).predictions.targets
    sure = torch.full((12,), 0.9)
    sure[3], sure[5], sure[7] = 0.2, 0.05, 0.45
    said = torch.stack([torch.where(truth == 0, sure, 1 - sure), torch.where(truth == 1, sure, 1 - sure)], 1)
    measured = evaluation(manifest, said)
    write_mistakes(measured, tmp_path / "sheet.png")
    images, captions = sheets[0]
    table = manifest.table
    places = [int(measured.predictions.rows[i]) for i in (5, 3, 7)]
    assert [caption.split("\n")[2] for caption in captions] == [table["source"][row].as_py() for row in places]
    assert [image.size for image in images] == [(table["width"][r].as_py(), table["height"][r].as_py()) for r in places]
    true = ("even", "odd")[int(truth[5])]
    other = ("odd", "even")[int(truth[5])]
    assert captions[0].startswith(f"true: {true}\nsaid: {other} (0.95)")


def test_mistakes_of_the_other_tasks(tmp_path: Path) -> None:
    labels = digits(tmp_path / "labels", "multilabel")
    said = torch.full((12, 2), 0.5)
    truth = evaluation(labels, said).predictions.targets
    said = torch.where(truth.isnan(), 0.99, truth * 0.8 + 0.1)
    said[2, 0] = 1 - said[2, 0]
    wrong = evaluation(labels, said)
    assert torch.isfinite(wrong.badness()).nonzero().tolist() == [[2, 0]], "missing labels are no mistakes"
    yes, no = ("yes", "no") if truth[2, 0] == 1 else ("no", "yes")
    assert wrong.caption(2, 0).startswith(f"odd: {yes}\nsaid: {no}, p(yes) 0.")

    values = digits(tmp_path / "values", "regression")
    truth = evaluation(values, torch.zeros(12, 2)).predictions.targets
    said = truth.clone()
    said[4, 0] += 1  # in standard deviations less than the next one
    said[6, 1] += 3
    assert int(evaluation(values, said).badness().max(1).values.argmax()) == 6

    steps = digits(tmp_path / "steps", "ordinal")
    truth = evaluation(steps, torch.zeros(12, 3)).predictions.targets
    far = torch.nn.functional.one_hot(2 - truth, 3).float()
    assert torch.equal(torch.isfinite(evaluation(steps, far).badness()[:, 0]), truth != 1)
