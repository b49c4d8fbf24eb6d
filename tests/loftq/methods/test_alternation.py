"""The alternation against its float64 reference, and what it promises of its result."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from reference.loftq import alternate
from reference.lowrank import best_approximation

from loftq import factorize
from loftq.methods.quantizers import quantizer_for
from qlora_kit.codecs.quantized import DYNAMIC_MAP
from qlora_kit.config.loftq import DEFAULT_TYPES
from qlora_kit.errors import ConfigError
from qlora_kit.lowrank import delta

SHAPES = [(24, 32), (17, 29), (40, 13)]
# The reference's levels are float64, the codes' table float32, and errors are sums over some hundred values.
RELATIVE = 1e-5


def weight(shape: tuple[int, int] = (24, 32), seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def error_of(full: torch.Tensor, result: object, scaling: float) -> float:
    left = full.double() - result.quantized.dequantize().double() - scaling * result.B.double() @ result.A.double()
    return float(left.norm() / full.double().norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.slow
def test_follows_the_reference_step_by_step(shape: tuple[int, int], bits: int) -> None:
    full = weight(shape)
    errors, quantized, products = alternate(full.numpy(), 4, bits=bits, steps=4)
    result = factorize(full, 4, quant_type=f"nf{bits}" if bits < 8 else "int8", steps=4, scaling=0.5)
    np.testing.assert_allclose(result.history, errors[: len(result.history)], rtol=RELATIVE)
    best = int(np.argmin(result.history))
    np.testing.assert_allclose(result.quantized.dequantize(), quantized[best], atol=1e-6)
    np.testing.assert_allclose(delta(result.A, result.B, 0.5), products[best], atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scaling", [1.0, 2.0, 16 / math.sqrt(5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_best_iterate_is_returned_scaling_counted(bits: int, scaling: float, dtype: torch.dtype) -> None:
    full = weight((31, 45), dtype=dtype)
    result = factorize(full, 5, bits=bits, steps=5, scaling=scaling)
    assert result.error == min(result.history)
    assert error_of(full, result, scaling) == pytest.approx(result.error, rel=1e-5)
    assert result.error <= result.history[0] < result.zero_error
    assert result.A.shape == (5, 45)
    assert result.B.shape == (31, 5)
    assert result.A.dtype == result.B.dtype == torch.float32


def test_the_first_step_is_the_plain_weight_and_its_best_correction() -> None:
    full = weight()
    plain = quantizer_for(bits=4)(full).dequantize()
    result = factorize(full, 3, steps=1)
    assert torch.equal(result.quantized.dequantize(), plain)
    expected = best_approximation((full - plain).numpy(), 3)
    np.testing.assert_allclose(delta(result.A, result.B, 1.0), expected, atol=1e-7)


def test_the_error_doesn_t_depend_on_the_scaling() -> None:
    """s only moves between the branch and its factors; a loop that forgets it gets worse with alpha = 2r."""
    histories = [factorize(weight(), 4, bits=2, steps=3, scaling=s).history for s in (0.25, 1.0, 4.0)]
    assert len({len(history) for history in histories}) == 1
    # Powers of two scale exactly; the square roots in the factors round.
    np.testing.assert_allclose(histories[0], histories[1], rtol=1e-5)
    np.testing.assert_allclose(histories[2], histories[1], rtol=1e-5)


def test_stops_at_the_first_step_that_is_no_better() -> None:
    """Rank 1 at 8 bits leaves nothing to alternate over for long."""
    stopped = 0
    for seed in range(6):
        history = factorize(weight(seed=seed), 1, bits=8, steps=30).history
        assert all(after < before for before, after in pairwise(history[:-1]))
        if len(history) < 30:
            assert history[-1] >= history[-2]
            stopped += 1
    assert stopped > 0


def test_full_rank_reproduces_the_weight() -> None:
    full = weight((12, 9))
    result = factorize(full, 9, bits=2, steps=1, scaling=2.0)
    assert result.error < 1e-6


def test_is_deterministic_and_leaves_the_weight_alone() -> None:
    full = weight((130, 140))
    before = full.clone()
    first, second = (factorize(full, 6, bits=3, steps=3) for _ in range(2))
    assert torch.equal(full, before)
    assert first.history == second.history
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.quantized.codes, second.quantized.codes)


def test_an_all_zero_weight_has_no_error() -> None:
    for bits in DEFAULT_TYPES:
        result = factorize(torch.zeros(6, 8), 2, bits=bits)
        assert result.error == 0.0
        assert torch.equal(result.quantized.dequantize(), torch.zeros(6, 8))
        assert torch.equal(delta(result.A, result.B, 1.0), torch.zeros(6, 8))


@pytest.mark.parametrize(
    ("kind", "double_quant", "blocksize"),
    [("nf4", False, 64), ("nf4", True, 64), ("fp4", False, 32), ("fp4", True, 256), ("int8", False, 64)],
)
@pytest.mark.parametrize("shape", [(96, 160), (33, 47), (7, 5)])
def test_quantizes_as_bitsandbytes_does(shape: tuple[int, int], kind: str, double_quant: bool, blocksize: int) -> None:
    from qlora_kit.codecs import codec_for
    from qlora_kit.codecs.bnb import quantize_linear, quantize_linear_int8

    full = weight(shape)
    full[3] = 0.0
    linear = torch.nn.Linear(shape[1], shape[0])
    ours = quantizer_for(quant_type=kind, blocksize=blocksize, double_quant=double_quant)(full).dequantize()
    if kind == "int8":
        module = quantize_linear_int8(linear, full)
    else:
        module = quantize_linear(linear, full, quant_type=kind, blocksize=blocksize, double_quant=double_quant)
    theirs = codec_for(module).read(module)
    # bitsandbytes' CPU kernel takes the neighbouring 8-bit scale within 1e-5 of a midpoint: one step of the
    # dynamic map is at most 1.5 % of the spread of the scales.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 * full.abs().max().item() if double_quant else 0)


def test_the_dynamic_map_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(DYNAMIC_MAP), functional.create_dynamic_map())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank: expected an integer between 1 and 24 for shape \(24, 32\), found 0"),
        ({"rank": 25}, "rank: .* found 25"),
        ({"bits": 5}, r"bits: expected one of \[2, 3, 4, 8\], found 5"),
        ({"quant_type": "nf5"}, "quant_type: expected one of nf2, .*int8, found 'nf5'"),
        ({"blocksize": 0}, "blocksize: expected a positive integer or 'row', found 0"),
        ({"steps": 0}, "steps: expected an integer of at least 1, found 0"),
        ({"scaling": 0.0}, "scaling: expected a positive finite number, found 0.0"),
        ({"bits": 8, "double_quant": True}, "double_quant: expected False with int8"),
        ({"weight": torch.zeros(3, 4, 5)}, r"weight: expected a 2-D .* found torch.float32 with shape \(3, 4, 5\)"),
        ({"weight": torch.full((24, 32), float("nan"))}, "weight: expected finite values, found 768 NaN or infinite"),
        ({"weight": torch.full((24, 32), 1e5), "bits": 8}, r"below 65504 for int8, found 1e\+05"),
    ],
)
def test_bad_input_is_named(options: dict[str, object], message: str) -> None:
    arguments = {"weight": weight(), "rank": 4, **options}
    with pytest.raises(ConfigError, match=message):
        factorize(arguments.pop("weight"), arguments.pop("rank"), **arguments)
