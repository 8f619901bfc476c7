"""A manifest reads back what was written, names what is wrong with one that does not, and has one digest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lit_transfer.data.manifest import (
    FILE_NAME,
    LABEL_TYPES,
    SAMPLE_COLUMNS,
    Label,
    Manifest,
    Shard,
    compute_digest,
    write_manifest,
)
from lit_transfer.errors import UserError

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


def rewrite(folder: Path, table: pa.Table, header: dict[str, Any] | None) -> None:
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
