from __future__ import annotations

import math

import numpy as np
import pytest

from lit_transfer.data.plan import PADDING, share, shuffled, slice_of, step_rows, steps_per_epoch, uniforms

ROWS = np.arange(100, 120, dtype=np.int64)


def test_a_shuffle_is_a_permutation_that_each_argument_changes() -> None:
    orders = [
        shuffled(ROWS, digest, seed, epoch) for digest in ("a", "b") for seed in (0, 1) for epoch in (0, 1, "fraction")
    ]
    assert all(sorted(order) == list(ROWS) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert np.array_equal(orders[0], shuffled(ROWS, "a", 0, 0))


def test_the_first_place_of_a_shuffle_is_uniform() -> None:
    first = [shuffled(ROWS, "a", seed, 0)[0] - 100 for seed in range(4000)]
    counts = np.bincount(first, minlength=20)
    assert ((counts - 200) ** 2 / 200).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def test_pinned_so_that_runs_of_another_version_stay_comparable() -> None:
    assert shuffled(np.arange(10, dtype=np.int64), "digest", 7, 3).tolist() == [2, 5, 4, 7, 6, 9, 0, 8, 1, 3]
    assert (uniforms(7, 3, np.array([0, 41]), 3) * 2**24).astype(int).tolist() == [
        [14626009, 14537162, 12637289],
        [1008785, 15849155, 2046253],
    ]


@pytest.mark.full
@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("parts", range(1, 4))
@pytest.mark.parametrize("samples", [1, 7, 20])
@pytest.mark.parametrize("batch", [3, 4, 8, 20, 64])
def test_ranks_together_see_each_row_once_in_the_order_of_one_rank(
    samples: int, batch: int, parts: int, ranks: int
) -> None:
    order = shuffled(ROWS[:samples], "a", 0, 0)
    seen = []
    for step in range(steps_per_epoch(samples, batch)):
        rows = step_rows(order, step, batch)
        assert rows.tolist() == order[step * batch : (step + 1) * batch].tolist()
        slices = [slice_of(slice_of(rows, part, parts), rank, ranks) for part in range(parts) for rank in range(ranks)]
        assert len({len(mine) for mine in slices}) == 1, "every rank computes as many rows of every part"
        assert len(slices[0]) == math.ceil(math.ceil(len(rows) / parts) / ranks)
        seen += [row for row in np.concatenate(slices) if row != PADDING]
    assert seen == order.tolist()
    assert len(step_rows(order, steps_per_epoch(samples, batch), batch)) == 0


def test_a_fraction_is_rounded_and_keeps_at_least_one() -> None:
    assert [share(10, f) for f in (0.01, 0.14, 0.16, 0.5, 1)] == [1, 1, 2, 5, 10]


def test_fewer_rows_than_ranks_pads_whole_ranks() -> None:
    slices = [slice_of(ROWS[:2], rank, 4).tolist() for rank in range(4)]
    assert slices == [[100], [101], [PADDING], [PADDING]]
    empty = slice_of(np.array([PADDING]), 1, 2)
    assert empty.tolist() == [PADDING], "a part of padding alone is padding on every rank"


def test_uniforms_are_uniform() -> None:
    draws = uniforms(0, 0, np.arange(20_000), 16)
    assert draws.dtype == np.float32 and draws.shape == (20_000, 16)
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.01  # five standard errors
    assert np.abs(draws.var(axis=0) - 1 / 12).max() < 0.003
    for column in draws.T:
        deciles = np.bincount((column * 10).astype(int), minlength=10)
        assert ((deciles - 2000) ** 2 / 2000).sum() < 33.7  # chi-square, 9 degrees of freedom, p = 1e-4


def test_neighbouring_rows_epochs_seeds_and_draws_are_not_correlated() -> None:
    rows = np.arange(20_000)
    base = uniforms(3, 5, rows, 16)
    others = {
        "row": uniforms(3, 5, rows + 1, 16),
        "epoch": uniforms(3, 6, rows, 16),
        "seed": uniforms(4, 5, rows, 16),
        "seed and epoch": uniforms(4, 4, rows, 16),
        "draw": np.roll(base, 1, axis=1),
        "row and draw": np.roll(uniforms(3, 5, rows + 1, 16), 1, axis=1),
    }
    for name, other in others.items():
        for draw in range(16):
            assert abs(np.corrcoef(base[:, draw], other[:, draw])[0, 1]) < 0.036, name  # five standard errors
        assert (base == other).mean() < 1e-3, name


def test_a_sample_draws_the_same_whatever_its_batch() -> None:
    whole = uniforms(1, 2, ROWS, 8)
    assert np.array_equal(uniforms(1, 2, ROWS[[7, 3]], 8), whole[[7, 3]])
    assert np.array_equal(uniforms(1, 2, ROWS[[7]], 3), whole[[7], :3])


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_any_seed_will_do(seed: int) -> None:
    assert len(np.unique(uniforms(seed, 0, ROWS, 4))) == 80
    assert sorted(shuffled(ROWS, "a", seed, 0)) == list(ROWS)
