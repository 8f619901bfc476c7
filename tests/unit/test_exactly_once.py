"""Every sample once an epoch: any ranks, workers and start method, any shards, any order; ranks end together."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import sample, write_tar
from numpy.typing import NDArray
from packing import damage, payload
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_transfer.config import Order, Stream
from lit_transfer.data import loading, plan
from lit_transfer.data.decode import Preprocessing, decode
from lit_transfer.data.loading import DRAWS, SampleDataset
from lit_transfer.data.order import class_weights
from lit_transfer.data.packing.index import Index, index
from lit_transfer.data.samplers import EvalSampler, TrainSampler
from lit_transfer.data.streams import Samples, open_stream

SMALL = Preprocessing(size=8, canvas=10, fit="crop", interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
SEED, EPOCHS = 5, 2
LAYOUTS = {  # samples of each shard, in the order of the manifest; "val" ones stand between
    "uneven": [("train", 7), ("val", 2), ("train", 1), ("train", 11), ("train", 0), ("train", 4)],
    "one each": [("train", 1), ("val", 1), ("train", 1), ("val", 1), ("train", 1), ("val", 1), ("train", 1)],
    "empty first and last": [("train", 0), ("val", 3), ("train", 5), ("train", 0), ("train", 6), ("train", 0)],
    "a single sample": [("val", 3), ("train", 0), ("train", 1), ("val", 2)],
}
ORDERS = {
    "full": Order(),
    "drop": Order(last_batch="drop"),
    "blocks": Order(block_shards=1),
    "partitions": Order(partitions=4),
    "blocks and partitions": Order(block_shards=2, partitions=2),
    "balanced": Order(balance="classes", block_shards=2),
}


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Samples]:
    """The split `train` of each layout; one in six has no label, and the third labelled of `uneven` is damaged."""
    streams = {name: made(tmp_path_factory.mktemp("layout"), shards) for name, shards in LAYOUTS.items()}
    damage(streams["uneven"].manifest, int(streams["uneven"].rows[2]))
    return streams


def made(folder: Path, shards: Sequence[tuple[str, int]]) -> Samples:
    """The split `train` of shards of so many samples each."""
    numbers = itertools.count()
    for i, (split, count) in enumerate(shards):
        held = itertools.islice(numbers, count)
        members = [sample(f"{n:03d}", n, None if n % 6 == 5 else "aab"[n % 3]) for n in held]
        write_tar(folder / f"{i}-{split}.tar", [*itertools.chain(*members)])
    splits = {"train": "*-train.tar", "val": "*-val.tar"}
    manifest = index(Index(index=[str(folder)], classes=["a", "b"], splits=splits, workers=1)).manifest
    return open_stream(Stream(manifest=str(manifest.path), split="train"), None, seed=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stream_has_the_labelled_samples_of_its_shards(streams: dict[str, Samples], layout: str) -> None:
    splits = [split for split, count in LAYOUTS[layout] for _ in range(count)]
    expected = [f"{n:03d}" for n, split in enumerate(splits) if split == "train" and n % 6 != 5]
    assert keys(streams[layout], streams[layout].rows.tolist()) == expected


def training(samples: Samples, order: Order, batch: int, parts: int, ranks: int) -> list[TrainSampler]:
    """The samplers of all ranks for some epochs."""
    steps = range(EPOCHS * plan.steps_per_epoch(len(samples.rows), batch, order.last_batch))
    fixed: dict[str, Any] = {"seed": SEED, "global_batch": batch, "parts": parts, "ranks": ranks}
    return [TrainSampler(samples, order=order, steps=steps, rank=rank, **fixed) for rank in range(ranks)]


def in_step(samplers: Sequence[Sampler[plan.Batch]]) -> list[tuple[plan.Batch, ...]]:
    """What all ranks read, side by side; an error where one of them ends before another, or has fewer rows."""
    steps = list(zip(*samplers, strict=True))
    assert all(len({len(batch.rows) for batch in step}) == 1 for step in steps)
    return steps


def real(rows: NDArray[np.int64]) -> list[int]:
    return [int(row) for row in rows if row != plan.PADDING]


def assert_seen(samples: Samples, order: Order, batch: int, seen: Sequence[int]) -> None:
    """An epoch has each sample once; balanced its expected number of times; without a last batch at most once."""
    rows = samples.rows
    counts = Counter(seen)
    assert set(counts) <= set(rows.tolist())
    if order.balance == "classes":
        weights = class_weights(samples.targets[rows])
        share = weights * len(rows) / weights.sum()
        found = np.array([counts[row] for row in rows.tolist()])
        assert len(seen) == len(rows) and np.all(np.abs(found - share) < 1)
    elif order.last_batch == "drop":
        assert len(seen) == len(rows) // batch * batch and set(counts.values()) <= {1}
    else:
        assert counts == Counter(rows.tolist())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_samplers_of_all_ranks_train_on_each_sample_once(
    streams: dict[str, Samples], layout: str, order: str
) -> None:
    samples, settings = streams[layout], ORDERS[order]
    for batch, parts in itertools.product([4, 8, 64], [1, 3]):
        alone = None
        for ranks in (1, 2, 3, 4):
            epochs: dict[int, list[int]] = {epoch: [] for epoch in range(EPOCHS)}
            steps = in_step(training(samples, settings, batch, parts, ranks))
            for number in range(0, len(steps), parts):
                of_step = steps[number : number + parts]
                seen = [row for of_rank in zip(*of_step, strict=True) for one in of_rank for row in real(one.rows)]
                epoch = of_step[0][0].epoch
                # The loss of a step is divided by its entries: here one a sample.
                assert {(one.epoch, one.entries) for part in of_step for one in part} == {(epoch, len(seen))}
                epochs[epoch] += seen
            for seen in epochs.values():
                assert_seen(samples, settings, batch, seen)
            alone = alone or epochs
            assert epochs == alone, "in the order of one rank"
        assert alone is not None and (len(samples.rows) < 8 or alone[0] != alone[1] or batch > len(samples.rows))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_samplers_of_all_ranks_evaluate_each_sample_once_in_order(streams: dict[str, Samples], layout: str) -> None:
    samples = streams[layout]
    for batch, ranks in itertools.product([1, 3, 8, 64], [1, 2, 3, 4]):
        samplers = [EvalSampler(samples, global_batch=batch, rank=rank, ranks=ranks) for rank in range(ranks)]
        steps = in_step(samplers)
        assert {len(sampler) for sampler in samplers} == {len(steps)}
        assert [row for step in steps for one in step for row in real(one.rows)] == samples.rows.tolist()
        assert all(sum(len(real(one.rows)) for one in step) == step[0].entries for step in steps)


Item = dict[str, Any]
CASES = [("forkserver", 0), *itertools.product(["fork", "spawn", "forkserver"], [1, 2])]


class Asked(Dataset[Item]):
    """Batches of several datasets, so that workers are started once for many checks."""

    def __init__(self, datasets: dict[tuple[str, bool], SampleDataset]) -> None:
        self.datasets = datasets

    def __getitem__(self, asked: tuple[tuple[str, bool], plan.Batch]) -> Item:
        which, batch = asked
        return self.datasets[which][batch]


def samplers_of(samples: Samples, trains: bool, ranks: int) -> Sequence[Sampler[plan.Batch]]:
    if trains:
        return training(samples, Order(block_shards=1, partitions=2), 4, 1, ranks)
    return [EvalSampler(samples, global_batch=4, rank=rank, ranks=ranks) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("method", "workers"), [pytest.param(*case, marks=pytest.mark.full(case[0], bool(case[1]))) for case in CASES]
)
def test_loaders_decode_each_sample_once(
    streams: dict[str, Samples], method: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method != "forkserver":
        monkeypatch.setattr(loading, "_forkserver", lambda: multiprocessing.get_context(method))
    kinds = [*itertools.product(streams, [True, False])]
    datasets = {(name, trains): SampleDataset(streams[name], SMALL, SEED if trains else None) for name, trains in kinds}
    places = [(kind, ranks, rank) for kind in kinds for ranks in (1, 2, 3, 4) for rank in range(ranks)]
    read = {place: [*samplers_of(streams[place[0][0]], place[0][1], place[1])[place[2]]] for place in places}
    asked = [(place[0], batch) for place in places for batch in read[place]]
    loaded: DataLoader[Item] = loading.loader(Asked(datasets), asked, workers)  # type: ignore[arg-type]
    started = loaded.multiprocessing_context.get_start_method() if loaded.multiprocessing_context else "none"
    assert started == (method if workers else "none")
    items = iter(loaded)
    for kind, ranks in itertools.product(kinds, (1, 2, 3, 4)):
        of_ranks = [[next(items) for _ in read[kind, ranks, rank]] for rank in range(ranks)]
        steps = [*zip(*of_ranks, strict=True)]
        (assert_trained if kind[1] else assert_evaluated)(streams[kind[0]], kind[0] == "uneven", steps)
    assert next(items, None) is None


def assert_trained(samples: Samples, damaged: bool, steps: Sequence[Sequence[Item]]) -> None:
    """Each epoch has every sample, with the random numbers of its own; a damaged one has another's picture."""
    bad = [int(samples.rows[2])] if damaged else []
    for epoch in range(EPOCHS):
        of_epoch = [item for step in steps for item in step if int(item["epoch"]) == epoch]
        rows = masked(of_epoch, "row").tolist()
        assert sorted(rows) == samples.rows.tolist()
        assert [d["key"] for item in of_epoch for d in item["damaged"]] == keys(samples, bad)
        used = [
            plan.substitute(samples.rows, row, samples.manifest.digest, SEED, epoch, 1) if row in bad else row
            for row in rows
        ]
        assert torch.equal(masked(of_epoch, "image"), pictures(samples, used))
        assert masked(of_epoch, "target").tolist() == samples.targets[used].tolist()
        uniform = plan.uniforms(SEED, epoch, np.array(rows), DRAWS)
        assert np.array_equal(masked(of_epoch, "uniform").numpy(), uniform)
    assert_steps(steps, 0)


def assert_evaluated(samples: Samples, damaged: bool, steps: Sequence[Sequence[Item]]) -> None:
    """Every sample but the damaged ones, which are told of, in the order of the manifest."""
    bad = [int(samples.rows[2])] if damaged else []
    items = [item for step in steps for item in step]
    rows = masked(items, "row").tolist()
    assert rows == [row for row in samples.rows if row not in bad]
    assert [d["key"] for item in items for d in item["damaged"]] == keys(samples, bad)
    assert torch.equal(masked(items, "image"), pictures(samples, rows))
    assert masked(items, "target").tolist() == samples.targets[rows].tolist()
    assert_steps(steps, len(bad))


def assert_steps(steps: Sequence[Sequence[Item]], left_out: int) -> None:
    """In each step ranks have as many rows; those that count are its entries, less what is `left_out` of all steps."""
    for step in steps:
        assert len({(item["image"].shape, int(item["entries"])) for item in step}) == 1
        assert all(torch.equal(item["valid"], item["row"] != plan.PADDING) for item in step)
    missing = [int(step[0]["entries"]) - sum(int(item["valid"].sum()) for item in step) for step in steps]
    assert min(missing) >= 0 and sum(missing) == left_out


def masked(items: Sequence[Item], name: str) -> torch.Tensor:
    """What counts, of all items."""
    return torch.cat([item[name][item["valid"]] for item in items])


def pictures(samples: Samples, rows: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.stack([decode(payload(samples.manifest, row), SMALL) for row in rows]))


def stand_in(samples: Samples, row: int, epoch: int) -> int:
    return plan.substitute(samples.rows, row, samples.manifest.digest, SEED, epoch, 1)


def keys(samples: Samples, rows: Sequence[int]) -> list[str]:
    return [samples.manifest.table["key"][row].as_py() for row in rows]
