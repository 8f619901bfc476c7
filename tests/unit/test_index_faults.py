"""What is no sound sample is listed, what is no sound shard is refused: webdataset passes over both silently."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from foreign import (
    bomb,
    cut,
    flip,
    headers,
    indexed,
    picture,
    read_by_webdataset,
    rejected,
    sample,
    shard,
    write_tar,
)

from lit_transfer.data.manifest import Manifest
from lit_transfer.data.store import ShardReader
from lit_transfer.errors import UserError

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


def test_what_macos_adds_is_no_sample_and_parts_none(tmp_path: Path) -> None:
    fork = b"\0\5\x16\7" + bytes(100)
    members = [
        (".DS_Store", fork),
        ("d/._a.png", fork), ("d/a.png", picture(1)), ("d/._a.cls", fork), ("d/a.cls", b"x"),
        ("d/.DS_Store", fork), ("__MACOSX/d/._b.png", fork), ("__MACOSX/d/c.png", picture(3)),
        ("._b.png", fork), ("b.png", picture(2)), ("b.cls", b"y"),
    ]  # fmt: skip
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "._0.tar").write_bytes(fork)
    for shards in (tmp_path, tmp_path / "*.tar"):
        manifest = indexed(shards)
        assert manifest.table["key"].to_pylist() == ["d/a", "b"] and manifest.targets().tolist() == [0, 1]
    assert rejected(tmp_path) == []


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
