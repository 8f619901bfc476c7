"""`lit-transfer prepare` reads its settings from flags and files, and says what it made."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign import shard
from packing import draw, folder

from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.items import Pack
from lit_transfer.errors import UserError
from lit_transfer.launch import run
from lit_transfer.launch.options import read_config
from lit_transfer.launch.prepare import main


def test_packs_and_summarises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "in")
    (source / "cat" / "notes.txt").write_text("no picture")
    draw(source / "dog" / "copy.png", 0)
    options = ["--source", str(source), "--out", str(tmp_path / "out"), "--workers=1"]
    assert main(options) == 0
    said = capsys.readouterr()
    manifest = Manifest.open(tmp_path / "out")
    for part in (
        "multiclass",
        "cat 10, dog 11",
        "train 15, val 3, test 3",
        "rejected  0",
        "1 files that are no pictures",
    ):
        assert part in said.out
    assert manifest.digest in said.out and "21/21" in said.err
    assert main(options) == 0
    assert "already packed" in capsys.readouterr().out
    assert run(main, ["--source", "absent", "--out", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: source 'absent' does not exist")


def test_shards_sorted_by_class_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("sorted", "mixed"):
        for i in range(10):
            labels = "0123456789"[i] if kind == "sorted" else "0123456789"
            shard(tmp_path / kind / f"{i}.tar", [f"{i}{n}" for n in range(10)], labels)
    assert main(["--index", str(tmp_path / "sorted"), "--workers=1"]) == 0
    said = capsys.readouterr().out
    assert "(10 classes of 10 to 10 samples)" in said
    assert "warning   a shard holds 1.0 of the 10 classes of 'label' on average, mixed ones would hold 6.5" in said
    assert main(["--index", str(tmp_path / "mixed"), "--workers=1"]) == 0
    assert "warning" not in capsys.readouterr().out


def read_settings(arguments: list[str]) -> Pack:
    return read_config(arguments, "lit-transfer prepare", None, Pack, needs_file=False)


def test_settings_from_file_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "pack.yaml"
    file.write_text("source: pictures\nout: data\ntask: none\nsplits: {train: 0.5, test: 0.5}\n")
    for given in (["--config", str(file)], [f"--config={file}"]):
        settings = read_settings(["--out", "elsewhere", *given, "--max_rejected_fraction=1e-1"])
        assert (settings.source, settings.out, settings.task) == ("pictures", "elsewhere", "none")
        assert settings.splits == {"train": 0.5, "test": 0.5} and settings.max_rejected_fraction == 0.1
    flags = ["--source", "a", "--out", "b", "--splits", "{train: 0.6, test: 0.4}", "--stratify", "[type]"]
    assert read_settings(flags).splits == {"train": 0.6, "test": 0.4} and read_settings(flags).stratify == ["type"]
    with pytest.raises(UserError, match=r"'sorce' is not a key of the config. Did you mean 'source'"):
        read_settings(["--sorce", "a"])
