"""Floating-point storage: orientation, dtypes, checks that come before any change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.codecs import codec_for
from qlora_kit.codecs.dense import DenseCodec
from qlora_kit.errors import CodecError, UnsupportedModuleError

MODULES = {
    "dense": lambda: nn.Linear(6, 5),
    "embedding": lambda: nn.Embedding(7, 3),
    "conv1d": lambda: Conv1D(5, 6),
    "conv": lambda: nn.Conv2d(4, 6, (3, 2), groups=2),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip(name: str, dtype: torch.dtype) -> None:
    module = MODULES[name]().to(dtype)
    codec = codec_for(module)
    before, parameter = module.weight.detach().clone(), module.weight
    weight = codec.read(module)
    assert codec.name == name
    assert weight.shape == codec.shape(module)
    assert weight.dtype == torch.float32
    assert weight.is_contiguous()
    assert not weight.requires_grad
    codec.write_(module, weight)
    assert module.weight is parameter
    assert torch.equal(module.weight.float(), before.float())

    snapshot = codec.snapshot(module)
    codec.write_(module, weight + 1)
    # Rounding to the module's dtype, values of a few units: half an ulp of bfloat16 at 4 is 2^-7.
    torch.testing.assert_close(codec.read(module), weight + 1, atol=2**-7, rtol=0)
    codec.restore_(module, snapshot)
    assert torch.equal(codec.read(module), weight)
    assert codec.compute_dtype(module) == dtype
    assert codec.nbytes(module) == before.nbytes
    assert codec.dense_like(module, torch.float32) is module


def test_read_is_a_copy() -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    codec_for(module).read(module).zero_()
    assert torch.equal(module.weight, before)


def test_orientation_is_that_of_the_product() -> None:
    linear, table, transposed = nn.Linear(6, 5, bias=False), nn.Embedding(7, 3), Conv1D(5, 6)
    x = torch.randn(4, 6)
    torch.testing.assert_close(linear(x), x @ codec_for(linear).read(linear).t())
    torch.testing.assert_close(transposed(x), x @ codec_for(transposed).read(transposed).t() + transposed.bias)
    one_hot = F.one_hot(torch.tensor([2, 5]), 7).float()
    torch.testing.assert_close(table(torch.tensor([2, 5])), one_hot @ codec_for(table).read(table).t())


@pytest.mark.parametrize(
    ("module", "columns"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), 2 * 3),
        (nn.Conv2d(4, 6, (3, 2)), 4 * 3 * 2),
        (nn.Conv3d(4, 4, 2, groups=4), 8),
    ],
)
def test_convolutions_flatten(module: nn.Module, columns: int) -> None:
    codec = codec_for(module)
    assert codec.shape(module) == (module.out_channels, columns)
    assert torch.equal(codec.read(module), module.weight.detach().reshape(module.out_channels, columns))


@pytest.mark.parametrize("name", MODULES)
def test_refused_writes_change_nothing(name: str) -> None:
    module = MODULES[name]()
    codec = codec_for(module)
    before = codec.read(module)
    with pytest.raises(CodecError, match=r"expected a weight of shape .* \(out, in\), found \(2, 2\)"):
        codec.write_(module, torch.zeros(2, 2))
    bad = before.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(CodecError, match=r"expected values that are finite in torch\.float32, found NaN"):
        codec.write_(module, bad)
    assert torch.equal(codec.read(module), before)


def test_a_value_beyond_half_precision_is_refused() -> None:
    module = nn.Linear(2, 2).half()
    with pytest.raises(CodecError, match=r"finite in torch\.float16"):
        codec_for(module).write_(module, torch.full((2, 2), 1e5))


def test_integer_weights_are_refused_by_name() -> None:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(CodecError, match=r"Linear\(in_features=2.*floating-point weight.*torch.int8"):
        DenseCodec().read(module)
    with pytest.raises(UnsupportedModuleError, match=r"proj: expected .*Linear .*torch.int8.*floating-point weight"):
        codec_for(module, "proj")


@pytest.mark.parametrize("name", MODULES)
def test_meta_modules_are_described(name: str) -> None:
    module = MODULES[name]().to("meta")
    codec = codec_for(module)
    assert codec.device(module).type == "meta"
    assert codec.nbytes(module) == 4 * codec.shape(module)[0] * codec.shape(module)[1]
    assert codec.compute_dtype(module) == torch.float32


def test_storage_of_no_codes() -> None:
    linear = nn.Linear(4, 4)
    codec = codec_for(linear)
    assert codec.quantized(linear) is None
