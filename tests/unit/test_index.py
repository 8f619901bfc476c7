"""Shards that others wrote become a dataset in one pass, and what webdataset passes over silently is said."""

from __future__ import annotations

import csv
import gc
import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from foreign import bomb, cut, flip, headers, picture, sample, shard, write_tar
from PIL import Image

from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.index import Index, expand, index
from lit_transfer.data.store import ShardReader
from lit_transfer.errors import UserError
from lit_transfer.launch.prepare import main


def indexed(*shards: Path | str, **options: Any) -> Manifest:
    return index(Index(index=[str(path) for path in shards], **{"workers": 1} | options)).manifest


def rejected(folder: Path) -> list[tuple[str, str, str]]:
    with (folder / "rejected.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["shard", "member", "reason"]
    return [(row[0], row[1], row[2]) for row in rows]


def read_by_webdataset(*paths: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the tars to the collector to close
        read = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
        gc.collect()
    return read


@pytest.fixture
def written(tmp_path: Path) -> list[Path]:
    """25 samples by webdataset's own ShardWriter, 10 a shard."""
    with webdataset.ShardWriter(str(tmp_path / "train-%03d.tar"), maxcount=10, verbose=0) as writer:
        for i in range(25):
            fields = {"kind": "xy"[i % 2], "deep": {"value": i / 2}, "flag": i % 4 == 0, "empty": None}
            picture_of = picture(i, (12 + i, 10))
            writer.write({"__key__": f"dir/s{i:04d}", "png": picture_of, "cls": i % 3, "json": fields, "txt": f"n {i}"})
    return sorted(tmp_path.glob("*.tar"))


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


def test_labels_by_name_or_place(written: list[Path], tmp_path: Path) -> None:
    manifest = indexed(*written, out=str(tmp_path / "named"), classes=["zero", "one", "two", "three"])
    assert manifest.classes() == ("zero", "one", "two", "three")
    assert manifest.targets().tolist() == [i % 3 for i in range(25)]
    with pytest.raises(UserError, match=r"'2', which is not among the 2 classes"):
        indexed(*written, out=str(tmp_path / "few"), classes=["zero", "one"])
    text = indexed(*written, out=str(tmp_path / "text"), member="txt", task="multiclass")
    assert len(text.classes()) == 25 and text.classes()[2] == "n 2"


def test_labels_from_fields_of_json_members(written: list[Path], tmp_path: Path) -> None:
    kinds = indexed(*written, out=str(tmp_path / "kind"), labels=["kind"])
    assert kinds.classes() == ("x", "y") and kinds.targets().tolist() == [i % 2 for i in range(25)]
    values = indexed(*written, out=str(tmp_path / "deep"), labels=["deep.value", "flag"], task="regression")
    assert values.targets("deep.value")[:, 0].tolist() == [i / 2 for i in range(25)]
    flags = indexed(*written, out=str(tmp_path / "flag"), labels=["flag"], task="multilabel")
    assert flags.targets()[:, 0].tolist() == [float(i % 4 == 0) for i in range(25)]
    assert flags.class_counts()[0].tolist() == [7, 3, 0]
    for field in ("absent", "empty", "deep.value.more"):
        with pytest.raises(UserError, match=rf"no sample has the label '{field}' by fields .* of .json members"):
            indexed(*written, out=str(tmp_path / "x"), labels=[field])
    with pytest.raises(UserError, match=r"field 'deep' of its .json member is a dict, not text or a number"):
        indexed(*written, out=str(tmp_path / "x"), labels=["deep"])


def test_labels_from_a_table_by_key(written: list[Path], tmp_path: Path) -> None:
    lines = [f"dir/s{i:04d},{'pq'[i % 2]},g{i // 2},{i},site {i}" for i in range(24)]
    (tmp_path / "labels.csv").write_text("\n".join(["key,label,group,weight,site", *lines, "other,p,,,"]) + "\n")
    manifest = indexed(*written, out=str(tmp_path / "t"), table=str(tmp_path / "labels.csv"))
    assert manifest.targets().tolist() == [*[i % 2 for i in range(24)], -1]
    last = manifest.table.slice(23, 2).to_pylist()
    assert [(row["group"], row["weight"], row["meta.site"]) for row in last] == [
        ("g11", 23.0, "site 23"),
        (None, 1.0, None),
    ]
    for text, message in (
        ("name,label\na,b\n", "has no column 'key'"),
        ("key,label\na,b\na,c\n", "line 3: key 'a' stands in another line"),
        ("key,label,split\na,b,train\n", "a shard has one split; give --splits patterns"),
        ("key,label\nelse,b\n", "no sample has the label 'label' by the keys of .*; a key here is 'dir/s0000'"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            indexed(*written, out=str(tmp_path / "x"), table=str(tmp_path / "bad.csv"))


def test_the_layout_of_img2dataset_has_captions_that_are_no_labels(tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = []
    for i in range(4):
        fields = json.dumps({"caption": f"a {i}", "url": "https://x", "width": 12, "status": "success"}).encode()
        members += [(f"0000{i}.jpg", picture(i, kind="JPEG")), (f"0000{i}.json", fields), (f"0000{i}.txt", b"a dog")]
    manifest = indexed(write_tar(tmp_path / "00000.tar", members))
    assert (manifest.task, manifest.labels, manifest.splits) == ("none", (), {"train": 4})
    with pytest.raises(UserError, match="remove it or choose another --out"):  # made there with other settings
        indexed(tmp_path / "00000.tar", labels=["width"], task="regression")
    with pytest.raises(UserError, match=r"no sample has the label 'label' by .cls members; a key here is '00000'"):
        indexed(tmp_path / "00000.tar", out=str(tmp_path / "o"), task="multiclass")


FAULTS: dict[str, tuple[list[tuple[str, bytes]], dict[str, str]]] = {
    "interleaved": (
        [("p.png", picture(1)), ("q.png", picture(2)), ("p.cls", b"a"), ("q.cls", b"b")],
        dict.fromkeys(["p.png", "q.png", "p.cls", "q.cls"], "its key stands in the shard again"),
    ),
    "key twice": ([*sample("p", 1, "a"), *sample("q", 2, "a"), *sample("p", 3, "a")], {"p.png": "its key stands"}),
    "several pictures": (
        [("p.png", picture(1)), ("p.jpg", picture(2, kind="JPEG"))],
        {"p.png": "key 'p' has 2 pictures ('p.png', 'p.jpg')"},
    ),
    "dots": (
        [("img.v1.0001.png", picture(1)), ("img.v1.0002.png", picture(2))],
        {"img.v1.0001.png": "they merge because a key ends at the first dot of the name"},
    ),
    "one name": ([("p.png", picture(1)), ("p.png", picture(2))], {"p.png": "some of one name"}),
    "no picture": ([("p.cls", b"a"), ("p.json", b"{}")], {"p.cls": "key 'p' has no picture"}),
    "no key": ([("README", b"text")], {"README": "its name has no key before a dot"}),
    "text as picture": ([("p.jpg", b"<html>")], {"p.jpg": "not a picture in a known format"}),
    "label twice": ([*sample("p", 1, "a"), ("p.cls", b"b")], {"p.png": "the label stands twice"}),
    "bad label": ([("p.png", picture(1)), ("p.cls", b"\xff\xfe")], {"p.png": "its label is not UTF-8 text"}),
    "bomb": ([("p.png", bomb())], {"p.png": "4294967296 pixels"}),
    "bad name": ([("p\udcff.png", picture(1))], {"p\\xff.png": "its name is not UTF-8"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_webdataset_passes_over_is_listed(tmp_path: Path, fault: str) -> None:
    members, expected = FAULTS[fault]
    path = write_tar(tmp_path / "000.tar", [*sample("before", 7, "a"), *members, *sample("zz", 8, "b")])
    manifest = indexed(path, max_rejected_fraction=0.9)
    keys = manifest.table["key"].to_pylist()
    assert keys == ["before", *(["q"] if fault == "key twice" else []), "zz"]
    found = rejected(tmp_path)
    for member, reason in expected.items():
        assert any(row[0] == "000.tar" and row[1] == member and reason in row[2] for row in found), found
    assert manifest.pack["rejected"] == len(found)
    reader = ShardReader(manifest)
    assert [reader.read(row) for row in (0, len(keys) - 1)] == [picture(7), picture(8)]
    (tmp_path / "manifest.arrow").unlink()
    told = f"{len(found)} of {len(found) + len(keys)} samples .* above max_rejected_fraction 0.01"
    with pytest.raises(UserError, match=told):
        indexed(path)


def test_links_and_folders(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/l.png", tarfile.SYMTYPE), ("d/h.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("d/" + "long" * 60 + "ä.png")
        info.size = len(picture(1))
        tar.addfile(info, io.BytesIO(picture(1)))
    manifest = indexed(tmp_path / "0.tar", max_rejected_fraction=0.9)
    assert manifest.table["key"].to_pylist() == ["d/" + "long" * 60 + "ä"] and ShardReader(manifest).read(0) == picture(
        1
    )
    assert [row[1] for row in rejected(tmp_path)] == ["d/l.png", "d/h.png"] and "is a link" in rejected(tmp_path)[0][2]


def test_sides_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    data = [(f"{turn}.jpg", picture(turn, (30, 20), "JPEG", turn)) for turn in (1, 3, 6, 8)]
    manifest = indexed(write_tar(tmp_path / "0.tar", data))
    assert manifest.table["width"].to_pylist() == [30, 30, 20, 20]


def test_a_key_in_two_shards_is_in_neither(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", ["a", "b"]), shard(tmp_path / "1.tar", ["b", "c"])
    manifest = indexed(tmp_path, max_rejected_fraction=0.5)
    assert manifest.table["key"].to_pylist() == ["a", "c"] and [s.samples for s in manifest.shards] == [1, 1]
    assert [row[:2] for row in rejected(tmp_path)] == [("0.tar", "b.png"), ("1.tar", "b.png")]
    assert "key 'b' stands in several shards" in rejected(tmp_path)[0][2]
    first, second = (indexed(tmp_path / f"{i}.tar", out=str(tmp_path / f"m{i}")) for i in range(2))
    both = Manifest.open([str(first.path), str(second.path)])
    assert both.table["key"].to_pylist() == ["a", "b", "b", "c"]  # apart they are two datasets, which may be joined


def boundary(path: Path) -> None:
    cut(path, headers(path)["c.png"])


def inside(path: Path) -> None:
    cut(path, headers(path)["c.png"] + 600)


def in_header(path: Path) -> None:
    flip(path, headers(path)["c.png"] + 20)


def in_size(path: Path) -> None:
    flip(path, headers(path)["c.png"] + 130)


def first_header(path: Path) -> None:
    flip(path, 20)


def appended(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def zipped(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def page(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>" * 100)


DAMAGE: list[tuple[Callable[[Path], None], str, bool]] = [
    (boundary, "cut off at byte .*there is no end-of-archive mark", True),
    (inside, "damaged or cut off at byte", False),
    (in_header, "damaged or cut off: there is no sound header at byte", True),
    (in_size, "damaged or cut off: there is no sound header at byte", True),
    (first_header, "no plain tar archive", False),
    (appended, "bytes follow the end-of-archive mark", True),
    (zipped, "no plain tar archive .* a compressed one must be unpacked", True),
    (page, "no plain tar archive", False),
]


@pytest.mark.parametrize(("damage", "message", "silent"), DAMAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_tar_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str, silent: bool) -> None:
    sound, broken = shard(tmp_path / "0.tar", ["aa", "bb"]), shard(tmp_path / "1.tar", ["a", "b", "c", "d"])
    damage(broken)
    if silent:
        assert read_by_webdataset(sound, broken)  # without a word
    with pytest.raises(UserError, match=f"1 of 2 shards are damaged: '1.tar' is .*({message}).*copy them again"):
        indexed(tmp_path)
    assert not (tmp_path / "manifest.arrow").exists()


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


def test_addresses_expand_and_those_that_are_not_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        shard(tmp_path / f"{i:03d}.tar", [f"k{i}"])
    names = [str(tmp_path / f"{i:03d}.tar") for i in range(3)]
    for patterns in (["{000..002}.tar"], ["*.tar"], [""], ["000.tar", "00{1,2}.tar"], ["00[0-9].tar", "000.tar"]):
        assert expand([str(tmp_path / pattern) for pattern in patterns]) == names
    monkeypatch.chdir(tmp_path)
    assert expand(["*.tar"]) == ["000.tar", "001.tar", "002.tar"]
    assert indexed("{000..002}.tar", task="none").path.resolve() == tmp_path.resolve()
    for pattern, message in (
        ("pipe:cat 000.tar", "'pipe:' addresses are not read"),
        ("gopen:000.tar", "'gopen:' addresses are not read"),
        ("none-*.tar", "'none-\\*.tar' matches no shards"),
        ("absent.tar", "'absent.tar' cannot be read"),
        ("{000..002.tar", "a brace without its other half"),
        ("https://user:word@host/000.tar", "'https://host/000.tar' is given with credentials"),
        ("https://host/000.tar?sig=word", "'https://host/000.tar' is given with credentials"),
        ("https://host/dir/", "does not list its files"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            indexed(pattern, out=str(tmp_path / "out"))
        assert "word" not in str(caught.value)
    with pytest.raises(UserError, match="say with --out where the manifest goes"):
        indexed("https://host/000.tar")


def test_an_index_is_found_again_or_refused(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", ["a", "b"])
    settings = Index(index=[str(tmp_path)], workers=1)
    first, again = index(settings), index(Index(index=[str(tmp_path / "*.tar")], workers=2))
    assert not first.reused and again.reused and first.manifest.digest == again.manifest.digest
    shard(tmp_path / "1.tar", ["c", "d"])
    with pytest.raises(UserError, match="the source has changed"):
        index(settings)


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
