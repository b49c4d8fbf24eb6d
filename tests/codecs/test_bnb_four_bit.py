"""4-bit weights are read, written and multiplied right on the stock build, where it isn't."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Embedding4bit, Linear4bit
from codes_taken import check_codes_taken
from four_bit_linears import FAULTY, SHAPES, STORAGES, make, relative, stock, storage_fits
from reference import quantization as ref
from torch import nn

from qlora_kit.codecs import codec_for, shielded_storage
from qlora_kit.codecs.bnb import kernel_is_right, quantize_linear
from qlora_kit.codecs.dense import DenseCodec
from qlora_kit.errors import CodecError, UnsupportedModuleError


def test_what_is_dropped_is_freed_at_once() -> None:
    module = make(64, 64, 64)
    found = weakref.ref(module.weight.untyped_storage())
    gc.disable()
    try:
        del module
        assert found() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("out", "fan_in", "blocksize"), SHAPES)
@pytest.mark.slow
def test_read_and_write(
    out: int, fan_in: int, blocksize: int, quant_type: str, double_quant: bool, storage: torch.dtype
) -> None:
    if not storage_fits(out, fan_in, storage):
        pytest.skip(f"{out}x{fan_in} nibbles aren't a whole number of {storage} values")
    module = make(out, fan_in, blocksize, quant_type=quant_type, double_quant=double_quant, quant_storage=storage)
    codec, parameter, state = codec_for(module), module.weight, module.quant_state
    weight = codec.read(module)
    assert weight.shape == codec.shape(module) == (out, fan_in)
    assert weight.dtype == torch.float32
    # The tables' constants agree to 2e-7; float32 products add 6e-8, and the sum with the offset as much.
    assert relative(weight, ref.read_linear4bit(module)) < 1e-6

    packed = module.weight.data.clone()
    codec.write_(module, weight)
    if double_quant:
        # Requantizing the 8-bit scales moves them by at most half a step of their table: 1 % of the largest.
        assert relative(codec.read(module), weight) < 1e-2
    else:
        if quant_type == "nf4":  # FP4 has two codes for zero, and a value that was rounded to it is on their tie
            assert torch.equal(module.weight.data.view(torch.uint8), packed.view(torch.uint8))
        assert torch.equal(codec.read(module), weight)

    codec.write_(module, 3 * torch.roll(weight, 1, 0))
    assert relative(codec.read(module), 3 * torch.roll(weight, 1, 0)) < 0.2
    assert relative(codec.read(module), ref.read_linear4bit(module)) < 1e-6
    assert module.weight is parameter
    assert module.quant_state is module.weight.quant_state is state
    assert state.nested is double_quant
    assert (state.quant_type, state.blocksize) == (quant_type, blocksize)
    assert module.weight.dtype == storage
    assert not module.weight.requires_grad


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_blocksize(blocksize: int) -> None:
    module = make(33, 160, blocksize)
    assert relative(codec_for(module).read(module), ref.read_linear4bit(module)) < 1e-6


def test_read_ignores_the_recorded_dtype() -> None:
    module = make(32, 64, compute_dtype=torch.bfloat16)
    rounded = dequantize_4bit(module.weight.data, module.quant_state)
    assert relative(rounded, ref.read_linear4bit(module)) > 5e-4  # the platform's: bfloat16
    assert relative(codec_for(module).read(module), ref.read_linear4bit(module)) < 1e-6


# --- shapes for which the CPU kernels take the wrong scales


@pytest.mark.parametrize(("out", "fan_in", "blocksize"), FAULTY)
def test_wrong_scales_on_cpu(out: int, fan_in: int, blocksize: int) -> None:
    module = make(out, fan_in, blocksize)
    expected, x = ref.read_linear4bit(module), torch.randn(5, fan_in)
    if relative(dequantize_4bit(module.weight.data, module.quant_state), expected) < 1e-3:
        pytest.skip("this bitsandbytes build dequantizes such shapes right on this CPU")
    target = torch.as_tensor(expected) @ x.double().t() + module.bias.double()[:, None]
    with torch.no_grad():
        assert relative(Linear4bit.forward(module, x), target.t()) > 0.05  # the platform's forward shares the fault
        assert relative(codec_for(module).forward(module, x), target.t()) < 1e-5
    assert not kernel_is_right(module, x)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("out", "fan_in", "blocksize"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients(out: int, fan_in: int, blocksize: int, train: bool, dtype: torch.dtype) -> None:
    module = make(out, fan_in, blocksize, compute_dtype=dtype).train(train)
    module.bias.requires_grad_(True)
    codec, before = codec_for(module), module.weight.data.clone()
    W = torch.as_tensor(ref.read_linear4bit(module))
    x = torch.randn(2, 3, fan_in).to(dtype).requires_grad_()
    g = torch.randn(2, 3, out).to(dtype)
    # float32: rounding of sums of some hundred terms. bfloat16: 2^-9 each for W, x W^T and the bias.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    y = codec.forward(module, x)
    assert y.dtype == dtype
    assert relative(y, x.detach().double() @ W.t() + module.bias.detach().double()) < tolerance
    y.backward(g)
    assert relative(x.grad, g.double() @ W) < tolerance
    assert relative(module.bias.grad, g.double().sum((0, 1))) < tolerance
    with torch.no_grad():
        assert torch.equal(codec.forward(module, x), y)
    assert torch.equal(module.weight.data, before)
    assert module.bias.dtype == torch.float32


@pytest.mark.parametrize("fan_in", [64, 96])
def test_dtypes_as_the_stock_forward(fan_in: int) -> None:
    module = make(32, fan_in, compute_dtype=torch.bfloat16)
    codec, x = codec_for(module), torch.randn(2, fan_in)
    W = torch.as_tensor(ref.read_linear4bit(module))
    target = x.double() @ W.t() + module.bias.detach().double()
    for cast in (torch.float32, torch.bfloat16, torch.float16):
        y = codec.forward(module, x.to(cast))
        assert y.dtype == cast
        assert relative(y, target) < 1.5e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert codec.forward(module, x).dtype == torch.float32
        assert relative(codec.forward(module, x), target) < 1.5e-2


def test_no_dense_weight_is_kept_for_backward() -> None:
    module = make(64, 160)
    x, sizes = torch.randn(2, 160, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        codec_for(module).forward(module, x * 1.0)
    assert max(sizes, default=0) < 64 * 160


def test_stored_bias_keeps_its_precision() -> None:
    linear = nn.Linear(64, 32)
    stocked = quantize_linear(linear, linear.weight, compute_dtype=torch.bfloat16)
    stocked(torch.randn(1, 64))
    assert stocked.bias.dtype == torch.bfloat16  # the platform's forward casts it for good
    ours = quantize_linear(linear, linear.weight, compute_dtype=torch.bfloat16)
    codec_for(ours).forward(ours, torch.randn(1, 64))
    assert torch.equal(ours.bias, linear.bias)


def test_unsettled_compute_dtype_follows_the_first_input() -> None:
    module = stock(32, 96)
    assert codec_for(module).forward(module, torch.randn(1, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert codec_for(module).compute_dtype(module) == torch.bfloat16


# --- casts, snapshots, copies, refusals


@pytest.mark.parametrize("storage", STORAGES)
def test_casts_leave_shielded_storage_alone(storage: torch.dtype) -> None:
    tree = nn.Sequential(make(32, 64, quant_storage=storage), nn.LayerNorm(32))
    codec, before = codec_for(tree[0]), codec_for(tree[0]).read(tree[0])
    for cast in (torch.float32, torch.float16, torch.bfloat16):
        with shielded_storage(tree):
            tree.to(cast)
        assert torch.equal(codec.read(tree[0]), before)
        assert tree[0].weight.dtype == storage
        assert tree[1].weight.dtype == cast
    assert tree[0](torch.randn(2, 64)).isfinite().all()


def test_an_unshielded_cast_destroys_float_storage() -> None:
    module = make(32, 64, quant_storage=torch.bfloat16)
    before = codec_for(module).read(module)
    module.to(torch.float32)
    assert module.weight.nbytes == 2 * before.numel() // 2  # twice the bytes: the codes were taken for numbers


def test_shielding_ends_when_the_cast_fails() -> None:
    module = make(32, 64, quant_storage=torch.bfloat16)
    shield = shielded_storage(nn.Sequential(module))
    shield.__enter__()
    assert module.weight.dtype == torch.uint8
    stop = RuntimeError("stop")
    shield.__exit__(RuntimeError, stop, None)
    assert module.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("double_quant", [False, True])
def test_restore_is_bitwise(double_quant: bool) -> None:
    module = make(37, 96, double_quant=double_quant)
    codec, state = codec_for(module), module.quant_state
    snapshot, before, bits = codec.snapshot(module), codec.read(module), module.weight.data.clone()
    for _ in range(2):
        codec.write_(module, before * 2)
        codec.restore_(module, snapshot)
        assert torch.equal(module.weight.data, bits)
        assert torch.equal(codec.read(module), before)
    assert module.quant_state is module.weight.quant_state is state
    assert torch.equal(codec.read(copy.deepcopy(module)), before)


def test_a_state_that_only_the_module_has() -> None:
    module = make(37, 96)
    before = codec_for(module).read(module)
    module.weight.quant_state = None
    assert torch.equal(codec_for(module).read(module), before)


def test_refused_writes_change_nothing() -> None:
    module = make(32, 64)
    codec, before = codec_for(module), codec_for(module).read(module)
    with pytest.raises(CodecError, match=r"Linear4bit\(in_features=64.*shape \(32, 64\).*found \(64, 32\)"):
        codec.write_(module, before.t())
    with pytest.raises(CodecError, match=r"finite in torch\.float32, found NaN or infinity"):
        codec.write_(module, before * torch.inf)
    assert torch.equal(codec.read(module), before)


def test_not_yet_quantized() -> None:
    module = Linear4bit(64, 32, quant_type="nf4")
    codec = codec_for(module)
    codec.write_(module, torch.ones(32, 64))
    assert torch.equal(codec.read(module), torch.ones(32, 64))
    with pytest.raises(CodecError, match=r"expected a quantized weight.*model\.to"):
        codec.forward(module, torch.randn(1, 64))


def test_dense_like_and_bytes() -> None:
    module = make(32, 64, double_quant=True).eval()
    codec = codec_for(module)
    dense = codec.dense_like(module, torch.float32)
    assert type(dense) is nn.Linear
    assert not dense.training
    assert torch.equal(dense.weight, codec.read(module))
    assert torch.equal(dense.bias, module.bias)
    assert dense.bias is not module.bias
    assert codec.dense_like(module, torch.bfloat16).bias.dtype == torch.bfloat16
    assert codec.nbytes(module) == 32 * 64 // 2 + 32 + 4 + 4  # codes, 8-bit scales, their scale, the offset


def test_quantize_linear_takes_over_the_layer() -> None:
    linear = nn.Linear(64, 32).to(torch.bfloat16).eval()
    module = quantize_linear(linear, linear.weight.float(), quant_type="fp4", blocksize=128)
    assert not module.training
    assert not module.support_avx512bf16_for_cpu
    assert torch.equal(module.bias, linear.bias)
    assert module.bias is not linear.bias
    assert codec_for(module).compute_dtype(module) == torch.bfloat16
    assert (module.weight.quant_type, module.weight.blocksize) == ("fp4", 128)
    with pytest.raises(CodecError, match=r"found \(64, 32\)"):
        quantize_linear(linear, linear.weight.t())


def test_meta_modules_are_described() -> None:
    module = Linear4bit(64, 32, compute_dtype=torch.bfloat16, device="meta")
    codec = codec_for(module)
    assert codec.shape(module) == (32, 64)
    assert codec.compute_dtype(module) == torch.bfloat16
    assert codec.device(module).type == "meta"
    assert codec.nbytes(module) > 0


def test_packed_embeddings_are_refused_by_name() -> None:
    module = Embedding4bit(16, 64, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    with pytest.raises(CodecError, match=r"Embedding4bit.*floating-point weight, found Params4bit"):
        DenseCodec().read(module)
    with pytest.raises(UnsupportedModuleError, match=r"words: expected .*Embedding4bit .*Params4bit"):
        codec_for(module, "words")


@pytest.mark.cuda
@pytest.mark.parametrize(("out", "fan_in", "blocksize"), SHAPES)
def test_on_cuda(out: int, fan_in: int, blocksize: int) -> None:
    linear = nn.Linear(fan_in, out, device="cuda")
    module = quantize_linear(linear, torch.randn(out, fan_in), blocksize=blocksize, double_quant=True)
    codec, x = codec_for(module), torch.randn(4, fan_in, device="cuda", requires_grad=True)
    weight = codec.read(module)
    assert weight.is_cuda
    y = codec.forward(module, x)
    assert relative(y.cpu(), (x.double() @ weight.double().t() + module.bias.double()).cpu()) < 1e-2  # may use TF32
    y.sum().backward()
    assert relative(x.grad.cpu(), weight.double().sum(0).expand(4, -1).cpu()) < 1e-2


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("out", "fan_in", "blocksize"), [(32, 64, 64), (37, 96, 64), (5, 7, 64), (8, 512, 4096)])
@pytest.mark.slow
def test_codes_are_taken(
    out: int, fan_in: int, blocksize: int, quant_type: str, double_quant: bool, storage: torch.dtype
) -> None:
    """5 x 7 is an odd number of codes: the last byte has one."""
    if not storage_fits(out, fan_in, storage):
        pytest.skip(f"{out}x{fan_in} nibbles aren't a whole number of {storage} values")
    settings: dict[str, Any] = {"quant_type": quant_type, "double_quant": double_quant, "quant_storage": storage}
    check_codes_taken(make(out, fan_in, blocksize, **settings).eval(), fan_in)
