"""Whatever is changed in a dataset is found, and said by shard and member."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from foreign import cut, flip, headers, shard
from packing import folder, packed

from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.index import Index, index
from lit_transfer.data.packing.record import write_manifest
from lit_transfer.data.packing.verify import Verify, verify
from lit_transfer.launch.prepare import main

FIRST, SECOND = "train-000000.tar", "train-000001.tar"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 samples in 3 shards of train and one of test."""
    root = tmp_path_factory.mktemp("sound")
    splits = {"train": 0.8, "test": 0.2}
    return packed(folder(root / "in", per_class=10), root / "out", shard_bytes=3000, splits=splits, workers=1).path


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "d"))


def faults(dataset: Path) -> list[tuple[str, str, str]]:
    return [(fault.shard, fault.member, fault.wrong) for fault in verify(Verify(verify=str(dataset), workers=1)).faults]


def member(dataset: Path, name: str, place: int) -> tuple[str, int]:
    """Name and header of a picture of a shard."""
    found = {key: start for key, start in headers(dataset / name).items() if key.endswith(".png")}
    return list(found.items())[place]


def test_a_sound_dataset_passes(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(Manifest.open(dataset).shards) >= 4
    assert main(["--verify", str(dataset), "--workers", "2"]) == 0
    said = capsys.readouterr()
    assert "is what its manifest says" in said.out and Manifest.open(dataset).digest in said.out and "B/s" in said.err


def test_a_flipped_bit_of_a_picture(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, start = member(dataset, SECOND, 2)
    flip(dataset / SECOND, start + 512 + 30)
    (whole, one) = faults(dataset)
    assert whole[:2] == (SECOND, "") and "its sha256 is" in whole[2]
    assert one[:2] == (SECOND, name) and "are not those that were recorded" in one[2]
    assert main(["--verify", str(dataset)]) == 1
    said = capsys.readouterr().out
    assert name in said and SECOND in said and FIRST not in said and "is not what its manifest says" in said


def test_a_flipped_bit_of_a_label_shows_in_the_whole(dataset: Path) -> None:
    label = next(start for name, start in headers(dataset / FIRST).items() if name.endswith(".cls"))
    flip(dataset / FIRST, label + 512)
    assert [fault[:2] for fault in faults(dataset)] == [(FIRST, "")]


def test_a_flipped_bit_of_a_header(dataset: Path) -> None:
    """The other pictures are still checked, by their places."""
    _, start = member(dataset, FIRST, 1)
    name, later = member(dataset, FIRST, 3)
    flip(dataset / FIRST, start + 5)
    flip(dataset / FIRST, later + 512 + 30)
    found = faults(dataset)
    assert any(f"no sound header at byte {start}" in wrong for _, _, wrong in found)
    assert [who for _, who, wrong in found if "not those that were recorded" in wrong] == [name.removesuffix(".png")]


@pytest.mark.parametrize("inside", [False, True])
def test_a_truncated_shard(dataset: Path, inside: bool) -> None:
    name, start = member(dataset, SECOND, 2)
    count = len([key for key in headers(dataset / SECOND) if key.endswith(".png")])
    cut(dataset / SECOND, start + 600 * inside)
    found = faults(dataset)
    assert {fault[0] for fault in found} == {SECOND}
    assert any(f"has {start + 600 * inside} bytes, not" in wrong for _, _, wrong in found)
    assert any("cut off" in wrong for _, who, wrong in found if who == "")
    gone = [who for _, who, wrong in found if "is cut off:" in wrong]
    assert len(gone) == count - 2 and gone[0] == (name if inside else name.removesuffix(".png"))


def test_two_shards_swapped(dataset: Path) -> None:
    (dataset / FIRST).rename(dataset / "x")
    (dataset / SECOND).rename(dataset / FIRST)
    (dataset / "x").rename(dataset / SECOND)
    assert [fault[:2] for fault in faults(dataset)] == [(FIRST, ""), (SECOND, "")]
    for fault, other in zip(faults(dataset), (SECOND, FIRST), strict=True):
        assert f"holds what '{other}' should hold" in fault[2]


def test_a_missing_and_an_extra_shard(dataset: Path) -> None:
    (dataset / FIRST).rename(dataset / "other.tar")
    found = faults(dataset)
    assert ("other.tar", "", "is not in the manifest") in found
    assert any(fault[0] == FIRST and "cannot be read" in fault[2] for fault in found) and len(found) == 2


def test_appended_bytes(dataset: Path) -> None:
    with (dataset / FIRST).open("ab") as file:
        file.write(b"more")
    assert any("bytes follow the end-of-archive mark" in fault[2] for fault in faults(dataset))


def change_group(table: pa.Table) -> pa.Table:
    return table.set_column(2, "group", pa.array(["g"] * table.num_rows))


def change_label(table: pa.Table) -> pa.Table:
    return table.set_column(
        table.column_names.index("label.label"), "label.label", pa.nulls(table.num_rows, pa.int32())
    )


def change_order(table: pa.Table) -> pa.Table:
    return table.take(list(reversed(range(table.num_rows))))


def change_split(table: pa.Table) -> pa.Table:
    return table.set_column(1, "split", pa.array(["test"] * table.num_rows))


def change_key(table: pa.Table) -> pa.Table:
    return table.set_column(0, "key", pa.array(["x", *table["key"].to_pylist()[1:]]))


def change_offset(table: pa.Table) -> pa.Table:
    place = table.column_names.index("offset")
    return table.set_column(place, "offset", pa.array([512 + 1, *table["offset"].to_pylist()[1:]]))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_group, "its digest is"),
        (change_label, "its digest is"),
        (change_order, "its rows do not stand in the order of the shards"),
        (change_split, "splits are"),
        (change_key, "its key is not 'x'"),
        (change_offset, "no member begins at byte 513"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_changed_manifest(dataset: Path, change: Callable[[pa.Table], pa.Table], expected: str) -> None:
    """Its header stays; the table is another."""
    file = dataset / "manifest.arrow"
    with pa.memory_map(str(file)) as mapped:
        table = pa.ipc.open_file(mapped).read_all()
    changed = change(table).cast(table.schema)
    with pa.OSFile(str(file) + "2", "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(changed)
    (dataset / "manifest.arrow2").rename(file)
    assert any(expected in fault[2] for fault in faults(dataset)), faults(dataset)


def test_a_rewritten_member_of_another_size(dataset: Path) -> None:
    manifest = Manifest.open(dataset)
    sizes = [manifest.table["size"][0].as_py() + 512, *manifest.table["size"].to_pylist()[1:]]
    table = manifest.table.set_column(manifest.table.column_names.index("size"), "size", pa.array(sizes))
    write_manifest(
        dataset, task=manifest.task, labels=manifest.labels, shards=manifest.shards, table=table, pack=manifest.pack
    )
    (fault,) = faults(dataset)
    assert f"has {sizes[0] - 512} bytes, not {sizes[0]}" in fault[2]


def test_many_faults_of_a_shard_are_counted(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", [f"k{i:02d}" for i in range(30)])
    index(Index(index=[str(path)]))
    for start in headers(path).values():
        flip(path, start + 512)
    found = faults(tmp_path)
    assert len(found) == 12 and found[-1] == ("0.tar", "", "and 20 more like these")


def test_shards_of_others_may_have_neighbours(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", ["a", "b"])
    index(Index(index=[str(path)]))
    shard(tmp_path / "1.tar", ["c"])
    assert faults(tmp_path) == []


def test_no_manifest_is_a_fault_of_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_transfer.launch import run

    assert run(main, ["--verify", str(tmp_path)]) == 2
    assert "holds no dataset" in capsys.readouterr().err
