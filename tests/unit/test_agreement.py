"""The checksum that ranks compare sees every bit of a tensor and its place."""

from __future__ import annotations

import pytest
import torch

from lit_transfer.phases.agreement import checksum

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
DTYPES = [*FLOATS, *INTEGERS, torch.bool, torch.complex64]


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0))
    return (values % 2).to(dtype) if dtype is torch.bool else values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tensors_have_equal_checksums_and_a_changed_entry_another(dtype: torch.dtype) -> None:
    tensor = sample(dtype, 5, 7)
    own = checksum(tensor)
    assert (own.dtype, own.shape) == (torch.int64, ())
    assert checksum(tensor.clone()) == own
    for place in [(0, 0), (2, 3), (4, 6)]:
        changed = tensor.clone()
        changed[place] = ~changed[place] if dtype is torch.bool else changed[place] + 1
        assert checksum(changed) != own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_entries_counts(dtype: torch.dtype) -> None:
    tensor = sample(dtype, 20)
    first = next(i for i in range(1, 20) if tensor[i] != tensor[0])
    swapped = tensor.clone()
    swapped[0], swapped[first] = tensor[first], tensor[0]
    assert checksum(swapped) != checksum(tensor)


@pytest.mark.parametrize("bit", range(32))
def test_no_bit_of_a_float_is_lost_at_any_place(bit: int) -> None:
    tensor = sample(torch.float32, 9) + 0.1
    for place in range(9):
        flipped = tensor.clone()
        flipped.view(torch.int32)[place] ^= torch.tensor(1 << bit).to(torch.int32)
        assert checksum(flipped) != checksum(tensor)


def test_zeros_of_both_signs_differ_and_equal_nans_do_not() -> None:
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.tensor([float("nan")])) == checksum(torch.tensor([float("nan")]))


def test_drifts_that_cancel_in_a_sum_are_seen() -> None:
    tensor = torch.full((64,), 0.5)
    for first, second in [(0, 1), (10, 40)]:  # they cancel also in a sum weighted by the places 1, 3, ...
        drifted = tensor.clone()
        drifted.view(torch.int32)[first] += 2 * second + 1
        drifted.view(torch.int32)[second] -= 2 * first + 1
        assert checksum(drifted) != checksum(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalars_and_empty_tensors_have_one_too(dtype: torch.dtype) -> None:
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    assert checksum(one) == checksum(one.clone()) != checksum(zero)
    assert checksum(torch.empty(0, 3, dtype=dtype)) == 0


def test_memory_layout_does_not_count() -> None:
    tensor = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    laid_out = tensor.contiguous(memory_format=torch.channels_last)
    assert laid_out.stride() != tensor.stride()
    assert checksum(laid_out) == checksum(tensor)
    assert checksum(tensor.transpose(2, 3)) != checksum(tensor)


def test_a_parameter_that_trains_is_only_read() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert not checksum(parameter).requires_grad
