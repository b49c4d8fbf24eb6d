"""The Triton kernels on a GPU, against torch's exact values and the float64 reference."""

from __future__ import annotations

import copy

import pytest
import torch
from packed_matrices import FEW, LAYOUTS, ROUNDING, TYPES, make, product_error
from reference import quantization as ref
from torch import Tensor, nn

from qlora_kit import kernels
from qlora_kit.codecs import codec_for
from qlora_kit.codecs.codebooks import scheme
from qlora_kit.codecs.packed import PackedLinear, pack_linear, packed_matrix
from qlora_kit.codecs.quantized import quantize_matrix
from qlora_kit.kernels.on_cuda import MOST_ROWS_FUSED, OnCuda

pytestmark = pytest.mark.cuda
HALVES = [torch.float16, torch.bfloat16, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", HALVES)


def on_gpu(out: int, fan_in: int, blocksize: int | None, quant_type: str, double: bool) -> tuple[PackedLinear, Tensor]:
    """A module on the GPU, and its values in float64 on the CPU, in the basis that they are stored in."""
    module = make(out, fan_in, blocksize, quant_type, double)
    values = torch.from_numpy(ref.read_packed(module, stored_basis=True))
    return module.cuda(), values


def skip_if_unknown(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")


@every_dtype
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS, (192, 640, 64)])
@pytest.mark.parametrize("quant_type", TYPES)
def test_values_and_products(
    quant_type: str, layout: tuple[int, int, int | None], double_quant: bool, dtype: torch.dtype
) -> None:
    skip_if_unknown(dtype)
    module, values = on_gpu(*layout, quant_type, double_quant)
    matrix = packed_matrix(module)
    assert type(kernels.way_for(matrix, dtype)) is OnCuda
    exact = kernels.Way().dense(matrix, torch.float32)
    torch.testing.assert_close(exact.cpu().double(), values, rtol=0, atol=2e-7)
    assert torch.equal(codec_for(module).multiplier(module, dtype), exact.to(dtype))
    for rows in (1, 3, MOST_ROWS_FUSED, MOST_ROWS_FUSED + 1, 70):
        x, grad = (torch.randn(rows, size, dtype=dtype, device="cuda") for size in reversed(layout[:2]))
        bias = torch.randn(layout[0], dtype=dtype, device="cuda")
        y, back = kernels.linear(x, matrix, bias), kernels.gradient(grad, matrix)
        assert (y.dtype, back.dtype, y.shape, back.shape) == (dtype, dtype, grad.shape, x.shape)
        assert product_error(y, x, values, bias) <= ROUNDING[dtype]
        assert product_error(back, grad, values.T) <= ROUNDING[dtype]


@every_dtype
@pytest.mark.parametrize("shape", [(24, 128), (33, 47), (1, 5)])
@pytest.mark.parametrize("quant_type", [name for name in TYPES if scheme(name).rotated])
def test_rotated_types(quant_type: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """As modules: quantized on the GPU, rotated there, and multiplied with."""
    skip_if_unknown(dtype)
    weight = torch.randn(shape, device="cuda")
    module = pack_linear(nn.Linear(shape[1], shape[0], device="cuda"), quantize_matrix(weight, quant_type))
    values = torch.from_numpy(ref.read_packed(copy.deepcopy(module).cpu()))
    found = codec_for(module).read(module).cpu().double()
    torch.testing.assert_close(found, values, rtol=0, atol=4e-6 * values.abs().max().item())
    assert type(kernels.way_for(packed_matrix(module), dtype)) is OnCuda
    x, grad = (torch.randn(70, size, dtype=dtype, device="cuda") for size in reversed(shape))
    x.requires_grad_()
    y = module(x)
    (back,) = torch.autograd.grad(y, x, grad)
    for ours, given, w in ((y - module.bias.to(dtype), x, values.T), (back, grad, values)):
        given = given.detach().double().cpu()
        size = given.norm(dim=1, keepdim=True) * w.norm(dim=0) + 1
        assert ((ours.detach().double().cpu() - given @ w).abs() / size).max() <= 2 * ROUNDING[dtype]


@every_dtype
@pytest.mark.parametrize("quant_type", FEW)
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_a_layer_of_common_size(rows: int, quant_type: str, dtype: torch.dtype) -> None:
    skip_if_unknown(dtype)
    module, _ = on_gpu(1024, 2048, 64, quant_type, True)
    values = codec_for(module).read(module).cpu().double()
    module.bias.requires_grad_()
    x = torch.randn(2, rows, 2048, dtype=dtype, device="cuda", requires_grad=True)
    grad = torch.randn(2, rows, 1024, dtype=dtype, device="cuda")
    y = module(x)
    found = torch.autograd.grad(y, [x, module.bias], grad)
    assert product_error(y.detach(), x.detach(), values, module.bias.detach()) <= ROUNDING[dtype]
    assert product_error(found[0], grad, values.T) <= ROUNDING[dtype]
    torch.testing.assert_close(found[1], grad.float().sum((0, 1)), rtol=0.02, atol=0.02)  # sums in 16 bits


@pytest.mark.parametrize("rows", [1, 8, 300])
def test_under_autocast(rows: int) -> None:
    module, values = on_gpu(192, 640, 64, "signed3", True)
    x = torch.randn(rows, 640, device="cuda")
    with torch.autocast("cuda", torch.float16):
        y = module(x)
    assert y.dtype == torch.float16
    assert product_error(y, x, values, module.bias) <= ROUNDING[torch.float16]


def test_float64_and_no_triton_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    module, values = on_gpu(33, 47, 32, "affine3", True)
    matrix = packed_matrix(module)
    x = torch.randn(3, 47, dtype=torch.float64, device="cuda")
    assert type(kernels.way_for(matrix, torch.float64)) is kernels.Way
    assert product_error(kernels.linear(x, matrix), x, values) <= ROUNDING[torch.float64]
    monkeypatch.setattr("qlora_kit.kernels.on_cuda._has_triton", lambda: False)
    assert type(kernels.way_for(matrix, torch.float16)) is kernels.Way
    assert product_error(kernels.linear(x.half(), matrix), x, values) <= ROUNDING[torch.float16]


def test_sums_come_out_the_same_each_time() -> None:
    module, _ = on_gpu(192, 4096, 64, "nf4", True)
    x = torch.randn(4, 4096, dtype=torch.float16, device="cuda")
    first = module(x)
    assert all(torch.equal(module(x), first) for _ in range(5))


def test_few_rows_take_no_dense_weight() -> None:
    module, _ = on_gpu(4096, 4096, 64, "signed2", True)
    x = torch.randn(1, 4096, dtype=torch.float16, device="cuda")
    module(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module(x)
    assert torch.cuda.max_memory_allocated() - before < 4096 * 4096 // 4
