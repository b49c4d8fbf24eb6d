"""A weight is its values: not the dtype that held them, nor the order in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loftq import factorize

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda w: w.T.contiguous().T,
    "strided": lambda w: torch.stack([w, w.neg()], dim=-1)[..., 0],
    "expanded": lambda w: w[:1].expand(w.shape),
    "parameter": torch.nn.Parameter,
    "float8_e4m3fn": lambda w: w.to(torch.float8_e4m3fn),
    "float8_e5m2, transposed": lambda w: w.to(torch.float8_e5m2).T.contiguous().T,
    "float16, transposed": lambda w: w.half().T.contiguous().T,
}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"bits": 2}, {"bits": 8}, {"quant_type": "affine3"}, {"method": "pissa"}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_dtype_and_layout_gives_what_its_float32_copy_gives(layout: str, options: dict[str, Any]) -> None:
    weight = LAYOUTS[layout](torch.randn(48, 64, generator=torch.Generator().manual_seed(0)))
    found = factorize(weight, 4, **options)
    expected = factorize(weight.detach().float().clone(memory_format=torch.contiguous_format), 4, **options)
    assert torch.equal(found.quantized.dequantize(), expected.quantized.dequantize())
    assert torch.equal(found.A, expected.A)
    assert torch.equal(found.B, expected.B)
