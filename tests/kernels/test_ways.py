"""Which way a product takes: one list says, and what no fast way takes is looked up whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed_matrices import FEW, ROUNDING, make, matrix_and_values, product_error
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_kit import kernels
from qlora_kit.codecs import codec_for
from qlora_kit.codecs.packed import PackedLinear, packed_matrix
from qlora_kit.kernels.on_cpu import OnCpu
from qlora_kit.kernels.on_cuda import OnCuda

DTYPES = list(ROUNDING)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@every_dtype
def test_the_first_way_that_takes_it_is_taken(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, _ = matrix_and_values(33, 47, 32, "nf4")
    assert [type(way) for way in kernels.WAYS] == [OnCuda, OnCpu, kernels.Way]
    assert type(kernels.way_for(matrix, dtype)) is OnCpu
    monkeypatch.setattr(kernels, "WAYS", [OnCuda(), kernels.Way()])
    assert type(kernels.way_for(matrix, dtype)) is kernels.Way


@every_dtype
@pytest.mark.parametrize("quant_type", FEW)
def test_the_way_for_every_device(quant_type: str, dtype: torch.dtype) -> None:
    matrix, values = matrix_and_values(33, 47, 32, quant_type)
    x, bias, grad = (torch.randn(size, dtype=dtype) for size in ((2, 3, 47), (33,), (2, 3, 33)))
    y, back = kernels.Way().linear(x, matrix, bias), kernels.Way().gradient(grad, matrix)
    assert (y.dtype, back.dtype) == (dtype, dtype)
    assert product_error(y, x, values, bias) <= ROUNDING[dtype]
    assert product_error(back, grad, values.T) <= ROUNDING[dtype]


@pytest.mark.parametrize("double_quant", [False, True])
def test_on_the_meta_device_products_have_shapes(double_quant: bool) -> None:
    module = PackedLinear(47, 33, quant_type="affine3", double_quant=double_quant, device="meta")
    matrix = packed_matrix(module)
    y = kernels.linear(torch.empty(2, 3, 47, device="meta", dtype=torch.bfloat16), matrix, None)
    assert (y.shape, y.dtype, y.is_meta) == ((2, 3, 33), torch.bfloat16, True)
    assert kernels.gradient(y, matrix).shape == (2, 3, 47)
    assert codec_for(module).multiplier(module, torch.float16).shape == (33, 47)


def test_fake_tensors_have_shapes_and_leave_nothing_behind() -> None:
    module = make(33, 47, 32, "signed2")
    x = torch.randn(3, 47)
    expected = module(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = PackedLinear(47, 33, quant_type="signed2", double_quant=True)
        assert fake(mode.from_tensor(x)).shape == (3, 33)
    assert torch.equal(module(x), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's tracing warns of what it does itself
def test_compiled_it_is_the_same_function() -> None:
    module = make(33, 47, 32, "signed3")
    x = torch.randn(3, 47, requires_grad=True)
    compiled = torch.compile(module, backend="aot_eager")
    y, expected = compiled(x), module(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)), rtol=1e-5, atol=1e-6)


def test_only_the_kernels_file_knows_triton() -> None:
    folder = Path(kernels.__file__).parent
    users = {file.stem for file in folder.glob("*.py") if "import triton\n" in file.read_text()}
    assert users == {"triton_code"}
