"""Thin products of half-precision activations with float32 factors, both ways of computing them, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import branches as ref

from qlora_kit.layers.fused import thin

# A pair of bfloat16 holds 16 bits, of float16 22; what is left is the product's own rounding, of its output where
# the device has no product with a float32 one.
DIGITS = {torch.bfloat16: 2**-15, torch.float16: 2**-20}
HALVES = list(DIGITS)


@pytest.fixture(params=["halves", "cast"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As accelerators compute it, whose product has a float32 output, and as CPUs do."""
    if request.param == "halves":
        monkeypatch.setattr(thin, "_in_halves", lambda x: x.dtype in HALVES)
        monkeypatch.setattr(thin, "_product", lambda a, b: a.float() @ b.float())
    return str(request.param)


def near(found: torch.Tensor, expected: np.ndarray, digits: float) -> None:
    assert np.abs(ref.array(found) - expected).max() <= digits * np.abs(expected).max()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("factor_dtype", [torch.float32, "the activations'"])
def test_factors_keep_their_digits(way: str, dtype: torch.dtype, factor_dtype: torch.dtype | str) -> None:
    x, g = torch.randn(40, 24).to(dtype), torch.randn(40, 16).to(dtype)
    A = torch.randn(4, 24)
    A = A.to(dtype) if isinstance(factor_dtype, str) else A
    digits = DIGITS[dtype]
    near(u := thin.narrow(x, A), ref.array(x) @ ref.array(A).T, digits)
    assert u.dtype == torch.float32
    near(thin.gathered(u, g), ref.array(u).T @ ref.array(g), digits)
    # An output of the activations' own dtype is rounded to it once.
    y = torch.randn(40, 24).to(dtype)
    expected = ref.array(y) + ref.array(u) @ ref.array(A)
    found = thin.widen_(y, u, A)
    assert found.data_ptr() == y.data_ptr()
    near(found, expected, torch.finfo(dtype).eps)


def test_one_half_alone_would_lose_them() -> None:
    x, A = torch.randn(40, 24).bfloat16(), torch.randn(4, 24)
    exact = ref.array(x) @ ref.array(A).T
    rounded = ref.array(x) @ ref.array(A.bfloat16()).T
    assert np.abs(rounded - exact).max() > 20 * DIGITS[torch.bfloat16] * np.abs(exact).max()


def test_float64_stays_float64() -> None:
    x, A = torch.randn(5, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    assert thin.narrow(x, A).dtype == torch.float64
    near(thin.narrow(x, A), ref.array(x) @ ref.array(A).T, 1e-14)
