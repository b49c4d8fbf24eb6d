"""Finite sums mean finite values, and sums that overflow by themselves mean nothing."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.codecs.finite import all_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")], [float("-inf")], [float("inf"), float("-inf")]])
@pytest.mark.parametrize("shape", [(5,), (1200, 1200), (3, 4, 5, 2)])
def test_one_bad_value_is_found(shape: tuple[int, ...], bad: list[float], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    assert all_finite(tensor)
    tensor.view(-1)[-len(bad) :] = torch.tensor(bad, dtype=dtype)
    assert not all_finite(tensor)
    assert not all_finite(tensor.transpose(0, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_overflows(dtype: torch.dtype) -> None:
    assert all_finite(torch.full((64,), torch.finfo(dtype).max, dtype=dtype))


def test_what_can_t_be_infinite() -> None:
    assert all_finite(torch.tensor([1, 2]))
    assert all_finite(torch.empty(0))
    assert all_finite(torch.tensor([True]))
