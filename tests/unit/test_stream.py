from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing import folder, packed, payload, table

from lit_transfer.config import Data, Stream
from lit_transfer.data import plan
from lit_transfer.data.decode import Preprocessing, decode
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.module import (
    DRAWS,
    ImageData,
    PlanSampler,
    SampleDataset,
    check_same_labels,
    loader,
    open_stream,
    open_streams,
)
from lit_transfer.data.store import ShardReader
from lit_transfer.errors import UserError

SMALL = Preprocessing(
    size=8, canvas=10, fit="crop", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """20 pictures in two classes; a weight each, and every fifth without a label."""
    root = tmp_path_factory.mktemp("stream")
    lines = [f"{i}.png,{'' if i % 5 == 4 else 'ab'[i % 2]},{'train' if i < 16 else 'val'},{1 + i}" for i in range(20)]
    source = table(root / "source", "path,label,split,weight", lines)
    return packed(source, root / "packed", workers=1)


def stream(manifest: Manifest, split: str = "train", fraction: float = 1.0) -> Stream:
    return Stream(manifest=str(manifest.path), split=split, fraction=fraction)


def test_a_stream_holds_the_labelled_rows_of_its_split(dataset: Manifest) -> None:
    samples = open_stream(stream(dataset), None, seed=0)
    assert samples.unlabelled == 3 and len(samples.rows) == 13
    assert np.array_equal(samples.rows, np.sort(samples.rows))
    sources = dataset.table["source"].to_pylist()
    numbers = [int(Path(sources[row]).stem) for row in samples.rows]
    assert sorted(numbers) == [i for i in range(16) if i % 5 != 4]
    assert samples.labels.tolist() == [i % 2 for i in numbers]
    assert samples.weights[samples.rows].tolist() == [1 + i for i in numbers]


def test_a_fraction_is_a_fixed_part_of_any_larger_one(dataset: Manifest) -> None:
    parts = [set(open_stream(stream(dataset, fraction=f), None, seed=3).rows) for f in (0.01, 0.25, 0.5, 1)]
    assert [len(part) for part in parts] == [1, 3, 6, 13]
    assert parts[0] < parts[1] < parts[2] < parts[3]
    others = {tuple(open_stream(stream(dataset, fraction=0.5), None, seed=s).rows) for s in range(5)}
    assert len(others) > 1


def test_a_missing_split_or_label_column_says_so(dataset: Manifest) -> None:
    with pytest.raises(UserError, match="train"):
        open_stream(stream(dataset, "trian"), None, seed=0)
    with pytest.raises(UserError, match=r"'labl' is not a label column of .*; it has label\. Did you mean 'label'"):
        open_stream(stream(dataset), "labl", seed=0)
    with pytest.raises(UserError, match="lit-transfer prepare"):
        open_stream(Stream(manifest=str(dataset.path.parent / "none"), split="train"), None, seed=0)


def test_a_dataset_without_labels_says_so(tmp_path: Path) -> None:
    bare = packed(table(tmp_path / "source", "path", ["a.png", "b.png"]), tmp_path / "bare", splits={"train": 1.0})
    for label in (None, "label"):
        with pytest.raises(UserError, match="has no labels; training and evaluation need a labelled dataset"):
            open_stream(stream(bare), label, seed=0)


def test_streams_must_have_the_same_classes(dataset: Manifest, tmp_path: Path) -> None:
    other = packed(folder(tmp_path / "folder", ("a", "c"), 3), tmp_path / "other", splits={"val": 1.0}, workers=1)
    with pytest.raises(UserError, match=r"data\.val and data\.train .* missing \['b'\], extra \['c'\]"):
        open_streams(Data(train=stream(dataset), val=stream(other, "val")), seed=0)
    rows = [f"{i}.png,{i}.5" for i in range(4)]
    numbers = packed(
        table(tmp_path / "n", "path,label", rows),
        tmp_path / "numbers",
        task="regression",
        splits={"val": 1.0},
    )
    with pytest.raises(UserError, match=r"regression dataset but .* is multiclass"):
        check_same_labels("data.val", numbers, None, "data.train", "multiclass", dataset.classes())


def batches(data: ImageData, epoch: int = 0) -> list[dict[str, torch.Tensor]]:
    batched = data.train_dataloader()
    assert isinstance(batched.sampler, PlanSampler)
    batched.sampler.set_epoch(epoch)
    return list(batched)


def image_data(dataset: Manifest, **settings: Any) -> ImageData:
    streams = open_streams(Data(train=stream(dataset), val=stream(dataset, "val")), seed=0)
    return ImageData(streams, SMALL, **{"seed": 5, "global_batch": 6, "first_epoch": 0, "workers": 0} | settings)


def test_batches_hold_what_the_plan_says(dataset: Manifest) -> None:
    data = image_data(dataset)
    samples = data.streams["train"]
    got = batches(data, epoch=2)
    order = plan.shuffled(samples.rows, dataset.digest, 5, 2)
    assert torch.cat([batch["row"] for batch in got]).tolist() == order.tolist()
    assert [len(batch["row"]) for batch in got] == [6, 6, 1]
    rows = got[0]["row"].tolist()
    images = np.stack([decode(payload(dataset, row), SMALL) for row in rows])
    assert got[0]["image"].dtype == torch.uint8 and np.array_equal(got[0]["image"].numpy(), images)
    assert got[0]["target"].tolist() == samples.targets[rows].tolist()
    assert got[0]["weight"].tolist() == samples.weights[rows].tolist()
    assert got[0]["valid"].all()
    assert np.array_equal(got[0]["uniform"].numpy(), plan.uniforms(5, 2, np.array(rows), DRAWS))


def test_a_phase_that_starts_later_goes_on_counting_epochs(dataset: Manifest) -> None:
    later, whole = batches(image_data(dataset, first_epoch=3), epoch=1), batches(image_data(dataset), epoch=4)
    assert all(torch.equal(a["row"], b["row"]) for a, b in zip(later, whole, strict=True))
    assert all(torch.equal(a["uniform"], b["uniform"]) for a, b in zip(later, whole, strict=True))
    assert not torch.equal(later[0]["row"], batches(image_data(dataset), epoch=1)[0]["row"])


def test_validation_sees_each_labelled_row_once_in_order_and_draws_nothing(dataset: Manifest) -> None:
    data = image_data(dataset, global_batch=2)
    got = list(data.eval_dataloader("val"))
    assert torch.cat([batch["row"] for batch in got]).tolist() == data.streams["val"].rows.tolist()
    assert all("uniform" not in batch for batch in got)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_batches(dataset: Manifest, workers: int) -> None:
    alone, many = image_data(dataset), image_data(dataset, workers=workers)
    batched = many.train_dataloader()
    assert isinstance(batched.sampler, PlanSampler)
    for epoch in (0, 1):  # the same workers serve both
        batched.sampler.set_epoch(epoch)
        for ours, theirs in zip(batches(alone, epoch), batched, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_padded_place_repeats_a_picture_and_is_not_valid(dataset: Manifest) -> None:
    samples = open_stream(stream(dataset), None, seed=0)
    item = SampleDataset(samples, SMALL, 0)[plan.Batch(0, np.array([plan.PADDING, samples.rows[1]]))]
    assert item["valid"].tolist() == [False, True] and item["row"].tolist() == [plan.PADDING, samples.rows[1]]
    assert torch.equal(item["image"][0], item["image"][1])
    empty = SampleDataset(samples, SMALL, 0)[plan.Batch(0, np.array([plan.PADDING]))]
    assert empty["image"].shape == (1, 3, 10, 10) and not empty["valid"].any()


def test_two_ranks_together_read_what_one_reads(dataset: Manifest) -> None:
    samples = open_stream(stream(dataset), None, seed=0)
    parts = []
    for rank in (0, 1):
        sampler = PlanSampler(samples, global_batch=6, rank=rank, ranks=2, seed=5)
        assert len(sampler) == 3
        parts.append(list(loader(SampleDataset(samples, SMALL, 5), sampler, 0)))
    whole = batches(image_data(dataset))
    for one, left, right in zip(whole, *parts, strict=True):
        both = {name: torch.cat([left[name], right[name]]) for name in one}
        assert all(torch.equal(both[name][both["valid"]], one[name]) for name in one)


def test_the_reader_gives_the_bytes_that_were_packed_also_after_a_trip_to_a_worker(dataset: Manifest) -> None:
    reader = ShardReader(dataset)
    first = reader.read(0)
    copy = pickle.loads(pickle.dumps(reader))
    for row in range(dataset.table.num_rows):
        assert reader.read(row) == payload(dataset, row) == copy.read(row)
    assert first == reader.read(0)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_bytes_are_refused(tmp_path: Path, damage: str) -> None:
    manifest = packed(folder(tmp_path / "f", per_class=3), tmp_path / "p", workers=1)
    place = manifest.table.slice(2, 1).to_pylist()[0]
    shard = manifest.path / manifest.shards[place["shard"]].name
    data = bytearray(shard.read_bytes())
    data[place["offset"] + 20] ^= 1
    shard.write_bytes(data if damage == "flip" else data[: place["offset"] + 20])
    with pytest.raises(UserError, match=r"\(row 2\) are not those that were packed.*run lit-transfer prepare again"):
        ShardReader(manifest).read(2)
