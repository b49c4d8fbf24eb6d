"""Thin products and masks on a GPU, where float32 factors go through the half-precision units in two parts."""

from __future__ import annotations

import pytest
import torch
from on_device import DEVICE, DTYPES, HALVES, need_dtype
from torch import Tensor

from qlora_kit.layers.fused import thin
from qlora_kit.layers.fused.mask import Mask

pytestmark = pytest.mark.cuda
# Errors relative to the sum of the magnitudes of the terms. A pair of halves has 16 bits of a bfloat16 factor and at
# these sizes 20 of a float16 one; sums are float32.
PAIRS = {torch.bfloat16: 2**-15, torch.float16: 2**-17, torch.float32: 1e-6}
# One rounding of the result to its own dtype.
ROUNDED = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}
SIZES = [(1, 64, 4), (130, 96, 16), (33, 47, 3), (0, 64, 8), (512, 512, 64)]


@pytest.fixture(autouse=True)
def _in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of GPUs, in rehearsals on the CPU too."""
    monkeypatch.setattr(thin, "_in_halves", lambda x: x.dtype in HALVES)
    if DEVICE == "cpu":  # which has no products of halves summed in float32
        monkeypatch.setattr(thin, "_product", lambda a, b: a.float() @ b.float())


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(device=DEVICE, dtype=dtype)


def error(found: Tensor, left: Tensor, right: Tensor, start: Tensor | None = None) -> float:
    """Of ``start + left right``, against float64."""
    left, right = left.cpu().double(), right.cpu().double()
    exact, size = left @ right, left.abs() @ right.abs()
    if start is not None:
        exact, size = exact + start.cpu().double(), size + start.cpu().double().abs()
    return ((found.cpu().double() - exact).abs() / size.clamp(min=1e-30)).max().item() if found.numel() else 0.0


@pytest.mark.parametrize("factor_dtype", [torch.float32, None], ids=["float32 factors", "factors alike"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "n", "r"), SIZES)
def test_narrow_and_gathered(tokens: int, n: int, r: int, dtype: torch.dtype, factor_dtype: torch.dtype | None) -> None:
    need_dtype(dtype)
    x, factor = random(tokens, n, dtype=dtype), random(r, n, dtype=factor_dtype or dtype, scale=0.05)
    narrowed = thin.narrow(x, factor)
    assert (narrowed.dtype, narrowed.shape) == (torch.float32, (tokens, r))
    assert error(narrowed, x, factor.T) <= PAIRS[dtype]
    u = random(tokens, r)
    summed = thin.gathered(u, x)
    assert (summed.dtype, summed.shape) == (torch.float32, (r, n))
    assert error(summed, u.T, x) <= PAIRS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "n", "r"), SIZES)
def test_widen(tokens: int, n: int, r: int, dtype: torch.dtype) -> None:
    need_dtype(dtype)
    u, factor, y = random(tokens, r), random(r, n, scale=0.05), random(tokens, n, dtype=dtype)
    start, memory = y.clone(), y.data_ptr()
    result = thin.widen_(y, u, factor)
    assert result.data_ptr() == memory
    assert error(result, u, factor, start) <= ROUNDED[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_factors(dtype: torch.dtype) -> None:
    """B of a branch is passed as its transpose, which isn't contiguous."""
    need_dtype(dtype)
    B, u, y = random(96, 8), random(40, 8), random(40, 96, dtype=dtype)
    start = y.clone()
    assert error(thin.widen_(y, u, B.t()), u, B.t(), start) <= ROUNDED[dtype]
    assert error(thin.narrow(start, B.t()), start, B) <= PAIRS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_masks_are_drawn_again_from_their_seeds(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    mask = Mask.draw(p)
    assert mask is not None
    like = torch.empty(301, 333, dtype=dtype, device=DEVICE)
    kept = mask.kept(like)
    assert (kept.dtype, kept.shape, kept.device) == (dtype, like.shape, like.device)
    torch.rand(1000, device=DEVICE)  # what others draw changes nothing
    assert torch.equal(mask.kept(like), kept)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    share, spread = kept.double().mean().item(), (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(share - (1 - mask.dropped / 65536)) < 5 * spread
    assert abs(share * mask.scale - 1) < 5 * spread * mask.scale
    other = Mask.draw(p)
    assert other is not None
    assert not torch.equal(other.kept(like), kept)
    # Elements are independent: neighbours in rows and in columns agree as often as chance has it.
    for one, two in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1])):
        agree = (one == two).double().mean().item()
        assert abs(agree - (p * p + (1 - p) ** 2)) < 0.01
