"""The Triton kernels' arithmetic on a CPU, in Triton's interpreter, launched as on a GPU.

The interpreter multiplies bfloat16 tiles by their bit patterns and cuts float32 off to bfloat16; what a GPU makes of
that dtype is in ``test_cuda``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from packed_matrices import FEW, LAYOUTS, ROUNDING, TYPES, matrix_and_values, product_error

from qlora_kit import kernels
from qlora_kit.kernels import on_cuda

pytest.importorskip("triton")
plain_and_double = pytest.mark.parametrize("double_quant", [False, True])
SOURCE = Path(kernels.__file__).with_name("triton_code.py")


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    """Kernels in the place of the compiled ones: a copy whose decorators saw the interpreter turned on."""
    spec = importlib.util.spec_from_file_location("interpreted_triton_code", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    with patch.dict(os.environ, TRITON_INTERPRET="1"):
        spec.loader.exec_module(copy)
    with patch.object(kernels, "triton_code", copy, create=True):
        yield


@pytest.mark.slow
@plain_and_double
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quant_type", TYPES)
def test_dequantized_values(quant_type: str, layout: tuple[int, int, int | None], double_quant: bool) -> None:
    matrix, values = matrix_and_values(*layout, quant_type, double_quant)
    exact = kernels.Way().dense(matrix, torch.float32)
    assert torch.equal(on_cuda.OnCuda().dense(matrix, torch.float32), exact)  # the same operations, each rounded
    torch.testing.assert_close(exact.double(), values, rtol=0, atol=2e-7)
    assert torch.equal(on_cuda.OnCuda().dense(matrix, torch.float16), exact.half())
    cut_off = on_cuda.OnCuda().dense(matrix, torch.bfloat16)
    torch.testing.assert_close(cut_off.float(), exact, rtol=2**-7, atol=0)


@pytest.mark.slow
@plain_and_double
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quant_type", FEW)
def test_products(quant_type: str, layout: tuple[int, int, int | None], double_quant: bool) -> None:
    matrix, values = matrix_and_values(*layout, quant_type, double_quant)
    for dtype in (torch.float32, torch.float16):
        x, bias, grad = (torch.randn(size, dtype=dtype) for size in ((3, layout[1]), (layout[0],), (3, layout[0])))
        y, back = on_cuda.OnCuda().linear(x, matrix, bias), on_cuda.OnCuda().gradient(grad, matrix)
        assert (y.dtype, back.dtype) == (dtype, dtype)
        assert product_error(y, x, values, bias) <= ROUNDING[dtype]
        assert product_error(back, grad, values.T) <= ROUNDING[dtype]


@pytest.mark.parametrize("quant_type", FEW)
def test_indices_of_64_bits(quant_type: str) -> None:
    matrix, values = matrix_and_values(33, 47, 32, quant_type)
    x = torch.randn(3, 47)
    with patch.object(on_cuda, "_MOST_INDEX", 1000):
        assert on_cuda._stored(matrix)["INDEX"] == kernels.triton_code.tl.int64
        found = on_cuda.OnCuda().dense(matrix, torch.float32), on_cuda.OnCuda().linear(x, matrix, None)
    assert torch.equal(found[0], kernels.Way().dense(matrix, torch.float32))
    assert product_error(found[1], x, values) <= ROUNDING[torch.float32]


@pytest.mark.parametrize("shape", [(47,), (1, 47), (16, 47), (2, 3, 47), (17, 47), (0, 47)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    matrix, values = matrix_and_values(33, 47, 32, "signed3")
    x, grad = torch.randn(shape), torch.randn(*shape[:-1], 33)
    y, back = on_cuda.OnCuda().linear(x, matrix, None), on_cuda.OnCuda().gradient(grad, matrix)
    assert (y.shape, back.shape) == (grad.shape, x.shape)
    assert product_error(y, x, values) <= ROUNDING[torch.float32]
    assert product_error(back, grad, values.T) <= ROUNDING[torch.float32]


def test_inputs_that_are_no_whole_rows_of_memory() -> None:
    matrix, values = matrix_and_values(33, 47, 32, "nf4")
    x = torch.randn(47, 6).t()
    assert product_error(on_cuda.OnCuda().linear(x, matrix, None), x, values) <= ROUNDING[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", FEW)
def test_terms_in_parts_and_scales_of_whole_tiles(quant_type: str) -> None:
    matrix, values = matrix_and_values(96, 640, 64, quant_type)
    assert on_cuda._parts(640, 3) == (5, 128)
    assert on_cuda._in_one_block(matrix, 64)
    x, grad = torch.randn(2, 640), torch.randn(2, 96)
    assert product_error(on_cuda.OnCuda().linear(x, matrix, None), x, values) <= ROUNDING[torch.float32]
    assert product_error(on_cuda.OnCuda().gradient(grad, matrix), grad, values.T) <= ROUNDING[torch.float32]


@pytest.mark.parametrize("terms", [1, 64, 65, 640, 4096, 11008])
@pytest.mark.parametrize("tiles", [1, 3, 128, 344, 5000])
def test_parts_hold_all_terms_once(terms: int, tiles: int) -> None:
    parts, each = on_cuda._parts(terms, tiles)
    assert (parts - 1) * each < terms <= parts * each
    assert each % on_cuda._TERMS == 0
