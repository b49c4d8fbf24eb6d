"""Packed products on a CPU: every type, layout and dtype against the float64 reference, and the memory they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed_matrices import FEW, LAYOUTS, ROUNDING, TYPES, make, matrix_and_values, product_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_kit import kernels
from qlora_kit.codecs import codec_for
from qlora_kit.kernels import look_up, on_cpu, scratch
from qlora_kit.kernels.reading import Reader

DTYPES = list(ROUNDING)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
plain_and_double = pytest.mark.parametrize("double_quant", [False, True])


@pytest.fixture(params=[False, True], ids=["pieces", "whole"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU multiplies in 16 bits; several rows of inputs then take the whole weight."""
    monkeypatch.setattr(on_cpu, "product_dtype", lambda _, dtype: dtype if request.param else torch.float32)
    monkeypatch.setattr(on_cpu, "_FEW_ROWS", 2)
    there: bool = request.param
    return there


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which small weights take several chunks and pieces, which begin inside blocks and bytes."""
    monkeypatch.setattr(look_up, "CHUNK", 128)
    monkeypatch.setattr(on_cpu, "_PIECE", 150)
    monkeypatch.setattr(on_cpu, "_LARGE_PIECE", 150)


@pytest.mark.slow
@pytest.mark.usefixtures("small_pieces", "instructions")
@plain_and_double
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quant_type", TYPES)
def test_products_and_dense_weights(quant_type: str, layout: tuple[int, int, int | None], double_quant: bool) -> None:
    matrix, values = matrix_and_values(*layout, quant_type, double_quant)
    exact = Reader(matrix).read_(0, torch.empty(matrix.numel)).view(matrix.shape)
    torch.testing.assert_close(exact.double(), values, rtol=0, atol=2e-7)
    for dtype in DTYPES:
        x, bias, grad = (torch.randn(size, dtype=dtype) for size in ((3, layout[1]), (layout[0],), (3, layout[0])))
        y, back = kernels.linear(x, matrix, bias), kernels.gradient(grad, matrix)
        assert (y.dtype, back.dtype) == (dtype, dtype)
        assert product_error(y, x, values, bias) <= ROUNDING[dtype]
        assert product_error(back, grad, values.T) <= ROUNDING[dtype]
        assert torch.equal(kernels.dense(matrix, dtype), exact.to(dtype))


@pytest.mark.slow
@pytest.mark.usefixtures("small_pieces", "instructions")
@pytest.mark.parametrize("shape", [(47,), (1, 47), (4, 47), (2, 3, 47), (0, 47), (2, 0, 47)])
@every_dtype
def test_any_number_of_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix, values = matrix_and_values(33, 47, 32, "signed3")
    x, grad = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 33, dtype=dtype)
    y, back = kernels.linear(x, matrix), kernels.gradient(grad, matrix)
    assert (y.shape, back.shape) == (grad.shape, x.shape)
    assert product_error(y, x, values) <= ROUNDING[dtype]
    assert product_error(back, grad, values.T) <= ROUNDING[dtype]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("quant_type", FEW)
def test_float64_products_are_the_float64_values(quant_type: str) -> None:
    matrix, _ = matrix_and_values(33, 47, 32, quant_type)
    weight = kernels.Way().dense(matrix, torch.float64)
    x, grad = torch.randn(3, 47, dtype=torch.float64), torch.randn(3, 33, dtype=torch.float64)
    torch.testing.assert_close(kernels.linear(x, matrix), x @ weight.T, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(kernels.gradient(grad, matrix), grad @ weight, rtol=1e-13, atol=1e-14)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("quant_type", FEW)
@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 9), slice(5, 33), slice(32, 33)])
def test_some_rows_are_those_of_the_whole(rows: slice, quant_type: str) -> None:
    reader = Reader(matrix_and_values(33, 47, 32, quant_type)[0])
    whole = reader.rows(slice(0, 33))
    assert torch.equal(reader.rows(rows), whole[rows])
    memory = torch.full((5000,), torch.nan)
    assert torch.equal(reader.rows(rows, memory), whole[rows])
    assert memory[reader.room(rows) :].isnan().all()


def test_the_multiplier_is_the_codecs_weight_in_any_dtype() -> None:
    module = make(33, 47, 32, "affine3")
    codec = codec_for(module)
    for dtype in DTYPES:
        found = codec.multiplier(module, dtype)
        assert torch.equal(found, codec.read(module).to(dtype))
        again = codec.multiplier(module, dtype)
        assert again.data_ptr() == found.data_ptr(), "the memory is used again"
    read = codec.read(module)
    codec.multiplier(module, torch.float32).zero_()
    assert torch.equal(codec.read(module), read), "neither what is stored nor what was read"


class Largest(TorchDispatchMode):
    """The most bytes of one tensor's memory that any operation gave out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **kwargs or {})
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return found


def largest(run: Callable[[], object]) -> int:
    scratch._kept.buffers.clear()
    with Largest() as mode:
        run()
    return mode.bytes


@pytest.mark.usefixtures("small_pieces")
def test_no_dense_weight_is_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "product_dtype", lambda _, dtype: torch.float32)
    module = make(256, 64, 64, "signed2")
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    taken = largest(lambda: torch.autograd.grad(module(x).sum(), x))
    assert taken <= 256 * 64 // 4, "the packed codes are the largest tensor there is"
    assert largest(lambda: codec_for(module).multiplier(module, torch.bfloat16)) == 256 * 64 * 2


@pytest.mark.usefixtures("instructions")
def test_inference_mode_leaves_no_memory_that_training_cannot_use() -> None:
    scratch._kept.buffers.clear()
    module = make(33, 47, 32, "nf3")
    x = torch.randn(4, 47, dtype=torch.bfloat16)
    with torch.inference_mode():
        inferred = module(x)
    x.requires_grad_()
    y = module(x)
    y.sum().backward()
    assert torch.equal(y, inferred)
