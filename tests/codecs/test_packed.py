"""``PackedLinear``: what it holds, computes, keeps through casts and copies, and how adapters live on it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit import LoraConfig, apply_lora, codec_for, merge, quantize_
from qlora_kit.codecs.packed import PackedLinear, pack_linear
from qlora_kit.codecs.quantized import quantize_matrix
from qlora_kit.errors import CodecError, TargetError
from qlora_kit.preparation.kbit import memory_bill

KINDS = ["nf2", "signed2", "affine2", "nf3", "lloyd3", "uniform4", "affine8"]
SHAPES = [(24, 64), (33, 47), (1, 5), (40, 96)]


def make(
    shape: tuple[int, int] = (24, 64),
    kind: str = "signed2",
    bias: bool = True,
    blocksize: int = 64,
    double: bool = False,
) -> tuple[PackedLinear, Tensor]:
    """A packed linear, and the dense matrix it stands for."""
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    quantized = quantize_matrix(linear.weight.detach(), kind, blocksize, double_quant=double)
    return pack_linear(linear, quantized), quantized.dequantize()


def stored(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in codec_for(module).stored(module)]


def assert_same(module: nn.Module, before: list[Tensor]) -> None:
    after = codec_for(module).stored(module)
    assert len(after) == len(before)
    for new, old in zip(after, before, strict=True):
        assert new.dtype == old.dtype
        assert torch.equal(new, old)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reads_back_what_was_quantized(shape: tuple[int, int], kind: str, double: bool) -> None:
    module, dense = make(shape, kind, double=double)
    assert torch.equal(codec_for(module).read(module), dense)


@pytest.mark.parametrize(
    ("kind", "double", "bits"),
    [("signed2", False, 2.5), ("signed2", True, 2.127), ("lloyd3", False, 3.5), ("lloyd3", True, 3.127)],
)
def test_bytes_a_weight(kind: str, double: bool, bits: float) -> None:
    module, _ = make((512, 512), kind, bias=False, double=double)
    counted = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    assert codec_for(module).nbytes(module) == counted
    assert 8 * counted / 512**2 == pytest.approx(bits, abs=2e-3)  # the table and the offset are some 36 bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_are_those_of_the_dense_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    module, dense = make(shape, "lloyd3")
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
    module, dense = make()
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    torch.testing.assert_close(module(x), F.linear(x, dense, module.bias))
    assert module(x[:0]).shape == (0, 24)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    return quantize_(net, 2, double_quant=True, target_modules=["0", "2"])


def test_adapters_train_through_it() -> None:
    net = model()
    before = [stored(net[0]), stored(net[2])]
    lora = apply_lora(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
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
    for path, tensors in zip(("0", "2"), before, strict=True):
        assert_same(lora.model.get_submodule(path).base_layer, tensors)
    trainable, total = lora.get_nb_trainable_parameters()
    assert trainable == 4 * (64 + 96) * 2
    assert total == trainable + 2 * 64 * 96 + 96 + 64, "packed weights count as weights"


def test_the_memory_bill_counts_every_byte_once() -> None:
    net = model()
    bill = memory_bill(net)
    assert bill.total == sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
    assert bill.bytes["k-bit weights"] == 2 * 64 * 96 // 4


def test_merge_and_the_way_back() -> None:
    lora = apply_lora(model(), LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    layer = lora.model.get_submodule("0")
    before, read = stored(layer.base_layer), codec_for(layer.base_layer).read(layer.base_layer)
    delta = layer.delta("default")
    lora.merge_adapter()
    assert not torch.equal(codec_for(layer.base_layer).read(layer.base_layer), read)
    lora.unmerge_adapter()
    assert_same(layer.base_layer, before)
    dense = merge(lora, into="float32").model
    torch.testing.assert_close(dense.get_submodule("0").weight.detach(), read + delta)


def test_requantizing_what_was_read_doesn_t_shrink_it() -> None:
    """A fitted table stays short of its block's largest value; scales that follow it would shrink every time."""
    for kind in KINDS:
        module, dense = make((40, 96), kind)
        codec = codec_for(module)
        for _ in range(3):
            codec.write_(module, codec.read(module))
        torch.testing.assert_close(codec.read(module), dense, rtol=1e-6, atol=1e-7)  # scales round in float32


@pytest.mark.parametrize("double", [False, True])
def test_casts_leave_codes_and_scales_alone(double: bool) -> None:
    module, dense = make((33, 47), "affine2", double=double)
    before = stored(module)
    for cast in (module.half, module.bfloat16, module.double, module.float):
        cast()
        assert_same(module, before)
    assert module.half().bias.dtype == torch.float16
    assert module.compute_dtype == torch.float16
    assert torch.equal(codec_for(module).read(module), dense)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["signed2", "affine3"])
def test_state_dict_copies_and_pickles(kind: str, double: bool) -> None:
    module, dense = make((33, 47), kind, double=double)
    options = {"quant_type": kind, "double_quant": double}
    empty = PackedLinear(47, 33, **options, device="meta")
    empty.load_state_dict(module.state_dict(), assign=True)
    filled = PackedLinear(47, 33, **options)
    filled.load_state_dict(module.state_dict())
    data = io.BytesIO()
    torch.save(module, data)
    data.seek(0)
    for other in (empty, filled, copy.deepcopy(module), torch.load(data, weights_only=False)):
        assert torch.equal(codec_for(other).read(other), dense)
        assert torch.equal(other.bias, module.bias)
    assert module.to("meta").weight.is_meta


def test_what_doesn_t_fit_is_refused_and_changes_nothing() -> None:
    module, _ = make()
    before = stored(module)
    codec = codec_for(module)
    with pytest.raises(CodecError, match=r"expected a weight of shape \(24, 64\)"):
        codec.write_(module, torch.zeros(64, 24))
    with pytest.raises(CodecError, match="NaN or infinity"):
        codec.write_(module, torch.full((24, 64), float("nan")))
    with pytest.raises(CodecError, match=r"bits: expected one of \[2, 3, 4, 8\] to pack, found 5"):
        PackedLinear(8, 8, quant_type="uniform5")
    assert_same(module, before)


def test_snapshot_and_restore_are_bitwise() -> None:
    module, _ = make((33, 47), "affine3", double=True)
    codec, before = codec_for(module), stored(module)
    snapshot = codec.snapshot(module)
    codec.write_(module, torch.randn(33, 47))
    codec.restore_(module, snapshot)
    assert_same(module, before)


def test_quantizing_a_model_is_all_or_nothing() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(3, 3, 1))
    first = net[0]
    with pytest.raises(TargetError, match="1: expected a dense linear layer to quantize, found Conv2d"):
        quantize_(net, 2, target_modules=["0", "1"])
    assert net[0] is first
    with torch.no_grad():
        first.weight[0, 0] = 1e6
    with pytest.raises(CodecError, match="below 65504"):
        quantize_(net, 8, target_modules=["0"])
    assert net[0] is first
