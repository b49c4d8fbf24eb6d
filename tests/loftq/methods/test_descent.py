"""Codes that carry a small delta: each is the best one for the sweep that it was found in, and the delta arrives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reference import descent as reference
from reference.starts import damped, each_weights, weighted_error
from torch import Tensor

from loftq.methods.descent import _Attempt, _damped, _Descent, round_from_codes
from loftq.methods.metric import Metric
from loftq.methods.quantizers import quantizer_for
from loftq.methods.rounding import round_with_feedback
from qlora_kit.codecs.quantized import Quantized
from qlora_kit.errors import ConfigError

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4"},
    "fp4": {"quant_type": "fp4"},
    "nf3 in short blocks": {"quant_type": "nf3", "blocksize": 8},
    "lloyd3 in rows": {"quant_type": "lloyd3", "blocksize": "row"},
    "signed2": {"quant_type": "signed2"},
    "affine3": {"quant_type": "affine3"},
    "nf4 doubly quantized": {"quant_type": "nf4", "double_quant": True},
    "affine3 doubly quantized": {"quant_type": "affine3", "blocksize": 32, "double_quant": True},
    "one block": {"quant_type": "nf3", "blocksize": 100_000},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def on_the_grid(kind: str, shape: tuple[int, int] = (33, 97), seed: int = 0, unit: float = 0.05) -> Quantized:
    """97 columns are more than one block of updates, and no whole number of blocks of scales."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * unit
    return replace(quantizer_for(**KINDS[kind])(weight), exact_scales=None)


def moments(width: int = 97, seed: int = 0) -> Tensor:
    """Of inputs that a dozen directions dominate, as a language model's are."""
    draw = torch.Generator().manual_seed(100 + seed)
    mixing = torch.randn(12, width, generator=draw) * torch.logspace(-1, 0.5, width)
    rows = torch.randn(800, 12, generator=draw) @ mixing + 0.3 * torch.randn(800, width, generator=draw)
    return rows.T @ rows / len(rows)


def factors(stored: Quantized, size: float, rank: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of a delta whose norm is ``size`` of the weight's."""
    draw = torch.Generator().manual_seed(200 + seed)
    out, width = stored.codes.shape
    A, B = torch.randn(rank, width, generator=draw), torch.randn(out, rank, generator=draw)
    return A, B * (size * stored.dequantize().norm() / (B @ A).norm())


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.double().numpy() for tensor in tensors]


def changed(stored: Quantized, found: Quantized) -> np.ndarray:
    for name in ("values", "absmax", "offset"):
        for ours, theirs in (
            (found.stored_scales, stored.stored_scales),
            (found.stored_shifts, stored.stored_shifts),
        ):
            assert getattr(ours, name, None) is getattr(theirs, name, None), "scales stay as they are stored"
    assert (found.quant_type, found.blocksize, found.rows) == (stored.quant_type, stored.blocksize, stored.rows)
    assert found.codes.dtype == torch.uint8
    return found.dequantize().double().numpy() - stored.dequantize().double().numpy()


def share(stored: Quantized, found: Quantized, A: Tensor, B: Tensor, R: Tensor) -> float:
    delta = arrays(B)[0] @ arrays(A)[0]
    return reference.share(
        found.dequantize().double().numpy() - stored.dequantize().double().numpy(), delta, R.double().numpy()
    )


def missing(change: np.ndarray, A: Tensor, B: Tensor, R: np.ndarray) -> float:
    return reference.missing(change, A.double().numpy(), B.double().numpy(), R)


# -- one sweep -----------------------------------------------------------------------------------------------------


def check_sweep(stored: Quantized, A: Tensor, B: Tensor, R: Tensor) -> None:
    descent = _Descent(stored, A, B, _damped(R, 0.01))
    codes, lost = descent.aimed(B)
    base, delta = stored.dequantize().double().numpy(), arrays(B)[0] @ arrays(A)[0]
    exact = damped(R.double().numpy())
    exact = exact / (np.trace(R.double().numpy() if R.dim() == 2 else np.diag(R.double().numpy())) / len(exact))
    scales = each_weights(stored.scales.double().numpy(), base.shape, stored.blocksize or 0)
    reachable = scales[..., None] * stored.table().double().numpy()
    if stored.shifts is not None:
        reachable += each_weights(stored.shifts.double().numpy(), base.shape, stored.blocksize or 0)[..., None]
    read = np.take_along_axis(reachable, codes.numpy()[..., None].astype(np.int64), 2)[..., 0]
    regrets = reference.regrets(base, delta, exact, reachable, read)
    # float32 sums over the columns move a goal by some 1e-6 of the span: only beside a midpoint is that another code.
    assert regrets.max() < 1e-5
    assert (regrets > 1e-12).mean() < 1e-3
    before, after = weighted_error(delta, exact), weighted_error(base + delta - read, exact)
    assert after <= before * (1 + 1e-6), "a sweep never raises the error"
    assert (codes != stored.codes).any()
    assert after < before
    expected = (base + delta - read) @ exact @ arrays(A)[0].T
    np.testing.assert_allclose(lost.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@every_kind
@pytest.mark.slow
def test_a_sweep_takes_the_best_code_of_every_value(kind: str) -> None:
    stored = on_the_grid(kind)
    check_sweep(stored, *factors(stored, 0.3), moments())


@pytest.mark.parametrize("shape", [(1, 5), (9, 2), (3, 64), (2, 65), (2, 200)])
def test_a_sweep_over_any_number_of_columns(shape: tuple[int, int]) -> None:
    stored = on_the_grid("nf3 in short blocks", shape)
    check_sweep(stored, *factors(stored, 0.5, rank=2), moments(shape[1]))


@pytest.mark.slow
def test_a_sweep_beside_blocks_of_zeros() -> None:
    weight = torch.randn(33, 97) * 0.05
    weight[2:5] = 0
    for kind in ("nf4", "lloyd3 in rows", "affine3"):
        stored = replace(quantizer_for(**KINDS[kind])(weight), exact_scales=None)
        A, B = factors(stored, 0.3)
        check_sweep(stored, A, B, moments())
        found = round_from_codes(stored, A, B, moments())
        same = each_weights(stored.scales.numpy(), (33, 97), stored.blocksize or 0) == 0
        assert same.any()
        assert np.array_equal(found.codes.numpy()[same], stored.codes.numpy()[same])
        assert found.dequantize().isfinite().all()


# -- the whole -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "near"), [(0.01, 0.1), (0.003, 0.2)])
@every_kind
@pytest.mark.slow
def test_a_small_delta_arrives(kind: str, size: float, near: float) -> None:
    """The fewer the codes whose changes add up to it, the less exactly; here some hundreds of 66,000."""
    stored, R = on_the_grid(kind, (256, 257)), moments(257)
    A, B = factors(stored, size)
    found = round_from_codes(stored, A, B, R)
    exact, change = damped(R.double().numpy()), changed(stored, found)
    assert reference.share(change, arrays(B)[0] @ arrays(A)[0], exact) == pytest.approx(1, abs=near)
    assert missing(change, A, B, exact) < 2 * near
    assert 0 < (found.codes != stored.codes).float().mean() < 0.5


# What counts as near enough to all of it, and float32's sums.
NEAR = 0.05 + 1e-3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["nf4 doubly quantized", "signed2"])
@pytest.mark.slow
def test_of_the_smallest_deltas_no_layer_gets_too_little_nor_too_much(kind: str, seed: int) -> None:
    """0.2 % of the weight: corrections used to leave less of some directions missing by unlearning the whole."""
    for shape in ((256, 256), (64, 256)):
        stored, R = on_the_grid(kind, shape, seed), moments(shape[1], seed)
        A, B = factors(stored, 0.002, rank=16, seed=seed)
        change = changed(stored, round_from_codes(stored, A, B, R))
        arrived = reference.share(change, arrays(B)[0] @ arrays(A)[0], damped(R.double().numpy()))
        assert arrived == pytest.approx(1, abs=NEAR), shape


def test_a_correction_that_leaves_less_missing_and_unlearns_the_whole_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored, R = on_the_grid("nf4"), moments()
    A, B = factors(stored, 0.01)
    scripts = {
        "worse, then better": ([(0.98, 5.0), (0.14, 1.0), (2.1, 0.5), (1.04, 4.0), (0.94, 0.1)], 3),
        "as far off as it was": ([(0.92, 5.0)] * 9 + [(0.93, 4.0), (1.06, 3.0), (0.93, 2.0), (0.5, 1.0)], 10),
        "not better": ([(1.0, 5.0), (1.0, 5.0), (1.0, 6.0), (1.0, 7.0), (1.0, 5.0)], 0),
    }
    for name, (script, right) in scripts.items():
        given: list[Tensor] = []

        def attempt(self: _Descent, target: Tensor, script: Any = script, given: list[Tensor] = given) -> _Attempt:
            codes = torch.full_like(stored.codes, len(given))
            share, missing = script[len(given)]
            given.append(codes)
            return _Attempt(target, codes, torch.zeros_like(B), share, missing)

        monkeypatch.setattr(_Descent, "attempt", attempt)
        found = round_from_codes(stored, A, B, R).codes
        assert len(given) == len(script), name
        assert torch.equal(found, given[right]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "nf3 in short blocks"])
def test_other_roundings_keep_little_of_it(kind: str) -> None:
    """The nearest codes are nearly the stored ones, and feedback has next to nothing to feed back."""
    stored, R, quantizer = on_the_grid(kind, (256, 257)), moments(257), quantizer_for(**KINDS[kind])
    A, B = factors(stored, 0.01)
    ideal = stored.dequantize() + B @ A
    kept = share(stored, round_from_codes(stored, A, B, R), A, B, R)
    anew = [quantizer(ideal), round_with_feedback(ideal, quantizer, Metric.of(R))]
    others = [share(stored, one, A, B, R) for one in anew]
    assert abs(kept - 1) < 0.1
    assert all(abs(other - 1) > 0.3 for other in others), others


@pytest.mark.parametrize("seed", range(2))
@every_kind
@pytest.mark.slow
def test_corrections_leave_no_more_missing(monkeypatch: pytest.MonkeyPatch, kind: str, seed: int) -> None:
    stored, R = on_the_grid(kind, (40, 97), seed), moments(seed=seed)
    A, B = factors(stored, 0.01, seed=seed)
    left = []
    for corrections in (0, 4):
        monkeypatch.setattr("loftq.methods.descent._CORRECTIONS", corrections)
        change = changed(stored, round_from_codes(stored, A, B, R))
        left.append(missing(change, A, B, damped(R.double().numpy())))
    assert left[1] <= left[0] * (1 + 1e-4)
    assert left[0] <= 1 + 1e-4, "nor is more missing than all of it"


def test_a_delta_too_small_for_any_code_leaves_less_missing_or_the_codes() -> None:
    stored, R = on_the_grid("signed2", (4, 97)), moments()
    for size in (1e-3, 1e-5, 1e-8):
        A, B = factors(stored, size, rank=1)
        change = changed(stored, round_from_codes(stored, A, B, R))
        assert missing(change, A, B, damped(R.double().numpy())) <= 1 + 1e-4


def test_no_delta_and_rows_without_one() -> None:
    stored, R = on_the_grid("nf4"), moments()
    A, B = factors(stored, 0.01)
    for nothing in ((torch.zeros_like(A), B), (A, torch.zeros_like(B))):
        assert torch.equal(round_from_codes(stored, *nothing, R).codes, stored.codes)
    without = [0, 1, 2, 7, 32]
    B[without] = 0
    for columns in (B, B * torch.tensor([1.0, 0.0, 1.0, 0.0])):  # columns of zeros, as of ranks that weren't trained
        found = round_from_codes(stored, A, columns, R)
        same = (found.codes == stored.codes).all(1)
        assert same[without].all()
        assert not same.all()


def test_factors_that_say_the_same_twice() -> None:
    """Only the delta counts, not how it is written, but for float32's sums: a few codes beside midpoints."""
    stored, R = on_the_grid("nf4", (64, 97)), moments()
    A, B = factors(stored, 0.01, rank=2)
    exact = damped(R.double().numpy())
    twice = torch.cat([A, A, torch.zeros(1, 97)]), torch.cat([0.25 * B, 0.75 * B, torch.ones(64, 1)], dim=1)
    full = torch.eye(97), B @ A  # more factors than the delta has rank
    for one, other in ((A, B), twice, full):
        change = changed(stored, round_from_codes(stored, one, other, R))
        assert reference.share(change, arrays(B)[0] @ arrays(A)[0], exact) == pytest.approx(1, abs=0.1)
        assert missing(change, A, B, exact) < 0.5


def test_it_is_repeatable_and_changes_nothing_it_was_given() -> None:
    stored, R = on_the_grid("affine3"), moments()
    A, B = factors(stored, 0.01)
    given = [stored.codes, stored.scales, A, B, R]
    before = [tensor.clone() for tensor in given]
    first, second = (round_from_codes(stored, A, B, R) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))
    assert first.exact_scales is None


# -- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "affine3"])
@pytest.mark.slow
def test_moments_of_any_kind(kind: str) -> None:
    stored = on_the_grid(kind)
    A, B = factors(stored, 0.3)
    few = torch.randn(3, 97, generator=torch.Generator().manual_seed(5))
    dead = moments()
    dead[:, [3, 20]] = 0
    dead[[3, 20]] = 0
    diagonal = moments().diagonal().clone()
    for R in (few.T @ few / 3, dead.bfloat16().float(), diagonal):
        check_sweep(stored, A, B, R)
        assert round_from_codes(stored, A, B, R).dequantize().isfinite().all()
    same = [round_from_codes(stored, A, B, R).codes for R in (diagonal, diagonal.diag())]
    assert torch.equal(*same)
    none = [round_from_codes(stored, A, B, R).codes for R in (torch.zeros(97, 97), torch.zeros(97), torch.eye(97))]
    assert torch.equal(none[0], none[1])
    assert (none[0] != none[2]).float().mean() < 1e-3, "the identity, but for its damping"


@pytest.mark.parametrize("kind", ["nf4", "affine3", "signed2"])
@pytest.mark.slow
def test_units_of_weights_and_inputs_don_t_matter(kind: str) -> None:
    """Powers of two scale exactly; 2^-60 and its square are beyond what float32's squares can hold."""
    found = []
    for unit, square in ((1.0, 1.0), (2.0**-20, 1.0), (2.0**20, 1.0), (1.0, 2.0**-60), (1.0, 2.0**60)):
        stored = on_the_grid(kind, unit=0.05 * unit)
        A, B = factors(on_the_grid(kind), 0.01)
        found.append(round_from_codes(stored, A, B * unit, moments() * square).codes)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert not torch.equal(found[0], on_the_grid(kind).codes)


def test_what_it_cannot_do() -> None:
    stored = on_the_grid("nf4")
    A, B = factors(stored, 0.01)
    int8 = quantizer_for(quant_type="int8")(stored.dequantize())
    with pytest.raises(ConfigError, match=r"expected codes of blocks with a table, found int8's rows; round those to"):
        round_from_codes(int8, A, B, moments())
    wrong = moments()
    wrong[2, 2] = torch.nan
    with pytest.raises(ConfigError, match=r"statistics: expected finite second moments"):
        round_from_codes(stored, A, B, wrong)
