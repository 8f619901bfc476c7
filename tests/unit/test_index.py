"""Shards that others wrote become a dataset in one pass."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign import by_shard_writer, flip, headers, indexed, picture, read_by_webdataset, rejected, shard, write_tar
from PIL import Image

from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.index import Index, index
from lit_transfer.data.store import ShardReader
from lit_transfer.errors import UserError
from lit_transfer.launch.prepare import main


@pytest.fixture
def written(tmp_path: Path) -> list[Path]:
    return by_shard_writer(tmp_path)


def test_every_sample_of_a_plain_shard_writer_is_found_where_it_lies(written: list[Path]) -> None:
    before = {path: path.read_bytes() for path in written}
    manifest = indexed(written[0].parent)
    samples, read = manifest.table.to_pylist(), read_by_webdataset(*written)
    assert [row["key"] for row in samples] == [sample["__key__"] for sample in read]
    reader = ShardReader(manifest)
    for row, (known, found) in enumerate(zip(samples, read, strict=True)):
        assert reader.read(row) == found["png"] and known["hash"] == hashlib.sha256(found["png"]).digest()
        assert Image.open(io.BytesIO(found["png"])).size == (known["width"], known["height"])
        assert manifest.classes()[manifest.targets()[row]] == found["cls"].decode()
        assert known["source"] == f"train-00{row // 10}.tar/{known['key']}.png" and known["split"] == "train"
    assert [shard.sha256 for shard in manifest.shards] == [hashlib.sha256(d).hexdigest() for d in before.values()]
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        (f"train-00{i}.tar", (10, 10, 5)[i]) for i in range(3)
    ]
    assert manifest.class_counts().tolist() == [[4, 3, 3, 0], [3, 4, 3, 0], [2, 1, 2, 0]]
    assert before == {path: path.read_bytes() for path in written} and rejected(manifest.path) == []


def test_the_result_does_not_depend_on_threads(written: list[Path], tmp_path: Path) -> None:
    one, three = indexed(*written, out=str(tmp_path / "a")), indexed(*written, out=str(tmp_path / "b"), workers=3)
    assert one.digest == three.digest and one.table.equals(three.table)


def test_sides_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    data = [(f"{turn}.jpg", picture(turn, (30, 20), "JPEG", turn)) for turn in (1, 3, 6, 8)]
    manifest = indexed(write_tar(tmp_path / "0.tar", data))
    assert manifest.table["width"].to_pylist() == [30, 30, 20, 20]


def test_splits_by_patterns_of_names(tmp_path: Path) -> None:
    paths = [shard(tmp_path / "train" / f"{i}.tar", [f"t{i}", f"u{i}"]) for i in range(2)]
    shard(tmp_path / "val" / "0.tar", ["v", "w"])
    manifest = indexed(tmp_path, splits={"train": "train/*", "val": "val/*"})
    assert manifest.splits == {"train": 4, "val": 2} and manifest.rows("val").tolist() == [4, 5]
    assert [shard.name for shard in manifest.shards] == ["train/0.tar", "train/1.tar", "val/0.tar"]
    with pytest.raises(UserError, match=r"val/0.tar' fits the patterns of 0 splits \(none\)"):
        indexed(tmp_path, splits={"train": "train/*"}, out=str(tmp_path / "o"))
    with pytest.raises(UserError, match=r"shard '0.tar' fits the patterns of 2 splits \(train, val\)"):
        indexed(paths[0], splits={"train": "*", "val": "0*"})


def test_an_index_is_found_again_or_refused(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", ["a", "b"])
    settings = Index(index=[str(tmp_path)], workers=1)
    first, again = index(settings), index(Index(index=[str(tmp_path / "*.tar")], workers=2))
    assert not first.reused and again.reused and first.manifest.digest == again.manifest.digest
    shard(tmp_path / "1.tar", ["c", "d"])
    with pytest.raises(UserError, match="the source has changed"):
        index(settings)


def test_shards_whose_labels_were_changed_are_not_taken_for_those_that_were_indexed(written: list[Path]) -> None:
    first = indexed(*written)
    assert indexed(*written).digest == first.digest
    with tarfile.open(written[0]) as tar:
        place = next(member.offset_data for member in tar if member.name.endswith(".cls"))
    data = bytearray(written[0].read_bytes())
    data[place] = ord("1")  # of the same length: names and sizes of the shards stay
    written[0].write_bytes(data)
    with pytest.raises(UserError, match=r"was made of other shards: train-000\.tar changed since; remove its manifest"):
        indexed(*written)


def test_an_index_may_lie_elsewhere(tmp_path: Path) -> None:
    path = shard(tmp_path / "shards" / "0.tar", ["a", "b"])
    path.parent.chmod(0o555)
    manifest = indexed(path, out=str(tmp_path / "deep" / "out"))
    assert manifest.shards[0].name == str(path) == manifest.shard_address(0)
    assert sorted(p.name for p in manifest.path.iterdir()) == ["manifest.arrow", "rejected.csv"]
    assert len(ShardReader(manifest).read(1)) == manifest.table["size"][1].as_py()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": []}, "index is empty"),
        ({"splits": {}}, "splits is empty"),
        ({"splits": {"a/b": "*"}}, "split 'a/b' must be letters"),
        ({"workers": 0}, "workers 0 is under 1"),
        ({"max_rejected_fraction": 2.0}, "outside"),
        ({"table": "absent.csv"}, "absent.csv' cannot be read"),
        ({"display_names": "absent.csv"}, "display_names 'absent.csv' does not exist"),
        ({"labels": ["kind", "kind"]}, "a field is named twice"),
    ],
)
def test_faulty_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    shard(tmp_path / "0.tar", ["a", "b"])
    with pytest.raises(UserError, match=message):
        index(Index(**{"index": [str(tmp_path / "0.tar")], **options}))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server of a folder, without ranges."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    (tmp_path / "served").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", tmp_path / "served"
        found.shutdown()
        thread.join()


def test_shards_on_a_web_server_are_streamed(
    server: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, folder = server
    for i in range(2):
        shard(folder / f"{i}.tar", [f"k{i}", f"l{i}"])
    options = ["--index", f"{url}/{{0..1}}.tar", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(options) == 0 and "label: a 2, b 2" in capsys.readouterr().out
    assert main(["--verify", str(tmp_path / "out")]) == 0
    manifest = Manifest.open(tmp_path / "out")
    assert [manifest.shard_address(i) for i in range(2)] == [f"{url}/{i}.tar" for i in range(2)]
    assert manifest.digest == indexed(folder).digest
    remote = Manifest.open(url)  # the manifest itself may lie there, too
    assert remote.digest == manifest.digest and remote.shard_address(1) == f"{url}/1.tar"
    flip(folder / "1.tar", headers(folder / "1.tar")["l1.png"] + 540)
    assert main(["--verify", url]) == 1 and "l1.png" in capsys.readouterr().out


def test_the_command_takes_what_a_shell_expands(written: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in written]
    assert main(["--workers", "1", "--index", *paths, "--labels", "[kind]"]) == 0
    said = capsys.readouterr()
    assert "kind: x 13, y 12" in said.out and "train 25" in said.out and "B/s" in said.err
    assert main(["--workers", "1", "--index", *paths, "--labels", "[kind]"]) == 0
    assert "already indexed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--index", "--help"])
    assert "max_rejected_fraction" in capsys.readouterr().out
    assert np.array_equal(Manifest.open(written[0].parent).class_counts().sum(axis=0), [13, 12, 0])
