"""A manifest reads back what was written, names what is wrong with one that does not, and has one digest."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lit_transfer.config import Stream
from lit_transfer.data.manifest import Manifest, joined_digest
from lit_transfer.data.packing.record import compute_digest, write_manifest
from lit_transfer.data.schema import FILE_NAME, LABEL_TYPES, SAMPLE_COLUMNS, Label, Shard
from lit_transfer.data.streams import open_stream
from lit_transfer.errors import UserError
from lit_transfer.reading import parse

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "manifest.py"

SHARDS = (
    Shard(name="train-000000.tar", split="train", sha256="ab" * 32, bytes=11, samples=2),
    Shard(name="test-000000.tar", split="test", sha256="cd" * 32, bytes=7, samples=1),
)
LABEL = Label(name="kind", classes=("a", "b"), display=("A", "B"))
COLOUR = Label(name="colour", classes=("red", "blue"), display=("Red", "Blue"))
RED = Label(name="red", classes=(), display=("Red",))


def rows(task: str = "multiclass", **labels: list[Any]) -> pa.Table:
    values: dict[str, list[Any]] = {
        "key": ["00000000", "00000001", "00000002"],
        "split": ["train", "train", "test"],
        "group": ["g", None, None],
        "weight": [1.0, 0.5, 1.0],
        "source": ["x/0.png", "x/1.png", "y/2.png"],
        "shard": [0, 0, 1],
        "offset": [512, 2048, 512],
        "size": [100, 200, 300],
        "hash": [bytes([i]) * 32 for i in range(3)],
        "width": [4, 5, 6],
        "height": [7, 8, 9],
    }
    columns = {name: pa.array(values[name], kind) for name, kind in SAMPLE_COLUMNS.items()}
    columns |= {f"label.{name}": pa.array(column, LABEL_TYPES[task]) for name, column in labels.items()}
    return pa.table({**columns, "meta.site": pa.array(["n", None, "s"])})


def write(folder: Path, table: pa.Table, labels: tuple[Label, ...] = (LABEL,), task: str = "multiclass") -> Path:
    folder.mkdir(exist_ok=True)
    for shard in SHARDS:
        (folder / shard.name).write_bytes(b"." * shard.bytes)
    write_manifest(folder, task=task, labels=labels, shards=SHARDS, table=table, pack={"source": "in"})
    return folder


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    table = rows(kind=[1, None, 0])
    manifest = Manifest.open(write(tmp_path / "d", table))
    assert (manifest.task, manifest.labels, manifest.shards) == ("multiclass", (LABEL,), SHARDS)
    assert (manifest.splits, manifest.pack, manifest.path) == (
        {"train": 2, "test": 1},
        {"source": "in"},
        tmp_path / "d",
    )
    assert manifest.table.to_pylist() == table.to_pylist()
    assert manifest.rows("train").tolist() == [0, 1] and manifest.rows("test").dtype == np.int64
    assert manifest.targets().tolist() == [1, -1, 0] and manifest.targets().dtype == np.int64
    assert (manifest.classes(), manifest.display()) == (("a", "b"), ("A", "B"))
    assert Manifest.open(str(tmp_path / "d")).digest == manifest.digest
    with pytest.raises(UserError, match=r"no split 'tests'; its splits are train, test. Did you mean 'test'"):
        manifest.rows("tests")
    with pytest.raises(UserError, match=r"no label 'knd'; it has kind. Did you mean 'kind'"):
        manifest.targets("knd")


def test_the_table_is_memory_mapped(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", rows(kind=[1, None, 0]))
    before = pa.total_allocated_bytes()
    manifest = Manifest.open(folder)
    assert pa.total_allocated_bytes() - before == 0 and manifest.table.num_rows == 3


def test_several_labels_must_be_named(tmp_path: Path) -> None:
    table = rows(kind=[1, None, 0], colour=[0, 0, 1])
    manifest = Manifest.open(write(tmp_path / "d", table, (LABEL, COLOUR)))
    assert manifest.targets("colour").tolist() == [0, 0, 1] and manifest.classes("colour") == ("red", "blue")
    for ask in (manifest.targets, manifest.classes, manifest.display):
        with pytest.raises(UserError, match=r"several labels \(kind, colour\); name one with data.label"):
            ask()


@pytest.mark.parametrize(("task", "value"), [("multilabel", 1), ("regression", -2.5)])
def test_targets_of_column_tasks(tmp_path: Path, task: str, value: float) -> None:
    blue = Label(name="blue", classes=(), display=("Blue",))
    table = rows(task, red=[value, None, 0], blue=[0, value, None])
    manifest = Manifest.open(write(tmp_path / "d", table, (RED, blue), task))
    expected = np.array([[value, 0], [np.nan, value], [0, np.nan]], dtype=np.float32)
    assert np.array_equal(manifest.targets(), expected, equal_nan=True) and manifest.targets().dtype == np.float32
    assert np.array_equal(manifest.targets("blue"), expected[:, 1:], equal_nan=True)
    assert manifest.classes() == ("red", "blue") and manifest.display() == ("Red", "Blue")


def test_no_labels(tmp_path: Path) -> None:
    manifest = Manifest.open(write(tmp_path / "d", rows(), (), "none"))
    with pytest.raises(UserError, match="has no labels; it can be predicted on"):
        manifest.targets()


def test_faulty_datasets_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", rows(kind=[1, None, 0]))
    with pytest.raises(
        UserError,
        match=r"'.*absent' holds no dataset \(manifest.arrow\); make one with `lit-transfer prepare`",
    ):
        Manifest.open(tmp_path / "absent")
    (folder / SHARDS[0].name).write_bytes(b"short")
    with pytest.raises(UserError, match=r"train-000000.tar' has 5 bytes, not 11; copy the dataset again"):
        Manifest.open(folder)
    (folder / SHARDS[0].name).unlink()
    with pytest.raises(UserError, match=r"train-000000.tar' is missing; copy"):
        Manifest.open(folder)
    whole = (folder / FILE_NAME).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text"):
        (folder / FILE_NAME).write_bytes(damaged)
        with pytest.raises(UserError, match="is not a readable Arrow file"):
            Manifest.open(folder)


def rewrite(folder: Path, table: pa.Table, header: Any) -> None:
    metadata = None if header is None else {b"lit_transfer": json.dumps(header).encode()}
    table = table.replace_schema_metadata(metadata)
    with (folder / FILE_NAME).open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def test_foreign_formats_and_columns(tmp_path: Path) -> None:
    table = rows(kind=[1, None, 0])
    folder = write(tmp_path / "d", table)
    header = json.loads(pa.ipc.open_file((folder / FILE_NAME).read_bytes()).schema.metadata[b"lit_transfer"])
    rewrite(folder, table, header)
    assert Manifest.open(folder).digest == header["digest"]
    rewrite(folder, table, None)
    with pytest.raises(UserError, match="was not written by lit_transfer; give a folder"):
        Manifest.open(folder)
    rewrite(folder, table, header | {"format": 2})
    with pytest.raises(UserError, match="has format 2, this version reads 1; pack the dataset anew"):
        Manifest.open(folder)
    rewrite(folder, table.drop_columns(["weight"]), header)
    with pytest.raises(UserError, match="column 'weight' is missing"):
        Manifest.open(folder)
    rewrite(folder, table.drop_columns(["label.kind"]), header)
    with pytest.raises(UserError, match=r"column 'label.kind' is missing"):
        Manifest.open(folder)
    rewrite(folder, table.append_column("extra", pa.array([1, 2, 3])), header)
    with pytest.raises(UserError, match="unknown column extra; pack"):
        Manifest.open(folder)
    for damaged in ({"format": 1}, header | {"shards": [{"name": "x"}]}, []):
        rewrite(folder, table, damaged)
        with pytest.raises(UserError, match=r"has a damaged header .*; copy the dataset again"):
            Manifest.open(folder)
    rewrite(folder, table.slice(0, 2), header)
    with pytest.raises(UserError, match="has 2 rows, but its shards hold 3 samples"):
        Manifest.open(folder)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_every_shard_has_its_histogram(tmp_path: Path, task: str) -> None:
    label = LABEL if task == "multiclass" else RED
    manifest = Manifest.open(write(tmp_path / "d", rows(task, **{label.name: [1, None, 0]}), (label,), task))
    assert manifest.class_counts().tolist() == [[0, 1, 1], [1, 0, 0]]


def test_shards_sorted_by_class_hold_fewer_classes_than_mixed_ones(tmp_path: Path) -> None:
    """Four shards of one class and one of both; of 2 samples, mixed ones would have both classes half of the time."""
    shards = [dataclasses.replace(SHARDS[0], name=f"{i}.tar", samples=2) for i in range(4)]
    shards += [dataclasses.replace(SHARDS[1], name=f"{i}.tar", samples=n) for i, n in ((4, 0), (5, 2))]
    table = pa.concat_tables([rows(kind=[0, 0, 0]), rows(kind=[0, 1, 1]), rows(kind=[1, 1, 0]), rows(kind=[1, 1, 1])])
    table = table.slice(0, 10).set_column(5, "shard", pa.array([0, 0, 1, 1, 2, 2, 3, 3, 5, 5], pa.int32()))
    for shard in shards:
        (tmp_path / shard.name).write_bytes(b"." * shard.bytes)
    write_manifest(tmp_path, task="multiclass", labels=[LABEL], shards=shards, table=table, pack={})
    found, mixed = Manifest.open(tmp_path).mixing()
    assert found == (4 * 1 + 2) / 5 and mixed == pytest.approx((4 * 1.5 + 1.5) / 5)


def test_rows_come_from_the_shards(tmp_path: Path) -> None:
    """A split may stand in stretches."""
    shards = [dataclasses.replace(SHARDS[i % 2], name=f"{i}.tar", samples=n) for i, n in enumerate((1, 1, 0, 0, 1))]
    table = rows(kind=[1, None, 0]).set_column(5, "shard", pa.array([0, 1, 4], pa.int32()))
    for shard in shards:
        (tmp_path / shard.name).write_bytes(b"." * shard.bytes)
    write_manifest(tmp_path, task="multiclass", labels=[LABEL], shards=shards, table=table, pack={})
    manifest = Manifest.open(tmp_path)
    assert (manifest.rows("train").tolist(), manifest.rows("test").tolist()) == ([0, 2], [1])


def two(tmp_path: Path, **other: Any) -> list[str]:
    """Two datasets, the second with other metadata and what is asked for."""
    given: dict[str, Any] = {"table": rows(kind=[0, 0, 1]), "labels": (LABEL,), "task": "multiclass"} | other
    table = given.pop("table")
    table = table.rename_columns([name.replace("meta.site", "meta.place") for name in table.column_names])
    return [str(write(tmp_path / "a", rows(kind=[1, None, 0]))), str(write(tmp_path / "b", table, **given))]


def test_several_manifests_are_one_dataset(tmp_path: Path) -> None:
    places = two(tmp_path)
    parts, both = [Manifest.open(place) for place in places], Manifest.open(places)
    assert both.targets().tolist() == [1, -1, 0, 0, 0, 1] and both.splits == {"train": 4, "test": 2}
    assert both.rows("train").tolist() == [0, 1, 3, 4] and both.rows("test").tolist() == [2, 5]
    assert both.table["shard"].to_pylist() == [0, 0, 1, 2, 2, 3] and both.table["key"][0] == both.table["key"][3]
    assert [both.shard_address(i) for i in range(4)] == [p.shard_address(i) for p in parts for i in range(2)]
    assert both.shard_address(2) == str(tmp_path / "b" / SHARDS[0].name)
    assert both.class_counts().tolist() == [[0, 1, 1], [1, 0, 0], [2, 0, 0], [0, 1, 0]]
    assert both.table["meta.place"].to_pylist() == [None, None, None, "n", None, "s"]
    assert both.digest == joined_digest([part.digest for part in parts]) != Manifest.open(places[::-1]).digest
    assert Manifest.open(places[:1]).digest == parts[0].digest
    assert both.name == f"{places[0]} + {places[1]}"
    (tmp_path / "b" / SHARDS[0].name).unlink()
    with pytest.raises(UserError, match=r"b/train-000000.tar' is missing"):
        Manifest.open(places)


def test_the_digest_of_several_is_pinned() -> None:
    assert joined_digest(["ab" * 32, "cd" * 32]) == "199e1de14427ab5a8184f06c95a213c0d87597bf587d47b8880ff7d4e0db779f"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"task": "ordinal"}, "the tasks multiclass and ordinal differ"),
        (
            {"table": rows(colour=[0, 0, 1]), "labels": (COLOUR,)},
            r"the label columns \['kind'\] and \['colour'\]",
        ),
        (
            {"labels": (dataclasses.replace(LABEL, classes=("b", "a")),)},
            r"the classes of 'kind', \['a', 'b'\] and",
        ),
    ],
)
def test_manifests_that_do_not_go_together(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"a' and .*b' cannot be one dataset: {message}"):
        Manifest.open(two(tmp_path, **other))


def test_a_worker_maps_the_same_file(tmp_path: Path) -> None:
    """Pickled it is small, however many rows it has, and it is the same dataset or none."""
    places = two(tmp_path)
    both = Manifest.open(places)
    data = pickle.dumps(both)
    again = pickle.loads(data)
    assert len(data) < 500 and again.digest == both.digest and again.table.equals(both.table)
    write(tmp_path / "b", rows(kind=[1, 1, 1]))
    with pytest.raises(UserError, match="was replaced while it was in use"):
        pickle.loads(data)


def test_a_stream_may_have_several_manifests(tmp_path: Path) -> None:
    config = parse(Stream, {"manifest": two(tmp_path), "split": "train"})
    samples = open_stream(config, None, 0)
    assert samples.rows.tolist() == [0, 3, 4] and samples.unlabelled == 1
    assert samples.weights.tolist() == [1.0, 0.5, 1.0, 1.0, 0.5, 1.0]


def test_many_samples_open_at_once(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In a fresh process, within 2 s and 500 MB, without touching the rows."""
    samples = 10**7 if request.config.getoption("--full") else 10**6
    for step in ("--make", "--measure"):
        command = [sys.executable, str(BENCHMARK), step, str(tmp_path / "d"), "--samples", str(samples)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["open_mb"] < 500 and figures["open_s"] < 2
    assert figures["open_mb"] - figures["start_mb"] < 40, "a row has 118 bytes in the file"


def test_digest_is_pinned_and_covers_what_it_says() -> None:
    table = rows(kind=[1, None, 0])

    def digest(
        table: pa.Table = table, task: str = "multiclass", label: Label = LABEL, shard: Shard = SHARDS[0]
    ) -> str:
        return compute_digest(table, task, [label], [shard, SHARDS[1]])

    # Pinned: checkpoints and stores hold it; another value means another format number.
    assert digest() == "853939ea9277b706c2f095c9190414c85b5c34fba0f8eba75d7055b6f8075b7c"
    changed = {
        digest(),
        digest(task="ordinal"),
        digest(label=dataclasses.replace(LABEL, classes=("b", "a"))),
        digest(shard=dataclasses.replace(SHARDS[0], sha256="00" * 32)),
        digest(rows(kind=[1, 1, 0])),
        digest(table.take([1, 0, 2])),
        *(
            digest(table.set_column(table.column_names.index(name), name, pa.array(values, SAMPLE_COLUMNS[name])))
            for name, values in {
                "key": ["a", "b", "c"],
                "hash": [b"x" * 32] * 3,
                "split": ["train"] * 3,
                "group": [None] * 3,
                "weight": [1.0] * 3,
            }.items()
        ),
    }
    assert len(changed) == 11
    assert digest(label=dataclasses.replace(LABEL, display=("x", "y"))) == digest()
    assert digest(table.drop_columns(["meta.site"])) == digest()


def test_straddling_counts_values_in_several_splits(tmp_path: Path) -> None:
    table = rows(kind=[1, None, 0])
    table = table.set_column(2, "group", pa.array(["g", "h", "g"]))
    manifest = Manifest.open(write(tmp_path / "d", table))
    assert (manifest.straddling("group"), manifest.straddling("hash")) == (1, 0)
