"""What holds of every codec of a floating-point ``weight``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_kit.codecs import codec_for
from qlora_kit.errors import CodecError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def check_round_trip(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    module = module.to(dtype)
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


def check_refused_writes(module: nn.Module) -> None:
    codec = codec_for(module)
    before = codec.read(module)
    with pytest.raises(CodecError, match=r"expected a weight of shape .* \(out, in\), found \(2, 2\)"):
        codec.write_(module, torch.zeros(2, 2))
    bad = before.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(CodecError, match=r"expected values that are finite in torch\.float32, found NaN"):
        codec.write_(module, bad)
    assert torch.equal(codec.read(module), before)


def check_on_meta(module: nn.Module) -> None:
    module = module.to("meta")
    codec = codec_for(module)
    assert codec.device(module).type == "meta"
    assert codec.nbytes(module) == 4 * codec.shape(module)[0] * codec.shape(module)[1]
    assert codec.compute_dtype(module) == torch.float32
