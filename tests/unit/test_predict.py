"""`lit-transfer predict`: rows, formats, errors and exit status."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digits import describe, digits, picture, tiny_config, tiny_network

from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.launch import main as command
from lit_transfer.launch.predict import find_images, main
from lit_transfer.model.portable import load, save_portable


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return digits(tmp_path_factory.mktemp("digits") / "set")


@pytest.fixture(scope="module")
def config(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(manifest, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(config: Config, manifest: Manifest) -> Path:
    network = tiny_network(config.model, "multiclass", 2)
    save_portable(config.run_dir / "model", network, describe(config, manifest, [0.5]))
    return config.run_dir


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for i in (1, 2, 10):
        picture(i).save(folder / f"img{i}.png")
    picture(3).convert("RGB").save(folder / "deeper" / "a[1].JPG")
    (folder / "notes.txt").write_text("no picture")
    return folder


def parse_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_bad_picture_is_a_row_and_the_others_go_on(
    run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "img3.png").write_bytes(b"broken")
    arguments = [
        "--run",
        str(run),
        str(pictures),
        str(pictures / "absent.png"),
        "--format",
        "json",
        "--batch",
        "2",
    ]
    assert main(arguments) == 1
    rows = json.loads(capsys.readouterr().out)
    named = {Path(row["image"]).name: row for row in rows}
    assert set(named) == {"img1.png", "img2.png", "img3.png", "img10.png", "a[1].JPG", "absent.png"}
    assert named["img3.png"]["error"] == "not a picture in a known format"
    assert named["absent.png"]["error"] == "no such file"
    good = [row for row in rows if not row["error"]]
    assert len(good) == 4 and all(row["ms"] > 0 and row["prediction"] in ("even", "odd") for row in good)
    (pictures / "img3.png").unlink()
    assert main(["--run", str(run), str(pictures)]) == 0


def test_probabilities_are_those_of_the_loaded_model_whatever_the_batch(
    run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in find_images(str(pictures))]
    model = load(run)
    expected = [dict(said.scores) for said in model.predict(paths)]
    assert len({round(scores["odd"], 3) for scores in expected}) > 1
    for batch in ("1", "3", "16"):
        assert main(["--run", str(run), *paths, "--format", "json", "--batch", batch]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["image"] for row in rows] == paths
        for row, scores in zip(rows, expected, strict=True):
            assert {top["name"]: top["probability"] for top in row["top"]} == pytest.approx(scores, abs=1e-5)


def test_folders_patterns_and_names_with_brackets(pictures: Path) -> None:
    names = [path.relative_to(pictures).as_posix() for path in find_images(str(pictures))]
    assert names == ["deeper/a[1].JPG", "img1.png", "img2.png", "img10.png"]
    assert [path.name for path in find_images(f"{pictures}/img*.png")] == [
        "img1.png",
        "img2.png",
        "img10.png",
    ]
    assert [path.name for path in find_images(f"{pictures}/**/*.JPG")] == ["a[1].JPG"]
    assert find_images(f"{pictures}/deeper/a[1].JPG") == [pictures / "deeper" / "a[1].JPG"]
    assert find_images(f"{pictures}/*.webp") == []


def test_csv_has_a_column_for_every_name(run: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    (pictures / "img3.png").write_bytes(b"")
    assert main(["--run", str(run), str(pictures), "--format", "csv", "--out", str(out), "--top", "1"]) == 1
    rows = parse_csv(out.read_text())
    assert list(rows[0]) == ["image", "prediction", "name_1", "probability_1", "ms", "error"]
    assert [bool(row["error"]) for row in rows] == [False, False, False, True, False]
    assert all(row["prediction"] == row["name_1"] for row in rows if not row["error"])


def test_the_threshold_decides_not_the_larger_probability(
    run: Path,
    config: Config,
    manifest: Manifest,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = load(run).network
    for threshold, name in (([0.0], "odd"), ([1.1], "even")):
        save_portable(tmp_path / "model", network, describe(config, manifest, threshold))
        assert main(["--run", str(tmp_path / "model"), str(pictures), "--format", "csv"]) == 0
        assert {row["prediction"] for row in parse_csv(capsys.readouterr().out)} == {name}


def test_labels_and_values(
    config: Config, manifest: Manifest, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = tiny_network(config.model, "multilabel", 2)
    info = replace(describe(config, manifest, [0.0, 1.1]), task="multilabel", display=("odd", "big"))
    save_portable(tmp_path / "labels", network, info)
    assert main(["--run", str(tmp_path / "labels"), str(pictures), "--format", "json"]) == 0
    assert all(row["prediction"] == ["odd"] for row in json.loads(capsys.readouterr().out))

    info = replace(info, task="regression", threshold=None)
    save_portable(tmp_path / "values", network, info)
    image = str(pictures / "img1.png")
    with torch.no_grad():
        expected = network(load(tmp_path / "values").preprocess(image)[None])[0].tolist()
    for form in ("csv", "json", "table"):
        assert main(["--run", str(tmp_path / "values"), image, "--format", form]) == 0
        printed = capsys.readouterr().out
        if form == "csv":
            row = parse_csv(printed)[0]
            assert list(row) == ["image", "odd", "big", "ms", "error"]
            assert [float(row["odd"]), float(row["big"])] == pytest.approx(expected)
        elif form == "json":
            assert list(json.loads(printed)[0]["prediction"].values()) == pytest.approx(expected)
        else:
            assert f"odd {expected[0]:.4g}, big {expected[1]:.4g}" in printed


def test_json_has_null_for_what_is_no_number(
    config: Config, manifest: Manifest, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = tiny_network(config.model, "regression", 2)
    with torch.no_grad():
        network.head.get_submodule("logits").bias[0] = float("nan")
    info = replace(describe(config, manifest), task="regression", display=("odd", "big"))
    save_portable(tmp_path / "values", network, info)
    assert main(["--run", str(tmp_path / "values"), str(pictures / "img1.png"), "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[0]["prediction"]
    assert said["odd"] is None and isinstance(said["big"], float)


def test_the_table_says_what_ms_means(run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(run), str(pictures / "img1.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "prediction", "probabilities", "ms"]
    assert lines[-1].startswith("ms: milliseconds")


def test_faults_of_the_input_end_with_status_2(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["--run", str(tmp_path), str(pictures)],
        ["--run", str(run), str(pictures), "--top", "0"],
        ["--run", str(run), str(pictures), "--batch", "0"],
    ):
        assert command(["predict", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "; give " in said


def test_an_empty_folder_is_a_row_with_its_reason(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["--run", str(run), str(tmp_path / "empty"), "--format", "csv"]) == 1
    assert parse_csv(capsys.readouterr().out)[0]["error"] == "holds no pictures"


def test_progress_is_shown_for_many_pictures_only(
    run: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lit_transfer.launch.predict.MANY", 6)
    assert main(["--run", str(run), str(pictures), "--format", "json"]) == 0
    assert capsys.readouterr().err == ""
    for i in range(4):
        shutil.copy(pictures / "img1.png", pictures / f"copy{i}.png")
    assert main(["--run", str(run), str(pictures), "--format", "json"]) == 0
    assert "8/8" in capsys.readouterr().err
