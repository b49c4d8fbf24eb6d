"""LoftQ as a start: the new base plus the branch is nearer to the weight than the zero start's base."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qlora_kit.codecs import codec_for
from qlora_kit.codecs.packed import PackedLinear
from qlora_kit.config.lora import LoftQConfig, LoraConfig
from qlora_kit.errors import ConfigError, StorageError, TargetError
from qlora_kit.initializers import Request, Start, start_for
from qlora_kit.lowrank import delta

RANK = 6


def loftq(base: nn.Module, *, family: str = "linear", scaling: float = 1.0, **options: object) -> Start:
    config = LoraConfig(r=RANK, init_lora_weights="loftq", loftq_config=LoftQConfig(**options))
    request = Request(
        path="model.layers.0.proj",
        base=base,
        codec=codec_for(base),
        rank=RANK,
        scaling=scaling,
        config=config,
        family=family,
    )
    return start_for(request)


def linear(out_features: int = 40, in_features: int = 72, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(in_features, out_features).to(dtype)


def read(module: nn.Module) -> torch.Tensor:
    return codec_for(module).read(module)


def distance(full: torch.Tensor, base: nn.Module, start: Start | None, scaling: float) -> float:
    left = full - read(base)
    if start is not None:
        left = left - delta(start.A, start.B, scaling)
    return float(left.norm() / full.norm())


@pytest.mark.parametrize("scaling", [1.0, 2.0, 16 / math.sqrt(RANK)], ids=["alpha=r", "alpha=2r", "rslora"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 72), (33, 47)])
@pytest.mark.slow
def test_is_nearer_than_the_zero_start(shape: tuple[int, int], dtype: torch.dtype, bits: int, scaling: float) -> None:
    base = linear(*shape, dtype=dtype)
    full = read(base)
    start = loftq(base, scaling=scaling, loftq_bits=bits, loftq_iter=4)
    first = loftq(base, scaling=scaling, loftq_bits=bits, loftq_iter=1)
    # The first iterate's base is the plain quantized weight, which is what a zero start runs on.
    zero_start = distance(full, first.base, None, scaling)
    once = distance(full, first.base, first, scaling)
    slack = 1e-5  # float32 rounds the factors
    assert once < zero_start
    assert distance(full, start.base, start, scaling) <= once * (1 + slack)
    assert torch.equal(read(base), full), "the original weight isn't touched"


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 128])
def test_four_bits_are_bitsandbytes(quant_type: str, double_quant: bool, blocksize: int) -> None:
    base = linear(96, 160, torch.bfloat16)
    start = loftq(base, quant_type=quant_type, double_quant=double_quant, blocksize=blocksize, loftq_iter=3)
    assert type(start.base).__name__ == "Linear4bit"
    state = start.base.weight.quant_state
    assert (state.quant_type, state.blocksize, state.nested) == (quant_type, blocksize, double_quant)
    assert start.base.compute_dtype == torch.bfloat16
    assert torch.equal(start.base.bias, base.bias)
    # What is corrected is what is deployed: the factors are the best for the base as it reads.
    left = read(base) - read(start.base)
    best = float(torch.linalg.svdvals(left.double())[RANK:].norm())
    assert float((left - delta(start.A, start.B, 1.0)).norm()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("blocksize", [48, "row"])
def test_blocks_that_bitsandbytes_lacks_are_packed(blocksize: int | str) -> None:
    start = loftq(linear(), blocksize=blocksize)
    assert isinstance(start.base, PackedLinear)
    assert (start.base.quant_type, start.base.blocksize) == ("nf4", 72 if blocksize == "row" else 48)


def test_eight_bits_are_bitsandbytes() -> None:
    start = loftq(linear(), loftq_bits=8)
    assert type(start.base).__name__ == "Linear8bitLt"


@pytest.mark.parametrize("bits", [2, 3])
def test_low_bits_are_packed(bits: int) -> None:
    base = linear(dtype=torch.bfloat16)
    start = loftq(base, loftq_bits=bits)
    assert isinstance(start.base, PackedLinear)
    assert start.base.compute_dtype == torch.bfloat16
    assert torch.equal(start.base.bias, base.bias)
    assert start.base.weight.numel() == -(-base.weight.numel() * bits // 8)
    blocks = read(start.base).reshape(-1, 64)
    assert max(len(block.unique()) for block in blocks) <= 2**bits


def test_conv1d_becomes_a_linear_of_the_same_function() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(48, 80)
    nn.init.normal_(base.bias)
    x = torch.randn(5, 80)
    for bits in (4, 8, 2):
        start = loftq(base, loftq_bits=bits, scaling=2.0, loftq_iter=3)
        assert start.A.shape == (RANK, 80)
        assert start.B.shape == (48, RANK)
        with torch.no_grad():
            plain = codec_for(start.base).forward(start.base, x)
            expected = x @ read(start.base).T + base.bias
        # bitsandbytes' int8 forward also rounds the activations, to about 1 %.
        torch.testing.assert_close(plain, expected, rtol=0, atol=1e-2 if bits == 8 else 1e-5)
        assert distance(read(base), start.base, start, 2.0) < distance(read(base), start.base, None, 2.0)


def test_an_embedding_is_simulated() -> None:
    base = nn.Embedding(50, 24, padding_idx=3)
    start = loftq(base, family="embedding", loftq_bits=4, scaling=2.0, loftq_iter=3)
    assert type(start.base) is nn.Embedding
    assert start.base.padding_idx == 3
    assert distance(read(base), start.base, start, 2.0) < distance(read(base), start.base, None, 2.0)


def quantized_and_source(folder: Path, name: str, bits: int = 4) -> tuple[nn.Module, torch.Tensor]:
    from qlora_kit.codecs.bnb import quantize_linear, quantize_linear_int8

    source = linear()
    full = source.weight.detach().bfloat16()
    save_file({name: full, "other.weight": torch.zeros(2)}, folder / "model.safetensors")
    make = quantize_linear if bits == 4 else quantize_linear_int8
    return make(source, full.float()), full.float()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.proj.weight",
        "layers.0.proj.weight",
        "model.model.layers.0.proj.weight",
        "lm.model.layers.0.proj.weight",
    ],
)
def test_an_already_quantized_base_starts_from_its_residual(tmp_path: Path, name: str, bits: int) -> None:
    base, full = quantized_and_source(tmp_path, name, bits)
    before = read(base)
    start = loftq(base, weights=str(tmp_path), loftq_bits=bits, scaling=2.0)
    assert start.base is None
    assert torch.equal(read(base), before)
    best = float(torch.linalg.svdvals((full - before).double())[RANK:].norm())
    left = full - before - delta(start.A, start.B, 2.0)
    assert float(left.norm()) == pytest.approx(best, rel=1e-4)


def test_a_transposed_source_is_told_by_shape_or_by_nearness(tmp_path: Path) -> None:
    from qlora_kit.codecs.bnb import quantize_linear

    for out_features, in_features in ((40, 72), (64, 64)):
        source = linear(out_features, in_features)
        stored = {"model.layers.0.proj.weight": source.weight.detach().t().contiguous()}
        folder = tmp_path / str(out_features)
        folder.mkdir()
        save_file(stored, folder / "model.safetensors")
        base = quantize_linear(source, source.weight.detach())
        start = loftq(base, weights=str(folder))
        full = source.weight.detach()
        assert distance(full, base, start, 1.0) < distance(full, base, None, 1.0)


def test_an_already_quantized_base_needs_the_weights(tmp_path: Path) -> None:
    base, _ = quantized_and_source(tmp_path, "model.layers.0.proj.weight")
    message = r"model.layers.0.proj: loftq_config.weights: .* \(bnb-4bit\), found None; pass LoftQConfig\(weights="
    with pytest.raises(ConfigError, match=message):
        loftq(base)


def test_a_missing_name_says_which_were_tried(tmp_path: Path) -> None:
    base, _ = quantized_and_source(tmp_path, "encoder.proj.weight")
    message = r"names tried \(model.layers.0.proj.weight, model.model.layers.0.proj.weight, layers.0.proj.weight, and"
    with pytest.raises(StorageError, match=message):
        loftq(base, weights=str(tmp_path))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    base, full = quantized_and_source(tmp_path, "x.weight")
    name = "model.layers.0.proj.weight"
    for folder, tensor, message in (
        ("other", torch.randn(40, 72) * full.std(), r"at a relative distance of 1\.\d+; pass the folder of the same"),
        ("shape", torch.randn(40, 71), r"expected a weight of shape \(40, 72\) .* of shape \(40, 71\)"),
    ):
        (tmp_path / folder).mkdir()
        save_file({name: tensor}, tmp_path / folder / "model.safetensors")
        with pytest.raises(StorageError, match=message):
            loftq(base, weights=str(tmp_path / folder))


def test_what_can_t_be_quantized_is_refused_by_path() -> None:
    with pytest.raises(TargetError, match=r"model.layers.0.proj: expected a linear layer .* found Conv2d"):
        loftq(nn.Conv2d(4, 8, 3), family="conv")
    with pytest.raises(TargetError, match=r"model.layers.0.proj: expected a weight in memory .* meta"):
        loftq(nn.Linear(8, 8, device="meta"))
    broken = linear()
    with torch.no_grad():
        broken.weight[2, 3] = float("nan")
    with pytest.raises(ConfigError, match=r"model.layers.0.proj: weight: expected finite values, found 1 NaN"):
        loftq(broken)
    with pytest.raises(ConfigError, match=r"model.layers.0.proj: rank: expected an integer between 1 and 4"):
        loftq(linear(4, 8))


def test_the_adapter_s_dtype_is_kept() -> None:
    start = loftq(linear(dtype=torch.bfloat16))
    assert start.A.dtype == start.B.dtype == torch.float32
