from __future__ import annotations

import itertools

import numpy as np
import pytest

from lit_transfer.data.order import class_weights, drawn, interleaved, partitioned, words

ROWS = np.arange(100, 1100, dtype=np.int64)
SHARDS = np.repeat(np.arange(20), 50)


def order(block_shards: int | None, partitions: int = 1, epoch: int = 0) -> np.ndarray:
    random = words("d", 0, epoch, "shards", 20), words("d", 0, epoch, "", 1000)
    return partitioned(SHARDS, *random, block_shards, partitions)


def test_words_depend_on_all_that_names_them_and_on_nothing_else() -> None:
    first = words("d", 1, 2, "use", 5)
    assert np.array_equal(first, words("d", 1, 2, "use", 9)[:5])
    others = [("e", 1, 2, "use"), ("d", 2, 2, "use"), ("d", 1, 3, "use"), ("d", 1, 2, "")]
    assert not any(np.array_equal(first, words(*other, 5)) for other in others)


@pytest.mark.parametrize("start", [0.0, 0.37, 0.999])
def test_each_row_is_drawn_its_expected_number_of_times_rounded(start: float) -> None:
    weights = np.random.default_rng(0).random(1000) ** 4
    weights[[0, 500]] = 0
    found = drawn(ROWS, weights, start)
    assert len(found) == 1000
    counts = np.bincount(found - 100, minlength=1000)
    expected = weights * 1000 / weights.sum()
    assert np.all(counts >= np.floor(expected - 1e-9)) and np.all(counts <= np.ceil(expected + 1e-9))
    assert counts[0] == counts[500] == 0


def test_equal_weights_draw_every_row_once() -> None:
    assert np.array_equal(drawn(ROWS, np.full(1000, 0.3), 0.5), ROWS)


def test_balanced_classes_have_equal_shares() -> None:
    targets = np.array([0] * 900 + [1] * 90 + [2] * 10)
    found = drawn(np.arange(1000), class_weights(targets), 0.5)
    assert np.abs(np.bincount(targets[found]) - 1000 / 3).max() <= 1
    assert set(found[targets[found] == 2]) == set(range(990, 1000))


def test_a_block_mixes_its_shards_and_no_others() -> None:
    found = order(block_shards=4)
    assert sorted(found) == list(range(1000))
    blocks = [set(SHARDS[found[start : start + 200]]) for start in range(0, 1000, 200)]
    assert all(len(block) == 4 for block in blocks)
    inside = SHARDS[found[:200]]
    assert len(set(inside[:30])) == 4, "rows of all four stand together"
    assert not np.array_equal(found, order(block_shards=4, epoch=1))


def test_one_block_is_a_full_shuffle() -> None:
    assert np.array_equal(order(block_shards=20), np.argsort(words("d", 0, 0, "", 1000), kind="stable"))


@pytest.mark.parametrize("block_shards", [1, 4, 9, None])
@pytest.mark.parametrize("partitions", [2, 3, 7])
def test_partitions_share_one_shard_at_most_and_mix_their_blocks(partitions: int, block_shards: int | None) -> None:
    found = order(block_shards, partitions)
    assert sorted(found) == list(range(1000))
    size = 1000 // partitions
    parts = [SHARDS[found[i * size : (i + 1) * size]] for i in range(partitions)]
    assert all(len({*one} & {*other}) <= 1 for one, other in itertools.pairwise(parts))
    assert sum(len({*part}) for part in parts) <= 20 + partitions - 1
    assert any(list(dict.fromkeys(part)) != sorted({*part}) for part in parts), "shards stand at random"
    for part in parts:
        met = list(dict.fromkeys(part))
        for block in (met[i : i + (block_shards or 20)] for i in range(0, len(met), block_shards or 20)):
            places = np.flatnonzero(np.isin(part, block))
            assert places[-1] - places[0] + 1 == len(places), "blocks are counted from the start of the part"
            # The first and the last shard of a part may be no more than a row of it.
            assert len({*part[places[:60]]}) >= len(block) - 2, "all of a block is mixed"


@pytest.mark.parametrize(("partitions", "batch"), [(1, 7), (2, 8), (4, 8), (4, 12)])
def test_every_batch_has_its_share_of_every_partition(partitions: int, batch: int) -> None:
    found = interleaved(ROWS, partitions, batch)
    assert sorted(found) == list(ROWS)
    size = 1000 // partitions
    for step in range(size // (batch // partitions)):
        parts = (found[step * batch : (step + 1) * batch] - 100) // size
        assert parts.tolist() == np.repeat(np.arange(partitions), batch // partitions).tolist()


@pytest.mark.parametrize("block_shards", [1, 2, 16, None])
@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_a_node_reads_its_share_of_the_shards(nodes: int, block_shards: int | None) -> None:
    found = interleaved(order(block_shards, 4), 4, 16)
    read: list[set[int]] = [set() for _ in range(nodes)]
    for step in range(1000 // 16):
        for node, rows in enumerate(found[step * 16 : step * 16 + 16].reshape(nodes, -1)):
            read[node] |= set(SHARDS[rows])
    assert max(len(shards) for shards in read) <= 20 / nodes + 2
