from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing import folder, packed, payload, table

from lit_transfer.config import Data, Stream
from lit_transfer.data import plan
from lit_transfer.data.decode import Preprocessing, decode
from lit_transfer.data.loading import DRAWS, SampleDataset, loader
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.module import ImageData
from lit_transfer.data.samplers import EvalSampler, TrainSampler
from lit_transfer.data.store import ShardReader
from lit_transfer.data.streams import Samples, check_same_labels, open_stream, open_streams
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


STEPS = 3
"""Of an epoch: 13 labelled samples, 6 at a time."""


def image_data(dataset: Manifest, steps: range = range(STEPS), **settings: Any) -> ImageData:
    streams = open_streams(Data(train=stream(dataset), val=stream(dataset, "val")), seed=0)
    return ImageData(streams, SMALL, **{"seed": 5, "global_batch": 6, "workers": 0, "steps": steps} | settings)


def epoch(number: int) -> range:
    return range(number * STEPS, (number + 1) * STEPS)


def batches(data: ImageData) -> list[dict[str, torch.Tensor]]:
    return list(data.train_dataloader())


def assert_same(some: list[dict[str, torch.Tensor]], others: list[dict[str, torch.Tensor]]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        assert all(equal(one[name], other[name]) for name in one)


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def test_batches_hold_what_the_plan_says(dataset: Manifest) -> None:
    data = image_data(dataset, epoch(2))
    samples = data.streams["train"]
    got = batches(data)
    order = plan.shuffled(samples.rows, dataset.digest, 5, 2)
    assert torch.cat([batch["row"] for batch in got]).tolist() == order.tolist()
    assert [len(batch["row"]) for batch in got] == [6, 6, 1]
    rows = got[0]["row"].tolist()
    images = np.stack([decode(payload(dataset, row), SMALL) for row in rows])
    assert got[0]["image"].dtype == torch.uint8 and np.array_equal(got[0]["image"].numpy(), images)
    assert got[0]["target"].tolist() == samples.targets[rows].tolist()
    assert got[0]["weight"].tolist() == samples.weights[rows].tolist()
    assert {int(batch["epoch"]) for batch in got} == {2} and all(batch["damaged"] == [] for batch in got)
    assert got[0]["valid"].all() and [int(batch["entries"]) for batch in got] == [6, 6, 1]
    assert np.array_equal(got[0]["uniform"].numpy(), plan.uniforms(5, 2, np.array(rows), DRAWS))


def test_a_phase_that_starts_later_goes_on_counting_epochs(dataset: Manifest) -> None:
    later, whole = batches(image_data(dataset, epoch(1), first_epoch=3)), batches(image_data(dataset, epoch(4)))
    assert_same(later, whole)
    assert not torch.equal(later[0]["row"], batches(image_data(dataset, epoch(1)))[0]["row"])


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_phase_may_go_on_from_any_step(dataset: Manifest, parts: int, ranks: int) -> None:
    samples = open_stream(stream(dataset), None, seed=0)

    def plan_of(rank: int, steps: range) -> list[plan.Batch]:
        settings: dict[str, Any] = {"seed": 5, "global_batch": 6, "parts": parts, "first_epoch": 1}
        sampler = TrainSampler(samples, steps=steps, rank=rank, ranks=ranks, **settings)
        found = list(sampler)
        assert len(found) == len(sampler) == len(steps) * parts
        return found

    whole = [plan_of(rank, range(8)) for rank in range(ranks)]
    for start in range(9):
        for rank in range(ranks):
            tail = plan_of(rank, range(start, 8))
            assert [(b.epoch, b.rows.tolist(), b.entries) for b in tail] == [
                (b.epoch, b.rows.tolist(), b.entries) for b in whole[rank][start * parts :]
            ]
    for step in range(8):
        epoch = 1 + step // STEPS
        rows = plan.step_rows(plan.shuffled(samples.rows, dataset.digest, 5, epoch), step % STEPS, 6)
        read = [whole[rank][step * parts + part] for rank in range(ranks) for part in range(parts)]
        assert [row for batch in read for row in batch.rows if row != plan.PADDING] == rows.tolist()
        assert {(batch.epoch, batch.entries) for batch in read} == {(epoch, len(rows))}


def test_entries_count_labels_and_not_samples(tmp_path: Path) -> None:
    lines = [f"{i}.png,1,{i % 2 if i % 3 else ''}," for i in range(6)] + ["6.png,0,1,1"]
    source = table(tmp_path / "source", "path,a,b,c", lines)
    settings: dict[str, Any] = {"task": "multilabel", "labels": ["a", "b", "c"], "splits": {"train": 1.0}}
    samples = open_stream(stream(packed(source, tmp_path / "packed", workers=1, **settings)), None, seed=0)
    assert samples.entries(samples.rows) == 6 + 4 + 3
    for rank in range(2):
        train = list(TrainSampler(samples, seed=0, global_batch=3, steps=range(3), parts=2, rank=rank, ranks=2))
        assert [batch.entries for batch in train[::2]] == [batch.entries for batch in train[1::2]]
        for batched in (train[::2], list(EvalSampler(samples, global_batch=3, rank=rank, ranks=2))):
            assert sum(batch.entries for batch in batched) == 13, "of the whole step, whatever the part and the rank"


def test_validation_is_cut_into_slices_of_ranks(dataset: Manifest) -> None:
    samples = open_stream(stream(dataset), None, seed=0)
    ranks = [list(EvalSampler(samples, global_batch=5, rank=rank, ranks=2)) for rank in (0, 1)]
    assert [len(batched) for batched in ranks] == [3, 3]
    read = [row for step in zip(*ranks, strict=True) for b in step for row in b.rows if row != plan.PADDING]
    assert read == samples.rows.tolist()


def test_a_batch_of_validation_is_as_large_as_a_part_of_a_step(dataset: Manifest) -> None:
    data = image_data(dataset, parts=4)
    assert {len(batch["row"]) for batch in data.eval_dataloader("train")} == {2, 1}


def test_validation_sees_each_labelled_row_once_in_order_and_draws_nothing(dataset: Manifest) -> None:
    data = image_data(dataset, global_batch=2)
    got = list(data.eval_dataloader("val"))
    assert torch.cat([batch["row"] for batch in got]).tolist() == data.streams["val"].rows.tolist()
    assert all("uniform" not in batch for batch in got)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_batches(dataset: Manifest, workers: int) -> None:
    alone, many = (image_data(dataset, range(1, 7), parts=2, workers=count) for count in (0, workers))
    assert_same(batches(alone), batches(many))


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_come_as_the_network_takes_them(dataset: Manifest, workers: int) -> None:
    for batch in batches(image_data(dataset, range(2), workers=workers)):
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)


def test_a_padded_place_repeats_a_picture_and_is_not_valid(dataset: Manifest) -> None:
    samples = open_stream(stream(dataset), None, seed=0)
    item = SampleDataset(samples, SMALL, 0)[plan.Batch(0, np.array([plan.PADDING, samples.rows[1]]))]
    assert item["valid"].tolist() == [False, True] and item["row"].tolist() == [plan.PADDING, samples.rows[1]]
    assert torch.equal(item["image"][0], item["image"][1])
    empty = SampleDataset(samples, SMALL, 0)[plan.Batch(0, np.array([plan.PADDING]))]
    assert empty["image"].shape == (1, 3, 10, 10) and not empty["valid"].any()


def test_two_ranks_together_read_what_one_reads(dataset: Manifest) -> None:
    samples = open_stream(stream(dataset), None, seed=0)
    halves = []
    for rank in (0, 1):
        sampler = TrainSampler(samples, global_batch=6, rank=rank, ranks=2, seed=5, steps=range(STEPS))
        halves.append(list(loader(SampleDataset(samples, SMALL, 5), sampler, 0)))
    for one, left, right in zip(batches(image_data(dataset)), *halves, strict=True):
        of_step = ("entries", "epoch", "damaged")
        assert all(one[name] == left[name] == right[name] for name in of_step)
        both = {name: torch.cat([left[name], right[name]]) for name in one if name not in of_step}
        assert all(torch.equal(both[name][both["valid"]], one[name]) for name in both)


def test_the_reader_gives_the_bytes_that_were_packed_also_after_a_trip_to_a_worker(dataset: Manifest) -> None:
    reader = ShardReader(dataset)
    first = reader.read(0)
    copy = pickle.loads(pickle.dumps(reader))
    for row in range(dataset.table.num_rows):
        assert reader.read(row) == payload(dataset, row) == copy.read(row)
    assert first == reader.read(0)


def test_workers_share_the_arrays_of_a_stream(dataset: Manifest) -> None:
    rows, targets = np.arange(10**6), np.arange(10**6) % 3
    rows.flags.writeable = False  # as those that are mapped
    samples = Samples(dataset, rows, targets, 7)
    assert len(samples.weights) == 20
    sent = [bytes(ForkingPickler.dumps(samples)) for _ in range(2)]
    assert max(map(len, sent)) < 10_000, "handles of the arrays, not the arrays"
    first, second = (pickle.loads(one) for one in sent)
    assert np.array_equal(first.rows, rows) and np.array_equal(first.targets, targets)
    assert first.unlabelled == 7 and first.manifest.digest == dataset.digest and len(first.weights) == 20
    first.targets[5] = 99
    assert second.targets[5] == 99 and samples.targets[5] == 2
    again = pickle.loads(pickle.dumps(second))
    assert np.array_equal(again.rows, rows) and again.targets[5] == 99


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_bytes_are_refused(tmp_path: Path, damage: str) -> None:
    manifest = packed(folder(tmp_path / "f", per_class=3), tmp_path / "p", workers=1)
    place = manifest.table.slice(2, 1).to_pylist()[0]
    shard = manifest.path / manifest.shards[place["shard"]].name
    data = bytearray(shard.read_bytes())
    data[place["offset"] + 20] ^= 1
    shard.write_bytes(data if damage == "flip" else data[: place["offset"] + 20])
    with pytest.raises(
        UserError, match=r"\(row 2\) are not those that were packed; run `lit-transfer prepare --verify`"
    ):
        ShardReader(manifest).read(2)


def test_an_address_with_credentials_is_refused_before_it_is_written_anywhere() -> None:
    for address in ("https://user:secret@host/d", "https://host/d?token=secret"):
        with pytest.raises(UserError, match="is given with credentials") as told:
            open_stream(Stream(manifest=address, split="train"), None, seed=0)
        assert "secret" not in str(told.value)
