"""The packed linear as storage: what it reads, holds and writes, and that copies and casts keep it bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from codes_taken import check_codes_taken
from reference import quantization as ref
from torch import Tensor, nn

from qlora_kit.codecs import codec_for
from qlora_kit.codecs.codebooks import SCHEMES, codebook
from qlora_kit.codecs.packed import PackedLinear, pack_linear
from qlora_kit.codecs.quantized import quantize_matrix
from qlora_kit.errors import CodecError

TYPES = [name for name, kind in SCHEMES.items() if kind.bits in (2, 3, 4, 8)]
FEW = ["signed2", "affine2", "signed3", "nf4", "affine8"]
# (out, in): in_features a whole number of blocks and not, of groups of 8 codes and not.
SHAPES = [(16, 64), (37, 96), (7, 5), (33, 47), (1, 5)]
few_types = pytest.mark.parametrize("quant_type", FEW)
plain_and_double = pytest.mark.parametrize("double_quant", [False, True])


def make(out: int, fan_in: int, quant_type: str = "signed2", *, bias: bool = True, **kwargs: Any) -> PackedLinear:
    linear = nn.Linear(fan_in, out, bias=bias)
    return pack_linear(linear, quantize_matrix(linear.weight.detach(), quant_type, **kwargs))


def empty_like(module: PackedLinear, device: str | None = None) -> PackedLinear:
    return PackedLinear(
        module.in_features,
        module.out_features,
        module.bias is not None,
        quant_type=module.quant_type,
        blocksize=module.blocksize,
        double_quant=module.double_quant,
        device=device,
    )


def raw(module: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Dtype, shape and bits of all that is stored, but for the bias."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())
        for name, tensor in module.state_dict().items()
        if name != "bias"
    }


@pytest.mark.parametrize("blocksize", [32, 64, 4096, None])
@plain_and_double
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.slow
def test_reads_what_was_quantized(
    quant_type: str, shape: tuple[int, int], double_quant: bool, blocksize: int | None
) -> None:
    linear = nn.Linear(shape[1], shape[0])
    quantized = quantize_matrix(linear.weight.detach(), quant_type, blocksize, double_quant=double_quant)
    module = pack_linear(linear, quantized)
    codec, before = codec_for(module), raw(module)
    read = codec.read(module)
    assert (codec.name, codec.shape(module), read.dtype) == ("packed", shape, torch.float32)
    assert torch.equal(read, quantized.dequantize())
    codec.read(module).zero_()
    assert raw(module) == before


@plain_and_double
@pytest.mark.parametrize("shape", SHAPES)
@few_types
def test_what_is_stored_can_be_read_bit_by_bit(quant_type: str, shape: tuple[int, int], double_quant: bool) -> None:
    module = make(*shape, quant_type, double_quant=double_quant)
    read = codec_for(module).read(module).double().numpy()
    np.testing.assert_allclose(read, ref.read_packed(module), rtol=0, atol=2e-7)  # values up to 0.5 in float32


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "bits"),
    [
        *[("signed2", False, 2.5), ("signed2", True, 2.127), ("affine2", False, 3.0), ("affine2", True, 2.254)],
        *[("lloyd3", False, 3.5), ("lloyd3", True, 3.127)],
        *[("signed3", False, 3.5), ("signed3", True, 3.127), ("nf4", False, 4.5), ("nf4", True, 4.127)],
    ],
)
def test_bits_a_weight(quant_type: str, double_quant: bool, bits: float) -> None:
    module = make(256, 2048, quant_type, double_quant=double_quant)
    found = codec_for(module).nbytes(module) * 8 / (256 * 2048)
    assert found == pytest.approx(bits, abs=0.001)  # a table and an offset add 36 bytes or so to half a million weights
    kept = sum(tensor.nbytes for name, tensor in module.state_dict().items() if name != "bias")
    assert codec_for(module).nbytes(module) == kept


def test_a_new_module_is_of_zeros() -> None:
    for quant_type in FEW:
        module = PackedLinear(47, 33, quant_type=quant_type, double_quant=True)
        assert not codec_for(module).read(module).any()
        assert torch.equal(module(torch.randn(2, 47)), torch.zeros(2, 33))
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_types_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(CodecError, match=r"bits: expected one of \[2, 3, 4, 8\] to pack, found 5"):
        PackedLinear(8, 8, quant_type="uniform5")
    with pytest.raises(CodecError, match="found 7"):
        make(8, 8, "affine7")
    with pytest.raises(CodecError, match="quant_type: expected one of"):
        PackedLinear(8, 8, quant_type="int8")


def test_it_takes_its_linears_place() -> None:
    linear = nn.Linear(47, 33).eval().to(torch.bfloat16)
    linear.bias.requires_grad_(False)
    module = pack_linear(linear, quantize_matrix(linear.weight.detach().float(), "signed3"))
    assert torch.equal(module.bias, linear.bias)
    assert module.bias.data_ptr() != linear.bias.data_ptr()
    assert (module.training, module.bias.requires_grad) == (False, False)
    assert codec_for(module).compute_dtype(module) == torch.bfloat16
    assert make(8, 8, bias=False).bias is None
    assert "signed3, blocksize=64" in repr(module)


@pytest.mark.parametrize("shape", SHAPES)
@plain_and_double
@few_types
def test_writing_quantizes_anew(quant_type: str, double_quant: bool, shape: tuple[int, int]) -> None:
    module = make(*shape, quant_type, blocksize=32, double_quant=double_quant)
    bias, weight = module.bias.detach().clone(), torch.randn(shape)
    codec_for(module).write_(module, weight)
    expected = quantize_matrix(weight, quant_type, 32, double_quant=double_quant).dequantize()
    assert torch.equal(codec_for(module).read(module), expected)
    assert torch.equal(module.bias, bias)


UNFIT = [
    (torch.zeros(47, 33), r"expected a weight of shape \(33, 47\)"),
    (torch.zeros(33, 46), r"expected a weight of shape \(33, 47\)"),
    (torch.full((33, 47), torch.nan), "NaN or infinity"),
]


@pytest.mark.parametrize(("found", "message"), UNFIT)
@few_types
def test_a_weight_that_does_not_fit_is_refused_and_changes_nothing(
    quant_type: str, found: Tensor, message: str
) -> None:
    module = make(33, 47, quant_type, double_quant=True)
    before = raw(module)
    with pytest.raises(CodecError, match=message):
        codec_for(module).write_(module, found)
    infinite = torch.zeros(33, 47)
    infinite[3, 4] = torch.inf
    with pytest.raises(CodecError, match=r"finite in torch\.float32, found NaN or infinity"):
        codec_for(module).write_(module, infinite)
    assert raw(module) == before


@plain_and_double
@few_types
def test_a_snapshot_is_put_back_bit_for_bit(quant_type: str, double_quant: bool) -> None:
    module = make(33, 47, quant_type, double_quant=double_quant)
    codec, before = codec_for(module), raw(module)
    snapshot = codec.snapshot(module)
    for _ in range(2):  # a snapshot can be used again: what is restored isn't its memory
        codec.write_(module, torch.randn(33, 47))
        assert raw(module) != before
        codec.restore_(module, snapshot)
        assert raw(module) == before


@pytest.mark.parametrize("assign", [False, True])
@plain_and_double
@few_types
def test_a_state_dict_fills_an_empty_module(quant_type: str, double_quant: bool, assign: bool) -> None:
    module = make(33, 47, quant_type, double_quant=double_quant)
    other = empty_like(module, "meta" if assign else None)
    found = other.load_state_dict(module.state_dict(), assign=assign)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert raw(other) == raw(module)
    x = torch.randn(3, 47)
    assert torch.equal(other(x), module(x))


def test_a_stored_table_is_the_one_that_is_read() -> None:
    module = make(16, 64, "signed2")
    read, state = codec_for(module).read(module), module.state_dict()
    other = empty_like(module)
    other.load_state_dict({**state, "codebook": state["codebook"] * 2})
    assert torch.equal(codec_for(other).read(other), read * 2)
    assert torch.equal(state["codebook"], codebook("signed2", blocksize=64))


def saved(module: PackedLinear) -> PackedLinear:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copied: PackedLinear = torch.load(file, weights_only=False)
    return copied


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, saved, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "save", "pickle"],
)
@plain_and_double
def test_copies_are_equal_and_apart(duplicate: Callable[[PackedLinear], PackedLinear], double_quant: bool) -> None:
    module = make(33, 47, "affine3", double_quant=double_quant)
    before, x = raw(module), torch.randn(3, 47)
    twin = duplicate(module)
    assert raw(twin) == before
    assert torch.equal(twin(x), module(x))
    assert (twin.quant_type, twin.blocksize, twin.double_quant) == ("affine3", 64, double_quant)
    codec_for(twin).write_(twin, torch.randn(33, 47))
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert raw(module) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@plain_and_double
@few_types
def test_casts_change_neither_codes_nor_scales_nor_table(
    quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    module = make(33, 47, quant_type, double_quant=double_quant)
    before, read = raw(module), codec_for(module).read(module)
    model = nn.Sequential(module, nn.Linear(33, 2))
    for cast in (lambda: model.to(dtype), lambda: module.to("cpu", dtype), model.float):
        cast()
        assert raw(module) == before
        assert torch.equal(codec_for(module).read(module), read)
    model.to(dtype)
    assert module.bias.dtype == module.compute_dtype == dtype
    assert codec_for(module).compute_dtype(module) == dtype
    assert module(torch.randn(2, 47, dtype=dtype)).dtype == dtype


def test_named_casts_change_no_bit() -> None:
    module = make(33, 47, "affine2", double_quant=True)
    before = raw(module)
    for name in ("half", "bfloat16", "double", "float"):
        getattr(module, name)()
        assert raw(module) == before


@plain_and_double
@few_types
def test_to_the_meta_device_and_back_empty(quant_type: str, double_quant: bool) -> None:
    module = make(33, 47, quant_type, double_quant=double_quant)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    before = raw(module)
    module.to("meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    assert codec_for(module).shape(module) == (33, 47)
    module.to_empty(device="cpu")
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in module.state_dict().items()}
    assert kinds == {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
    module.load_state_dict(state)
    assert raw(module) == before


@pytest.mark.parametrize("quant_type", ["nf2", "signed2", "affine2", "nf3", "lloyd3", "uniform4", "affine8"])
def test_requantizing_what_was_read_doesn_t_shrink_it(quant_type: str) -> None:
    """A fitted table stays short of its block's largest value; scales that follow it would shrink every time."""
    module = make(40, 96, quant_type)
    codec = codec_for(module)
    dense = codec.read(module)
    for _ in range(3):
        codec.write_(module, codec.read(module))
    torch.testing.assert_close(codec.read(module), dense, rtol=1e-6, atol=1e-7)  # scales round in float32


@plain_and_double
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize(("out", "fan_in", "blocksize"), [(37, 96, 64), (7, 5, 64), (9, 33, None)])
@pytest.mark.slow
def test_codes_are_taken(out: int, fan_in: int, blocksize: int | None, quant_type: str, double_quant: bool) -> None:
    linear = nn.Linear(fan_in, out)
    quantized = quantize_matrix(linear.weight.detach(), quant_type, blocksize, double_quant=double_quant)
    module = pack_linear(linear, quantized)
    check_codes_taken(module, fan_in)
    codec = codec_for(module)
    codec.take_(module, quantized)
    found = codec.quantized(module)
    assert found is not None
    assert torch.equal(found.codes, quantized.codes)
    assert all(torch.equal(*pair) for pair in zip(found.tensors(), quantized.tensors(), strict=True))
