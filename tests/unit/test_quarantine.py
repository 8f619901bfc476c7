from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import digits
from packing import damage

from lit_transfer.config import Data, Order, Stream
from lit_transfer.data import plan
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.quarantine import Quarantine
from lit_transfer.data.samplers import TrainSampler
from lit_transfer.data.streams import Samples, open_streams
from lit_transfer.errors import UserError

SMALL = Preprocessing(size=8, canvas=8, fit="crop", interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    """A stream of 24 samples, the third of which is damaged."""
    manifest = digits(tmp_path / "digits")
    stream = Stream(manifest=str(manifest.path), split="train")
    opened = open_streams(Data(train=stream), seed=0)["train"]
    damage(opened.manifest, int(opened.rows[2]))
    return opened


def rows_of(samples: Samples, ranks: int, **settings: Any) -> tuple[list[int], list[dict[str, Any]]]:
    """Targets of an epoch in the order of the plan, and what was found damaged."""
    targets, found = [], []
    samplers = [
        iter(TrainSampler(samples, seed=1, global_batch=8, steps=range(3), rank=rank, ranks=ranks, **settings))
        for rank in range(ranks)
    ]
    dataset = SampleDataset(samples, SMALL, 1)
    for batches in zip(*samplers, strict=True):
        for item in (dataset[batch] for batch in batches):
            targets += item["target"][item["valid"]].tolist()
            found += item["damaged"]
    return targets, found


def test_a_damaged_sample_is_replaced_by_the_same_other_one_on_any_ranks(samples: Samples) -> None:
    row = int(samples.rows[2])
    one, found = rows_of(samples, 1)
    assert len(one) == 24, "no epoch is shorter"
    assert [entry["key"] for entry in found] == [samples.manifest.table["key"][row].as_py()]
    assert "not those that were packed" in found[0]["reason"]
    assert found[0]["address"].endswith(".tar") and found[0]["offset"] > 0
    for ranks in (2, 3):
        assert rows_of(samples, ranks) == (one, found)
    stand_in = plan.substitute(samples.rows, row, samples.manifest.digest, 1, 0, 1)
    order = TrainSampler(samples, seed=1, global_batch=8, steps=range(3)).epoch_rows(0)
    assert one[order.tolist().index(row)] == samples.targets[stand_in]
    digest = samples.manifest.digest
    assert {plan.substitute(samples.rows, row, digest, 1, epoch, 1) for epoch in range(9)} != {stand_in}


def test_a_stand_in_keeps_the_balance(samples: Samples) -> None:
    row = int(samples.rows[2])
    for epoch in range(12):
        item = SampleDataset(samples, SMALL, 1, "classes")[plan.Batch(epoch, np.array([row, row]))]
        assert item["target"].tolist() == [samples.targets[row]] * 2
        assert len(item["damaged"]) == 2, "each time that it is drawn"


def test_a_damaged_sample_is_masked_where_it_would_be_measured(samples: Samples) -> None:
    item = SampleDataset(samples, SMALL, None)[plan.Batch(0, samples.rows[:4])]
    assert item["valid"].tolist() == [True, True, False, True]
    assert item["row"].tolist() == [*samples.rows[:2], plan.PADDING, samples.rows[3]]
    assert len(item["damaged"]) == 1


def test_where_everything_is_damaged_it_says_so(samples: Samples) -> None:
    for row in samples.rows:
        if row != samples.rows[2]:
            damage(samples.manifest, int(row))
    with pytest.raises(UserError, match="9 others that could stand in for it are damaged"):
        SampleDataset(samples, SMALL, 1)[plan.Batch(0, samples.rows[:1])]


def test_each_damage_is_listed_once_whoever_meets_it(tmp_path: Path) -> None:
    first, second = (Quarantine(tmp_path / "q.jsonl", 0.5) for _ in range(2))
    entry = {"key": "a", "address": "x.tar", "offset": 512, "reason": "cut"}
    first.add("train", [entry])
    second.add("train", [entry, entry | {"key": "b", "offset": 1024}])
    second.add("val", [entry])
    assert [(e["stream"], e["key"]) for e in first.entries()] == [("train", "a"), ("train", "b"), ("val", "a")]
    with (tmp_path / "q.jsonl").open("a") as file:
        file.write('{"stream": "tr')
    assert len(first.entries()) == 3, "a line that was cut short"
    second.add("val", [entry | {"key": "c\u2028d", "offset": 2048}])
    assert [e["key"] for e in first.entries()] == ["a", "b", "a", "c\u2028d"], "what follows it is not lost"


def test_too_many_in_one_epoch_stop_the_run() -> None:
    quarantine = Quarantine(None, 0.1)
    for epoch in range(3):
        quarantine.count("train", epoch, 1, 10)
    with pytest.raises(UserError, match=r"2 of the 10 samples of data.train are damaged, more than .* 0.1 allows"):
        quarantine.count("train", 2, 1, 10)


def test_a_validation_within_an_epoch_does_not_make_it_forget() -> None:
    quarantine = Quarantine(None, 0.1)
    quarantine.count("train", 0, 1, 10)
    quarantine.count("val", 3, 1, 10)
    with pytest.raises(UserError, match=r"2 of the 10 samples of data.train"):
        quarantine.count("train", 0, 1, 10)


def test_what_was_counted_survives_a_restart() -> None:
    first, second = Quarantine(None, 0.1), Quarantine(None, 0.1)
    first.count("train", 4, 1, 10)
    first.count("val", 7, 1, 10)
    second.go_on_from(first.state())
    second.count("val", 8, 1, 10)
    with pytest.raises(UserError, match=r"2 of the 10 samples of data.train"):
        second.count("train", 4, 1, 10)
    assert first.state() == {"train": (4, 1), "val": (7, 1)}, "that of another stays"


@pytest.mark.parametrize("order", [Order(balance="classes"), Order(partitions=2, block_shards=1), Order()])
def test_the_plan_is_the_same_from_any_step_and_on_any_ranks(samples: Samples, order: Order) -> None:
    def sampler(**settings: Any) -> TrainSampler:
        return TrainSampler(samples, **{"seed": 1, "global_batch": 8, "steps": range(6), "order": order} | settings)

    whole = [batch.rows for batch in sampler()]
    tail = [batch.rows for batch in sampler(steps=range(4, 6))]
    assert all(np.array_equal(a, b) for a, b in zip(whole[4:], tail, strict=True))
    parts = [list(sampler(rank=rank, ranks=3)) for rank in range(3)]
    for step, rows in enumerate(whole):
        together = np.concatenate([part[step].rows for part in parts])
        assert together[together != plan.PADDING].tolist() == rows.tolist()


def test_a_dropped_last_batch_leaves_whole_ones_only(samples: Samples) -> None:
    sampler = TrainSampler(samples, seed=1, global_batch=7, steps=range(6), order=Order(last_batch="drop"))
    batches = list(sampler)
    assert [len(batch.rows) for batch in batches] == [7] * 6
    assert [batch.epoch for batch in batches] == [0, 0, 0, 1, 1, 1]


def test_rows_drawn_by_weight_count_alike_in_the_loss(samples: Samples) -> None:
    rows = samples.rows[:2]
    assert torch.equal(SampleDataset(samples, SMALL, 1, "weights")[plan.Batch(0, rows)]["weight"], torch.ones(2))
