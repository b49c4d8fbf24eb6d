"""The packed linear as a function: outputs and gradients, and adapters that train and merge over it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import quantization as ref
from torch import Tensor, nn

from qlora_kit import AdapterLayer, LoraConfig, LoraModel, apply_lora, merge, quantize_
from qlora_kit.codecs import codec_for
from qlora_kit.codecs.packed import PackedLinear, pack_linear
from qlora_kit.codecs.quantized import quantize_matrix

TYPES = ["signed2", "affine2", "signed3", "affine3", "nf4", "uniform8"]
SHAPES = [(16, 64), (37, 96), (7, 5), (33, 47)]
every_type = pytest.mark.parametrize("quant_type", TYPES)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def make(out: int, fan_in: int, quant_type: str = "signed2", *, bias: bool = True, **kwargs: Any) -> PackedLinear:
    linear = nn.Linear(fan_in, out, bias=bias)
    return pack_linear(linear, quantize_matrix(linear.weight.detach(), quant_type, **kwargs))


def outcome(module: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and the bias."""
    x = x.clone().requires_grad_()
    module.bias.requires_grad_()
    module.bias.grad = None
    y = module(x)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, module.bias.grad]


def dense_twin(module: PackedLinear) -> nn.Linear:
    dense = nn.Linear(module.in_features, module.out_features)
    dense.weight = nn.Parameter(codec_for(module).read(module), requires_grad=False)
    dense.bias = nn.Parameter(module.bias.detach().float().clone())
    return dense


def assert_close(found: list[Tensor], expected: list[Tensor], relative: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracing does it
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["signed2", "affine3"])
def test_compiled_alone_without_a_break(quant_type: str, double_quant: bool) -> None:
    module = make(7, 33, quant_type, double_quant=double_quant)
    x, grad = torch.randn(5, 33), torch.randn(5, 7)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = compiled(x), *outcome(compiled, x, grad)
    torch._dynamo.reset()
    assert_close(list(found), [module(x), *outcome(dense_twin(module), x, grad)], 1e-5)  # sums in another order


@pytest.mark.parametrize("double_quant", [False, True])
@every_shape
@every_type
def test_output_and_gradients_are_the_dense_layers(quant_type: str, shape: tuple[int, int], double_quant: bool) -> None:
    module = make(*shape, quant_type, double_quant=double_quant)
    x, grad = torch.randn(2, 3, shape[1]), torch.randn(2, 3, shape[0])
    # The same float32 products; sums of up to 96 terms may be in another order.
    assert_close(outcome(module, x, grad), outcome(dense_twin(module), x, grad), 1e-6)
    assert module.weight.grad is None


# Sums in 16 bits: a rounding or two of the result.
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.bfloat16, 1.6e-2), (torch.float16, 2e-3), (torch.float64, 1e-14)]
)
@every_shape
@pytest.mark.parametrize("cast_module", [False, True])
def test_it_computes_in_its_inputs_dtype(
    dtype: torch.dtype, relative: float, shape: tuple[int, int], cast_module: bool
) -> None:
    module = make(*shape, "signed3")
    dense = dense_twin(module).to(dtype)
    x, grad = torch.randn(5, shape[1]).to(dtype), torch.randn(5, shape[0]).to(dtype)
    if cast_module:
        module.to(dtype)
    found, expected = outcome(module, x, grad), outcome(dense, x, grad)
    assert_close(found[:2], expected[:2], relative)
    assert found[2].dtype == module.bias.dtype
    assert_close([found[2].to(dtype)], expected[2:], max(relative, 1e-7))  # a float32 bias has a float32 gradient


@every_type
@pytest.mark.slow
def test_float64_gradients_are_the_references(quant_type: str) -> None:
    module = make(7, 13, quant_type, blocksize=16, double_quant=True).double()
    module.bias.requires_grad_()
    weight, x = ref.read_packed(module), torch.randn(4, 13, dtype=torch.float64, requires_grad=True)
    expected = x.detach().numpy() @ weight.T + module.bias.detach().numpy()
    np.testing.assert_allclose(module(x).detach().numpy(), expected, atol=2e-6)  # the scales are read in float32
    assert torch.autograd.gradcheck(lambda x, bias: module(x), (x, module.bias))


def test_frozen_inputs_and_biases_get_no_gradient() -> None:
    module = make(33, 47)
    module.bias.requires_grad_(False)
    assert not module(torch.randn(2, 47)).requires_grad
    x = torch.randn(2, 47, requires_grad=True)
    module(x).sum().backward()
    assert module.bias.grad is None
    module.bias.requires_grad_()
    module(torch.randn(2, 47)).sum().backward()
    torch.testing.assert_close(module.bias.grad, torch.full((33,), 2.0))


def test_without_a_bias() -> None:
    module = make(33, 47, bias=False)
    x = torch.randn(2, 47, requires_grad=True)
    weight = codec_for(module).read(module)
    torch.testing.assert_close(module(x), F.linear(x, weight))
    (grad,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).expand(2, 47))


@pytest.mark.parametrize("shape", [(47,), (0, 47), (2, 0, 47), (1, 47), (2, 3, 47), (2, 2, 3, 47)])
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    module = make(33, 47, "affine3")
    x, grad = torch.randn(shape), torch.randn(*shape[:-1], 33)
    found, expected = outcome(module, x, grad), outcome(dense_twin(module), x, grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32 sums of 47 terms


@every_shape
def test_under_autocast_it_is_the_dense_layer_under_autocast(shape: tuple[int, int]) -> None:
    module = make(*shape, "signed2")
    x, grad = torch.randn(5, shape[1]), torch.randn(5, shape[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = outcome(module, x, grad), outcome(dense_twin(module), x, grad)
    assert (found[0].dtype, found[1].dtype, found[2].dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert_close(found, expected, 1.6e-2)  # bfloat16 has 8 bits: two roundings


def test_inputs_that_are_no_whole_rows_of_memory() -> None:
    module = make(33, 47)
    x = torch.randn(47, 6).t()
    torch.testing.assert_close(module(x), module(x.contiguous()))


def net(quant_type: str, double_quant: bool = False) -> nn.Sequential:
    """47 -> 33 -> 4; none of them a whole number of blocks or groups."""
    first, second = (make(*size, quant_type, double_quant=double_quant) for size in ((33, 47), (4, 33)))
    return nn.Sequential(first, nn.Tanh(), second)


def adapted(quant_type: str, double_quant: bool = False) -> LoraModel:
    return apply_lora(net(quant_type, double_quant), LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))


def base_bits(lora: LoraModel) -> dict[str, bytes]:
    return {
        f"{path} {name}": tensor.numpy().tobytes()
        for path, layer in lora.adapter_layers().items()
        for name, tensor in layer.base_layer.state_dict().items()
    }


def randomize_(lora: LoraModel) -> None:
    with torch.no_grad():
        for layer in lora.adapter_layers().values():
            for factor in layer.adapter_tensors("default").values():
                factor.copy_(torch.randn_like(factor) * 0.15)


@pytest.mark.parametrize("double_quant", [False, True])
@every_type
@pytest.mark.slow
def test_adapters_train_over_it_and_leave_it(quant_type: str, double_quant: bool) -> None:
    lora = adapted(quant_type, double_quant)
    x, target, before = torch.randn(32, 47), torch.randn(32, 4), base_bits(lora)
    optimizer = torch.optim.Adam([p for p in lora.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(lora(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert base_bits(lora) == before
    assert all("lora_" in name for name, p in lora.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("double_quant", [False, True])
@every_type
def test_merging_requantizes_and_unmerging_gives_every_bit_back(quant_type: str, double_quant: bool) -> None:
    lora = adapted(quant_type, double_quant).eval()
    randomize_(lora)
    before, x = base_bits(lora), torch.randn(3, 47)
    y = lora(x)
    sums = {path: read(layer) + layer.delta("default") for path, layer in lora.adapter_layers().items()}
    lora.merge_adapter()
    assert base_bits(lora) != before
    for path, layer in lora.adapter_layers().items():
        expected = quantize_matrix(sums[path], quant_type, double_quant=double_quant).dequantize()
        assert torch.equal(read(layer), expected)
    lora.unmerge_adapter()
    assert base_bits(lora) == before
    assert torch.equal(lora(x), y)


def read(layer: AdapterLayer) -> Tensor:
    return layer.codec.read(layer.base_layer)


@pytest.mark.parametrize("into", ["float32", "bfloat16"])
@every_type
def test_merging_into_a_dense_model_adds_the_deltas(quant_type: str, into: str) -> None:
    lora = adapted(quant_type, double_quant=True).eval()
    randomize_(lora)
    expected = {path: read(layer) + layer.delta("default") for path, layer in lora.adapter_layers().items()}
    merged = merge(lora, into=into).model
    for path, weight in expected.items():
        module = merged.get_submodule(path)
        assert type(module) is nn.Linear
        assert torch.equal(module.weight, weight.to(getattr(torch, into)))


@every_type
def test_merging_into_the_same_storage_stays_packed(quant_type: str) -> None:
    lora = adapted(quant_type).eval()
    randomize_(lora)
    expected = [
        quantize_matrix(read(layer) + layer.delta("default"), quant_type).dequantize()
        for layer in lora.adapter_layers().values()
    ]
    merged = merge(lora).model
    for path, weight in zip(("0", "2"), expected, strict=True):
        module = merged.get_submodule(path)
        assert isinstance(module, PackedLinear)
        assert torch.equal(codec_for(module).read(module), weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 64), (33, 47), (1, 5), (40, 96)])
def test_forward_and_gradients_are_those_of_the_dense_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    module = make(*shape, "lloyd3")
    dense = codec_for(module).read(module)
    module.bias.requires_grad_()
    x = torch.randn(3, 2, shape[1], dtype=dtype, requires_grad=True)
    out = module(x)
    assert out.dtype == dtype
    weights = torch.randn(out.shape, dtype=dtype)
    got = torch.autograd.grad((out * weights).sum(), [x, module.bias])
    y, W, b = x.detach().double().requires_grad_(), dense.double(), module.bias.detach().double().requires_grad_()
    expected_out = F.linear(y, W, b)
    expected = torch.autograd.grad((expected_out * weights.double()).sum(), [y, b])
    # one rounding of inputs, weights and sums to the dtype's digits
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for ours, reference in [(out, expected_out), *zip(got, expected, strict=True)]:
        torch.testing.assert_close(ours.double(), reference, rtol=tolerance, atol=tolerance)


def test_autocast_and_empty_batches() -> None:
    module = make(24, 64)
    dense = codec_for(module).read(module)
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    torch.testing.assert_close(module(x), F.linear(x, dense, module.bias))
    assert module(x[:0]).shape == (0, 24)


def two_bits() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    return quantize_(net, 2, double_quant=True, target_modules=["0", "2"])


def test_adapters_train_through_it() -> None:
    lora = apply_lora(two_bits(), LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    before = base_bits(lora)
    x, y = torch.randn(16, 64), torch.randn(16, 64)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(lora(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    lora.eval()(x)
    assert base_bits(lora) == before
    trainable, total = lora.get_nb_trainable_parameters()
    assert trainable == 4 * (64 + 96) * 2
    assert total == trainable + 2 * 64 * 96 + 96 + 64, "packed weights count as weights"


def test_merge_and_the_way_back() -> None:
    lora = apply_lora(two_bits(), LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    layer = lora.model.get_submodule("0")
    before, read = base_bits(lora), codec_for(layer.base_layer).read(layer.base_layer)
    delta = layer.delta("default")
    lora.merge_adapter()
    assert not torch.equal(codec_for(layer.base_layer).read(layer.base_layer), read)
    lora.unmerge_adapter()
    assert base_bits(lora) == before
    dense = merge(lora, into="float32").model
    torch.testing.assert_close(dense.get_submodule("0").weight.detach(), read + delta)
