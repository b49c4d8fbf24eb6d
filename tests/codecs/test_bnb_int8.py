"""int8 weights: where the scales are, the codes bitsandbytes gives, and new values in every mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn import Linear8bitLt
from codes_taken import check_codes_taken
from reference import quantization as ref
from torch import Tensor, nn

from qlora_kit.codecs import codec_for
from qlora_kit.codecs.bnb import quantize_linear_int8
from qlora_kit.errors import CodecError


def stock(out: int = 32, fan_in: int = 64, **kwargs: Any) -> Linear8bitLt:
    kwargs.setdefault("has_fp16_weights", False)
    return Linear8bitLt(fan_in, out, **kwargs).to("cpu")


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("out", "fan_in"), [(32, 64), (37, 33)])
def test_read_write_forward(moved: bool, train: bool, out: int, fan_in: int) -> None:
    module = stock(out, fan_in).train(train)
    codec, x = codec_for(module), torch.randn(3, fan_in)
    before = codec.read(module)
    if moved:
        module(x)
        assert module.weight.SCB is None  # the first forward moved the scales to module.state
    scales = module.state.SCB if moved else module.weight.SCB
    expected = ref.read_int8(module.weight.data.numpy(), scales.numpy())
    # A float32 product and division: two roundings.
    torch.testing.assert_close(codec.read(module).double(), torch.as_tensor(expected), rtol=3e-7, atol=0)
    assert torch.equal(codec.read(module), before)

    parameter, codes = module.weight, module.weight.data.clone()
    codec.write_(module, before)
    assert torch.equal(module.weight.data, codes)

    target = torch.randn(out, fan_in)
    codec.write_(module, target)
    assert module.weight is parameter
    assert not module.weight.requires_grad
    # Half a step of a row's largest / 127, and the largest of some 50 normal values is about 3.
    assert relative(codec.read(module), target) < 1.5e-2
    with torch.no_grad():
        for mode in (True, False):
            y = codec.forward(module.train(mode), x)
            # Evaluation also quantizes the activations: 0.6-0.9 % apart.
            assert relative(y, x @ codec.read(module).t() + module.bias) < (1e-5 if mode else 2.5e-2)


def test_codes_are_bitsandbytes() -> None:
    weight = torch.randn(32, 64)
    weight[3] = 0
    module = stock()
    expected = Linear8bitLt(64, 32, has_fp16_weights=False)
    expected.weight.data = weight.half()
    expected = expected.to("cpu")
    codec_for(module).write_(module, weight)
    built = quantize_linear_int8(nn.Linear(64, 32), weight)
    for ours in (module, built):
        assert torch.equal(ours.weight.data, expected.weight.data)
        assert torch.equal(ours.weight.SCB, expected.weight.SCB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(32, 64), (37, 33), (1, 1), (3, 4097)])
def test_codes_are_bitsandbytes_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    ties = torch.randint(-127, 127, shape) + 0.5
    ties[:, 0] = 127  # the scale's step is then 1
    ends = torch.randn(shape) * torch.tensor([6e-8, 1.0, 6e4])[torch.randint(3, (shape[0], 1))]
    zeros = torch.randn(shape)
    zeros[-1] = 0
    for weight in (torch.randn(shape), ties, ends.clamp(-6e4, 6e4), zeros):
        codes, scales, _ = int8_vectorwise_quant(weight.to(dtype).half())
        codes[scales == 0] = 0  # bitsandbytes divides a row of zeros by 0
        module = quantize_linear_int8(nn.Linear(shape[1], shape[0]), weight.to(dtype))
        assert torch.equal(module.weight.data, codes)
        assert torch.equal(module.weight.SCB, scales)


@pytest.mark.parametrize("forwarded", [False, True])
def test_restore_is_bitwise(forwarded: bool) -> None:
    module, x = stock().eval(), torch.randn(2, 64)
    codec = codec_for(module)
    if forwarded:
        module(x)
    snapshot, before, bits = codec.snapshot(module), codec.read(module), module.weight.data.clone()
    for _ in range(2):
        codec.write_(module, torch.randn(32, 64))
        module(x)
        codec.restore_(module, snapshot)
        assert torch.equal(module.weight.data, bits)
        assert torch.equal(codec.read(module), before)
        assert relative(module(x), x @ before.t() + module.bias) < 2.5e-2


@pytest.mark.parametrize("train", [True, False])
def test_weights_kept_in_floating_point(train: bool) -> None:
    module = stock(has_fp16_weights=True).train(train).requires_grad_(False)
    codec, x = codec_for(module), torch.randn(3, 64)
    module(x)
    weight = torch.randn(32, 64)
    snapshot, before = codec.snapshot(module), codec.read(module)
    codec.write_(module, weight)
    assert torch.equal(codec.read(module), weight)
    with torch.no_grad():  # an evaluation forward would otherwise use the codes it cached
        assert relative(module(x), x @ weight.t() + module.bias) < 3e-2
    codec.restore_(module, snapshot)
    assert torch.equal(codec.read(module), before)
    with torch.no_grad():
        assert relative(module(x), x @ before.t() + module.bias) < 3e-2


def test_not_yet_quantized() -> None:
    module = Linear8bitLt(64, 32, has_fp16_weights=False)
    codec_for(module).write_(module, torch.ones(32, 64))
    assert torch.equal(codec_for(module).read(module), torch.ones(32, 64))
    module = module.to("cpu")
    assert module.weight.dtype == torch.int8
    torch.testing.assert_close(codec_for(module).read(module), torch.ones(32, 64))


def test_codes_without_scales_are_refused() -> None:
    module = stock()
    module.weight.SCB = None
    with pytest.raises(CodecError, match=r"Linear8bitLt\(in_features=64.*weight\.SCB or state\.SCB.*found neither"):
        codec_for(module).read(module)


def test_refused_writes_change_nothing() -> None:
    module = stock()
    codec, before = codec_for(module), codec_for(module).read(module)
    with pytest.raises(CodecError, match=r"shape \(32, 64\).*found \(64, 32\)"):
        codec.write_(module, before.t())
    with pytest.raises(CodecError, match=r"finite in torch\.float16"):
        codec.write_(module, torch.full((32, 64), 1e5))
    assert torch.equal(codec.read(module), before)


def test_stored_bias_keeps_its_precision() -> None:
    module, x = stock(), torch.randn(2, 64).to(torch.bfloat16)
    bias = module.bias.detach().clone()
    y = codec_for(module).forward(module, x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(module.bias, bias)
    assert relative(y.detach(), x.float() @ codec_for(module).read(module).t() + bias) < 2e-2
    module(x)
    assert module.bias.dtype == torch.bfloat16  # the platform's forward casts it for good


@pytest.mark.parametrize("train", [True, False])
def test_gradients(train: bool) -> None:
    module = stock().train(train)
    x = torch.randn(2, 3, 64, requires_grad=True)
    codec_for(module).forward(module, x).sum().backward()
    expected = codec_for(module).read(module).sum(0).expand(2, 3, -1)
    torch.testing.assert_close(x.grad, expected, atol=1e-4, rtol=1e-4)  # float32 sums of 32


def test_dense_like_bytes_and_dtype() -> None:
    linear = nn.Linear(64, 32).to(torch.bfloat16).eval()
    module = quantize_linear_int8(linear, linear.weight.float())
    codec = codec_for(module)
    assert codec.nbytes(module) == 32 * 64 + 32 * 4
    assert codec.compute_dtype(module) == torch.bfloat16
    assert not module.training
    dense = codec.dense_like(module, torch.float32)
    assert type(dense) is nn.Linear
    assert not dense.training
    assert torch.equal(dense.weight, codec.read(module))
    assert codec.compute_dtype(stock(bias=False)) == torch.float32
    meta = Linear8bitLt(64, 32, has_fp16_weights=False, device="meta")
    assert codec.shape(meta) == (32, 64)
    assert codec.nbytes(meta) > 0


@pytest.mark.parametrize("forwards", [0, 1])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("out", "fan_in"), [(32, 64), (37, 33)])
@torch.no_grad()
def test_codes_are_taken(out: int, fan_in: int, train: bool, forwards: int) -> None:
    module = Linear8bitLt(fan_in, out, has_fp16_weights=False).to("cpu").train(train)
    for _ in range(forwards):  # the scales then lie elsewhere
        module(torch.randn(2, fan_in))
        assert module.weight.SCB is None
    codec = codec_for(module)
    weight, quantized = codec.read(module), codec.quantized(module)
    assert quantized is not None
    assert torch.equal(quantized.dequantize(), weight)
    check_codes_taken(module, fan_in)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("forwarded", [False, True])
def test_codes_that_a_move_left_behind(forwarded: bool) -> None:
    """Moving a model sets the data of its parameters; bitsandbytes' second hold on the codes stays where it was."""
    module = stock()
    codec, x = codec_for(module), torch.randn(3, 64)
    expected = codec.forward(module if forwarded else copy.deepcopy(module), x)
    holder = module.state if forwarded else module.weight
    assert holder.CB is not None
    holder.CB = holder.CB.to("meta")
    assert torch.equal(codec.forward(module, x), expected)
    assert module.state.CB.device == module.weight.device
