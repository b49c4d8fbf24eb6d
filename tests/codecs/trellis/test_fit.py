"""A matrix's codes and scales, and the rotated types as storage, against float64 and in all that rows can be."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from reference import quantization
from reference import trellis as ref
from torch import nn

from qlora_kit.codecs import codec_for
from qlora_kit.codecs.codebooks import SCHEMES, codebook, scheme
from qlora_kit.codecs.packed import PackedLinear, pack_linear
from qlora_kit.codecs.quantized import Quantizer, quantize_matrix
from qlora_kit.codecs.trellis.fit import nearest, sizes
from qlora_kit.errors import CodecError, ConfigError

TYPES = [name for name, kind in SCHEMES.items() if kind.rotated]
TRELLIS = [name for name in TYPES if name.startswith("trellis")]
WIDTHS = [1, 2, 7, 31, 47, 64, 96]
every_type = pytest.mark.parametrize("quant_type", TYPES)
every_width = pytest.mark.parametrize("width", WIDTHS)
plain_and_double = pytest.mark.parametrize("double_quant", [False, True])


def make(out: int, fan_in: int, quant_type: str, **kwargs: Any) -> PackedLinear:
    linear = nn.Linear(fan_in, out)
    return pack_linear(linear, quantize_matrix(linear.weight.detach(), quant_type, **kwargs))


@plain_and_double
@every_width
@every_type
def test_what_is_stored_can_be_read_bit_by_bit(quant_type: str, width: int, double_quant: bool) -> None:
    module = make(9, width, quant_type, double_quant=double_quant)
    codec, exact = codec_for(module), quantization.read_packed(module)
    assert exact.shape == (9, width)
    largest = np.abs(exact).max()
    assert np.abs(codec.read(module).double().numpy() - exact).max() <= 2e-6 * largest
    stored = quantization.read_packed(module, stored_basis=True)
    assert (
        np.abs(codec.multiplier(module, torch.float32).double().numpy() - stored).max() <= 1e-6 * np.abs(stored).max()
    )
    pieces = torch.cat([values for _, values in codec.pieces(module)])
    assert torch.equal(pieces, codec.read(module))


@every_width
@every_type
def test_scales_are_of_least_squares_for_the_codes(quant_type: str, width: int) -> None:
    weight = torch.randn(6, width) * 10.0 ** torch.arange(-3, 3)[:, None]
    quantized = quantize_matrix(weight, quant_type)
    turned = weight.double().numpy() @ ref.rotation(width).T
    read = ref.look_up(quantized.codes.numpy(), quantized.table().double().numpy(), quantized.bits)
    for row, values, scale in zip(turned, read, quantized.scales.tolist(), strict=True):
        assert scale == pytest.approx(ref.fitted_scale(row, values, np.eye(width)), rel=1e-5)


@pytest.mark.parametrize("width", [1, 3, 4])
@every_type
def test_codes_are_the_nearest_to_rows_of_size_one(quant_type: str, width: int) -> None:
    weight = torch.randn(12, width)
    quantized, bits = quantize_matrix(weight, quant_type), scheme(quant_type).bits
    turned = weight.double().numpy() @ ref.rotation(width).T
    table = codebook(quant_type).double().numpy()
    for row, codes in zip(turned, quantized.codes.tolist(), strict=True):
        if bits * width > 12:  # too many paths to try
            continue
        expected, ahead = ref.best_codes(row / math.sqrt((row**2).mean()), table, bits)
        assert codes == expected or ahead < 1e-4


# Of 200,000 independent normal values with a scale for each 512; beside what theory allows, 4^-bits.
@pytest.mark.parametrize(
    ("quant_type", "error"),
    [
        *[("rotated2", 0.1175), ("rotated3", 0.0345), ("rotated4", 0.0095)],
        *[("trellis2", 0.0800), ("trellis3", 0.0214), ("trellis4", 0.0056)],
    ],
)
def test_squared_errors_of_normal_values(quant_type: str, error: float) -> None:
    weight = torch.randn(400, 512)
    found = (quantize_matrix(weight, quant_type).dequantize() - weight).square().mean().item()
    assert 4.0 ** -scheme(quant_type).bits < found
    assert found == pytest.approx(error, rel=0.02)


def test_outliers_cost_a_rotated_row_less_than_a_block() -> None:
    weight = torch.randn(64, 256)
    weight[:, ::37] *= 20
    errors = {name: (quantize_matrix(weight, name).dequantize() - weight).norm() for name in ("trellis2", "signed2")}
    assert errors["trellis2"] < 0.85 * errors["signed2"]


@pytest.mark.parametrize("magnitude", [1e-30, 1e-18, 1e18, 1e30])
@plain_and_double
@every_type
def test_rows_of_any_magnitude_are_rounded_alike(quant_type: str, magnitude: float, double_quant: bool) -> None:
    weight = torch.randn(5, 47)
    plain = quantize_matrix(weight, quant_type, double_quant=double_quant)
    scaled = quantize_matrix(weight * magnitude, quant_type, double_quant=double_quant)
    lost = (plain.dequantize() - weight).norm(dim=1), (scaled.dequantize().double() / magnitude - weight).norm(dim=1)
    torch.testing.assert_close(lost[1].float(), lost[0], rtol=2e-2, atol=0)


@plain_and_double
@every_type
def test_rows_of_zeros_are_zeros(quant_type: str, double_quant: bool) -> None:
    assert not quantize_matrix(torch.zeros(3, 43), quant_type, double_quant=double_quant).dequantize().any()
    weight = torch.randn(5, 64)
    weight[2] = 0
    assert not quantize_matrix(weight, quant_type).dequantize()[2].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@every_type
def test_values_that_are_not_finite_are_refused(quant_type: str, bad: float) -> None:
    weight = torch.randn(5, 12)
    weight[3, 4] = bad
    with pytest.raises(CodecError, match=r"expected rows that are finite in torch.float32 when rotated"):
        quantize_matrix(weight, quant_type)
    with pytest.raises(ConfigError, match="found NaN or infinity"):
        Quantizer(quant_type, 64)(weight)
    module = make(5, 12, quant_type)
    before = codec_for(module).read(module)
    with pytest.raises(CodecError, match="found"):
        codec_for(module).write_(module, weight)
    assert torch.equal(codec_for(module).read(module), before)


def test_rows_that_only_overflow_when_rotated_are_refused() -> None:
    with pytest.raises(CodecError, match="when rotated"):
        quantize_matrix(torch.full((1, 64), 3e38) * torch.tensor(ref.signs(64)).float(), "trellis2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_type
def test_values_of_half_precision(quant_type: str, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 47).to(dtype)
    halves, floats = quantize_matrix(weight, quant_type), quantize_matrix(weight.float(), quant_type)
    assert torch.equal(halves.codes, floats.codes)
    assert torch.equal(halves.dequantize(), floats.dequantize())


@every_type
def test_layout_and_repetition_change_nothing(quant_type: str) -> None:
    weight = torch.randn(47, 33)
    before = weight.clone()
    first, again = quantize_matrix(weight.t(), quant_type), quantize_matrix(weight.t().contiguous(), quant_type)
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.scales, again.scales)
    assert torch.equal(weight, before)


@every_type
def test_asked_for_blocks_or_not_scales_are_rows(quant_type: str) -> None:
    for blocksize in (None, 32, 64, 4096):
        quantized = quantize_matrix(torch.randn(7, 40), quant_type, blocksize)
        assert (quantized.blocksize, quantized.rows, quantized.scales.shape) == (40, True, (7,))
        assert PackedLinear(40, 7, quant_type=quant_type, blocksize=blocksize or 40).blocksize == 40


@plain_and_double
@every_type
def test_without_values_the_shapes_are_the_same(quant_type: str, double_quant: bool) -> None:
    weight = torch.randn(7, 40)
    found, faked = (quantize_matrix(w, quant_type, double_quant=double_quant) for w in (weight, weight.to("meta")))
    assert [(t.shape, t.dtype) for t in found.tensors()] == [(t.shape, t.dtype) for t in faked.tensors()]
    assert (found.codes.shape, found.codes.dtype) == (faked.codes.shape, faked.codes.dtype)
    module = PackedLinear(40, 7, quant_type=quant_type, double_quant=double_quant, device="meta")
    assert module(torch.empty(3, 40, device="meta")).shape == (3, 7)
    real = make(7, 40, quant_type, double_quant=double_quant)
    shapes = {name: (t.shape, t.dtype) for name, t in real.state_dict().items()}
    assert {name: (t.shape, t.dtype) for name, t in module.state_dict().items()} == shapes


@every_type
def test_matrices_of_no_rows(quant_type: str) -> None:
    quantized = quantize_matrix(torch.empty(0, 12), quant_type)
    assert quantized.dequantize().shape == (0, 12)
    assert sizes(torch.empty(0, 12)).shape == (0,)
    module = PackedLinear(12, 0, quant_type=quant_type)
    assert codec_for(module).read(module).shape == (0, 12)


@plain_and_double
@every_type
@pytest.mark.parametrize("width", [5, 64, 96])
def test_what_was_read_is_quantized_to_the_same_codes(quant_type: str, double_quant: bool, width: int) -> None:
    """By the scales that it was stored with; from values alone the least error may be elsewhere."""
    module = make(40, width, quant_type, double_quant=double_quant)
    codec, before = codec_for(module), copy.deepcopy(module.state_dict())
    scales = module.stored_scales().read()
    for _ in range(2):
        codec.write_(module, codec.read(module))
    found = codec.quantized(module)
    assert found is not None
    assert torch.equal(module.weight.data, before["weight"])
    # Scales in 8 bits, of what they are off their mean, drift by as much as half a step each time.
    drift = 2 * 0.008 * (scales - scales.mean()).abs().max() if double_quant else 0
    assert (found.scales - scales).abs().max() <= drift + 1e-6 * scales.abs().max()


def test_known_scales_are_taken_of_rows_that_read_so_and_change_nothing_of_others() -> None:
    table, row = torch.tensor([-1.5, -0.5, 0.5, 1.5]), torch.tensor([-1.5, 0.5, 1.5] * 20)
    other = torch.randn(60)
    values = torch.stack([2 * row, 2 * row, other, torch.zeros(60), -2 * row])
    codes, scales = nearest(values, table, 2, torch.tensor([2.0, 50.0, 2.0, 3.0, -2.0]))
    plain_codes, plain_scales = nearest(values, table, 2)
    assert scales[[0, 4]].tolist() == [2.0, -2.0]
    assert torch.equal(codes[0], codes[4])
    assert codes[0, :3].tolist() == [0, 2, 3]
    assert torch.equal(codes[1:4], plain_codes[1:4])
    assert torch.equal(scales[1:4], plain_scales[1:4])


def test_a_row_that_leaves_the_codes_late_is_rounded_anew() -> None:
    table, row = torch.tensor([-1.5, -0.5, 0.5, 1.5]), torch.tensor([[-1.5, 0.5, 1.5, -0.5] * 20])
    row[0, -1] += 0.3
    for found, plain in zip(nearest(row, table, 2, torch.ones(1)), nearest(row, table, 2), strict=True):
        assert torch.equal(found, plain)


@pytest.mark.parametrize("shape", [(16, 64), (37, 96), (7, 5), (33, 47), (1, 1)])
@every_type
def test_output_and_gradients_are_the_dense_layers(quant_type: str, shape: tuple[int, int]) -> None:
    module = make(*shape, quant_type, double_quant=True)
    weight, bias = torch.from_numpy(quantization.read_packed(module)), module.bias.detach().double()
    for dtype, relative in [(torch.float64, 1e-6), (torch.float32, 2e-6), (torch.bfloat16, 2.4e-2)]:
        x = torch.randn(2, 3, shape[1]).to(dtype).requires_grad_()
        grad = torch.randn(2, 3, shape[0]).to(dtype)
        y = module(x)
        assert y.dtype == dtype
        (found,) = torch.autograd.grad(y, x, grad)
        exact, magnitude = x.double() @ weight.T + bias, x.double().norm(dim=-1, keepdim=True) * weight.norm(dim=1)
        assert ((y.double() - exact).abs() <= relative * (magnitude + bias.abs())).all()
        exact, magnitude = grad.double() @ weight, grad.double().norm(dim=-1, keepdim=True) * weight.norm()
        assert ((found.double() - exact).abs() <= relative * magnitude).all()


@pytest.mark.parametrize("quant_type", ["trellis2", "rotated3"])
def test_casts_copies_and_state_dicts_keep_it_bit_for_bit(quant_type: str) -> None:
    module = make(33, 48, quant_type, double_quant=True)
    read = codec_for(module).read(module)
    twin = copy.deepcopy(module).half()
    assert torch.equal(codec_for(twin).read(twin), read)
    other = PackedLinear(48, 33, quant_type=quant_type, double_quant=True, device="meta").to_empty(device="cpu")
    other.load_state_dict(module.state_dict())
    assert torch.equal(codec_for(other).read(other), read)
    assert "weight" in module.to("meta").state_dict()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's tracing warns of what it does itself
@pytest.mark.parametrize(("quant_type", "width"), [("trellis2", 48), ("trellis3", 47), ("rotated4", 47)])
def test_compiled_it_is_the_same_function(quant_type: str, width: int) -> None:
    module = make(33, width, quant_type)
    x = torch.randn(3, width, requires_grad=True)
    y, expected = torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_weight_is_read_in_float32(dtype: torch.dtype) -> None:
    module = make(33, 48, "trellis2")
    read, x = codec_for(module).read(module), torch.randn(4, 48).to(dtype)
    weight = torch.randn(33, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec_for(module).read(module), read)
        inside, y = quantize_matrix(weight, "trellis2").dequantize(), module(x)
    assert torch.equal(inside, quantize_matrix(weight, "trellis2").dequantize())
    assert y.dtype == torch.bfloat16
    assert (y.float() - (x.float() @ read.T + module.bias)).abs().max() < 0.05
