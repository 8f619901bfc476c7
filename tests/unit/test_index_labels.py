"""Labels of shards that others wrote: members, fields, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from foreign import by_shard_writer, indexed, picture, write_tar

from lit_transfer.errors import UserError


@pytest.fixture
def written(tmp_path: Path) -> list[Path]:
    return by_shard_writer(tmp_path)


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
