"""Packing writes the same bytes again, and never half a dataset."""

from __future__ import annotations

import csv
import errno
import gc
import hashlib
import io
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from packing import column, contents, draw, folder, nothing_left, packed, payload, table
from PIL import Image

from lit_transfer.data.decode import open_rgb
from lit_transfer.data.packing import pack as module
from lit_transfer.data.packing import shards
from lit_transfer.data.packing.items import Pack
from lit_transfer.data.packing.pack import pack
from lit_transfer.data.packing.record import compute_digest
from lit_transfer.errors import UserError


def test_plain_webdataset_reads_the_shards_back(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", per_class=12)
    manifest = packed(source, tmp_path / "out", shard_bytes=2000, splits={"train": 1.0})
    assert len(manifest.shards) > 3
    samples = manifest.table.to_pylist()
    urls = [str(manifest.path / shard.name) for shard in manifest.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the tars to the collector to close
        read = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    assert [sample["__key__"] for sample in read] == [sample["key"] for sample in samples]
    for row, (found, known) in enumerate(zip(read, samples, strict=True)):
        beside = json.loads(found["json"])
        assert found["png"] == (source / known["source"]).read_bytes()
        assert int(found["cls"]) == known["label.label"] == manifest.targets()[row]
        assert beside["labels"] == {"label": manifest.classes()[known["label.label"]]}
        assert (beside["source"], beside["split"], beside["weight"]) == (known["source"], "train", 1.0)
        assert not set(known["key"]) & set(". /")
    # A stretch of a shard holds a mix of classes.
    assert 3 <= sum(sample["label.label"] for sample in samples[:12]) <= 9


def test_shards_and_digest_are_what_the_files_hold(tmp_path: Path) -> None:
    manifest = packed(folder(tmp_path / "in"), tmp_path / "out", shard_bytes=3000)
    for number, shard in enumerate(manifest.shards):
        data = (manifest.path / shard.name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (shard.sha256, shard.bytes)
        rows = [sample for sample in manifest.table.to_pylist() if sample["shard"] == number]
        assert len(rows) == shard.samples and {sample["split"] for sample in rows} == {shard.split}
        for sample in rows:
            piece = data[sample["offset"] : sample["offset"] + sample["size"]]
            assert hashlib.sha256(piece).digest() == sample["hash"]
    assert manifest.digest == compute_digest(manifest.table, manifest.task, manifest.labels, manifest.shards)
    assert (manifest.path / "rejected.csv").read_text() == "source,reason\n"


def test_same_input_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    first = packed(folder(tmp_path / "1" / "in"), tmp_path / "a", workers=1, image_format="webp", short_side=8)
    copy = tmp_path / "2" / "in"
    for path in sorted((tmp_path / "1" / "in").rglob("*.png"), reverse=True):  # other order, other times
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / path.parent.name / path.name)
    second = packed(copy, tmp_path / "b", workers=3, image_format="webp", short_side=8)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and first.digest == second.digest
    other = packed(copy, tmp_path / "c", split_seed=1, image_format="webp", short_side=8)
    assert other.digest != first.digest and column(other, "split") != column(first, "split")


def test_equal_bytes_are_two_samples_and_counted(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", per_class=2)
    shutil.copyfile(source / "cat" / "0.png", source / "dog" / "0.png")
    file = source / "table.csv"
    file.write_text("path,label,split,group\ncat/0.png,a,train,g\ndog/0.png,b,test,g\ncat/1.png,a,train,\n")
    manifest = packed(file, tmp_path / "out")
    assert len(set(manifest.table["key"].to_pylist())) == 3
    assert (manifest.straddling("hash"), manifest.straddling("group")) == (1, 1)


def test_groups_never_straddle(tmp_path: Path) -> None:
    rows = [f"{i}.png,{i % 2},patient {i // 4}" for i in range(40)]
    manifest = packed(table(tmp_path / "in", "path,label,group", rows), tmp_path / "out")
    assert manifest.straddling("group") == 0 and set(manifest.splits) == {"train", "val", "test"}
    with pytest.raises(UserError, match="split 'test, val' gets none of the 4 samples"):
        packed(table(tmp_path / "one", "path,label,group", rows[:4]), tmp_path / "other")


def test_formats_and_sizes(tmp_path: Path) -> None:
    source = tmp_path / "in"
    draw(source / "a" / "large.png", size=(40, 20))
    draw(source / "b" / "small.png", size=(16, 10))
    Image.open(source / "b" / "small.png").convert("RGBA").save(source / "b" / "alpha.png")
    Image.open(source / "b" / "small.png").save(source / "b" / "photo.jpg")
    one: dict[str, Any] = {"splits": {"all": 1.0}}
    for image_format, kind in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
        manifest = packed(source, tmp_path / image_format, image_format=image_format, short_side=10, **one)
        for row, sample in enumerate(manifest.table.to_pylist()):
            image = Image.open(io.BytesIO(payload(manifest, row)))
            assert image.format == kind and image.size == (sample["width"], sample["height"])
            assert image.size == (
                (20, 10) if "large" in sample["source"] else (16, 10) if "b/" in sample["source"] else ()
            )
            same = payload(manifest, row) == (source / sample["source"]).read_bytes()
            assert same == ((image_format, sample["source"]) in (("jpg", "b/photo.jpg"), ("png", "b/small.png")))
    kept = packed(source, tmp_path / "keep", **one)
    for row, sample in enumerate(kept.table.to_pylist()):
        original = (source / sample["source"]).read_bytes()
        assert (payload(kept, row) == original) == ("alpha" not in sample["source"])
        assert np.array_equal(np.asarray(open_rgb(payload(kept, row))), np.asarray(open_rgb(original)))


def with_bad_files(root: Path) -> Path:
    """100 samples in a table, of which three cannot be packed."""
    good = [f"good/{i}.png,{'xy'[i % 2]}" for i in range(97)]
    file = table(root, "path,label", good)
    (root / "text.jpg").write_text("I am text.")
    whole = draw(root / "whole.png", size=(40, 40)).read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    with file.open("a") as more:
        more.write("text.jpg,x\ncut.png,y\nabsent.png,x\n")
    return file


def test_rejected_pictures_are_listed_and_counted(tmp_path: Path) -> None:
    file = with_bad_files(tmp_path / "in")
    result = pack(Pack(source=str(file), out=str(tmp_path / "out"), max_rejected_fraction=0.03))
    assert (result.rejected, result.manifest.table.num_rows) == (3, 97)
    with (tmp_path / "out" / "rejected.csv").open() as text:
        rejected = dict(csv.reader(text))
    assert rejected["text.jpg"] == "not a picture in a known format"
    assert rejected["absent.png"] == "no such file or directory" and "trunc" in rejected["cut.png"]
    assert set(rejected) == {"source", "text.jpg", "cut.png", "absent.png"}
    again = pack(Pack(source=str(file), out=str(tmp_path / "out"), max_rejected_fraction=0.03))
    assert again.reused and again.rejected == 3


def test_too_many_rejected_pictures_are_an_error(tmp_path: Path) -> None:
    file = with_bad_files(tmp_path / "in")
    with pytest.raises(UserError, match=r"3 of 100 pictures \(3.0%\) were rejected.*absent.png: no such file"):
        packed(file, tmp_path / "out")
    nothing_left(tmp_path, "in", "out.rejected.csv")
    assert len((tmp_path / "out.rejected.csv").read_text().splitlines()) == 4


class FailingWriter(shards.TarWriter):  # type: ignore[misc]
    """Writes five samples, then fails as told."""

    error: BaseException
    written = 0

    def write(self, obj: dict[str, Any]) -> int:
        type(self).written += 1
        if self.written > 5:
            raise self.error
        return int(super().write(obj))


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            UserError,
            r"the disk of '.*out' is full.*MiB are free",
        ),
        (
            OSError(errno.EIO, "Input/output error"),
            UserError,
            "failed and left nothing there.*Input/output error",
        ),
        (KeyboardInterrupt("by hand"), KeyboardInterrupt, "by hand"),
    ],
)
def test_a_failure_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    message: str,
) -> None:
    source = folder(tmp_path / "in")
    monkeypatch.setattr(FailingWriter, "error", error, raising=False)
    monkeypatch.setattr(FailingWriter, "written", 0)
    monkeypatch.setattr(shards, "TarWriter", FailingWriter)
    with pytest.raises(raised, match=message):
        packed(source, tmp_path / "out")
    assert FailingWriter.written == 6
    nothing_left(tmp_path, "in")
    monkeypatch.undo()
    assert packed(source, tmp_path / "out").table.num_rows == 20


def test_nothing_appears_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def see(folder: Path, **_: Any) -> None:
        assert folder.parent == tmp_path and folder.name.startswith(".out.partial-")
        assert not (tmp_path / "out").exists() and len(list(folder.glob("*.tar"))) == 3
        raise KeyboardInterrupt

    source = folder(tmp_path / "in")
    monkeypatch.setattr(module, "write_manifest", see)
    with pytest.raises(KeyboardInterrupt):
        packed(source, tmp_path / "out")
    nothing_left(tmp_path, "in")


def test_a_disk_that_returns_other_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar(shards.TarWriter):  # type: ignore[misc]
        def write(self, obj: dict[str, Any]) -> int:
            return int(super().write({**obj, "png": obj["png"][:-1] + b"?"}))

    monkeypatch.setattr(shards, "TarWriter", Liar)
    with pytest.raises(UserError, match="did not read back as it was written"):
        packed(folder(tmp_path / "in"), tmp_path / "out")
    nothing_left(tmp_path, "in")


def test_packing_again(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    first = pack(Pack(source=str(source), out=str(out), workers=1))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = pack(Pack(source=str(source), out=str(out), workers=2))
    assert not first.reused and again.reused and again.manifest.digest == first.manifest.digest
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match=r"packed otherwise \(split_seed was 0, now 7\); remove it or choose"):
        packed(source, out, split_seed=7)
    draw(source / "cat" / "new.png")
    with pytest.raises(UserError, match=r"packed otherwise \(the source has changed\)"):
        packed(source, out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="exists and holds no dataset; remove it or choose another --out"):
        packed(source, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": {"train": 0.5, "test": 0.4}}, "sum to 0.9"),
        ({"splits": {"train": 1.5, "test": -0.5}}, "splits.test -0.5 is not positive"),
        ({"splits": {"a/b": 1.0}}, "split 'a/b' must be letters"),
        ({"stratify": ["site"]}, "no column 'site' beside the labels"),
        ({"task": "regression"}, "label 'label' of sample 'cat/0.png' is 'cat'; regression takes"),
        ({"labels": ["kind"]}, "an image folder has one label"),
        ({"classes": ["cat"]}, "has 1 classes"),
        ({"classes": ["cat", "dig"]}, "'dog', which is not among the 2 classes. Did you mean 'dig'"),
        ({"short_side": 0}, "short_side 0"),
        ({"display_names": "absent.csv"}, "'absent.csv' does not exist"),
        ({"out": ".."}, "out '..' is not a folder that can be made"),
    ],
)
def test_faulty_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = folder(tmp_path / "in", per_class=3)
    with pytest.raises(UserError, match=message):
        pack(Pack(**{"source": str(source), "out": str(tmp_path / "out"), **options}))
    nothing_left(tmp_path, "in")
