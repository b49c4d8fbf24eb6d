"""How far a weight follows its text: what the library finds by eigenvectors, against every choice tried on samples.

The halves are real ones: rows of one text, found from one half, held against the other, with float64 least squares.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reference.starts import change_towards, error_on_others, sequential_error, unlikelihood
from torch import Tensor

from loftq import factorize
from loftq.methods.alignment import PULLS, Trust, aligned_weight, trusted, trusted_damping, trusted_weight
from loftq.methods.factors import Factors
from loftq.methods.halves import Half
from qlora_kit.errors import ConfigError

OUT, IN = 13, 24
# The products are float32: the errors compared are differences of sums of some hundred terms of 6e-8 each.
ROUNDING = 2e-5


def weight(seed: int = 0) -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) * 0.05


def rows(count: int, seed: int = 0, off: float = 0.2, text: int = 0) -> tuple[Tensor, Tensor]:
    """A layer's inputs in the original model and, near them, in the quantized: in part a fixed map of the others, which
    more text confirms, in part chance. ``seed`` is of the models, ``text`` of what they read."""
    models, draw = (torch.Generator().manual_seed(number) for number in (seed, 100 + 10 * seed + text))
    mixing = torch.randn(IN, IN, generator=models) * torch.logspace(-1, 1, IN)
    lasting = off * torch.randn(IN, IN, generator=models) / IN**0.5
    x = torch.randn(count, IN, generator=draw) @ mixing
    return x, x + x @ lasting + off * mixing.std() * torch.randn(count, IN, generator=draw)


def missing(seen: Tensor, seed: int = 0, text: int = 0) -> Tensor:
    """What a stream falls short of, rows of ``OUT``: in part a fixed map of the layer's inputs, in part chance."""
    models, draw = (torch.Generator().manual_seed(number) for number in (1000 + seed, 2000 + 10 * seed + text))
    known = seen @ (torch.randn(IN, OUT, generator=models) * 0.01)
    return known + known.std() * torch.randn(len(seen), OUT, generator=draw)


class Text:
    """Moments of all ``count`` inputs and of the first of them, in float64 and as the library gets them.

    Args:
        stream: the layer's output is added to a stream that something is missing in.
    """

    def __init__(self, count: int, first: int, seed: int = 0, off: float = 0.2, *, stream: bool = False) -> None:
        x, seen = rows(count, seed, off)
        short = missing(seen, seed).double().numpy() if stream else None
        x, seen = x.double().numpy(), seen.double().numpy()
        self.share = first / count
        whole, *self.parts = (
            [None if each is None else each[s].T @ seen[s] / len(seen[s]) for each in (seen, x, short)]
            for s in (slice(None), slice(0, first), slice(first, None))
        )
        self.R, self.C, self.S = whole
        self.unit = float(np.trace(self.R)) / IN

    @property
    def given(self) -> tuple[Tensor, Tensor, Half]:
        R, C = self.as_given(self.R, self.C)
        return R, C, Half(*self.as_given(*self.parts[0][:2]), self.share, *self.as_given(*self.parts[0][2:]))

    @staticmethod
    def as_given(*moments: np.ndarray | None) -> list[Any]:
        return [None if each is None else torch.from_numpy(each).float() for each in moments]

    @property
    def short(self) -> dict[str, Tensor]:
        return {} if self.S is None else {"shortfall": torch.from_numpy(self.S).float()}

    def error(self, full: np.ndarray, pull: float, part: float) -> float:
        """Of both halves, each with what was found from the other, an input counting as any other."""
        total = 0.0
        for own, other, counts in ((0, 1, 1 - self.share), (1, 0, self.share)):
            (R, C, S), others = self.parts[own], self.parts[other]
            change = part * change_towards(full, R, C, pull * self.unit, S)
            total += counts * error_on_others(full, full + change, *others)
        return total


@pytest.mark.parametrize(("count", "first"), [(400, 200), (60, 30), (60, 20), (20, 10)])
@pytest.mark.parametrize("off", [0.02, 0.3])
@pytest.mark.parametrize("stream", [False, True])
def test_no_other_pull_or_part_does_better_on_the_other_half(count: int, first: int, off: float, stream: bool) -> None:
    text, full = Text(count, first, off=off, stream=stream), weight()
    trust = trusted(full, *text.given, **text.short)
    W = full.double().numpy()
    nothing = text.error(W, 1.0, 0.0)
    size = float(np.trace(W @ text.R @ W.T))
    best = text.error(W, trust.pull, trust.part)
    assert 0 <= trust.part <= 1
    assert trust.gain == pytest.approx((nothing - best) / size, abs=ROUNDING)
    for pull in PULLS:
        for part in (0.0, 0.25, 0.5, 0.75, 1.0, max(0.0, trust.part - 0.05), min(1.0, trust.part + 0.05)):
            assert text.error(W, pull, part) >= best - ROUNDING * size, (pull, part)


def test_the_fewer_rows_the_less_they_are_believed() -> None:
    found = [trusted(weight(), *Text(count, count // 2, off=0.3).given) for count in (4000, 120, 24)]
    followed = [trust.part / (1 + trust.pull) for trust in found]
    assert followed[0] > followed[1] > followed[2]


def test_on_other_text_it_beats_following_the_text_all_the_way() -> None:
    """Thirty rows of twenty-four inputs: the change that is best on them does harm, part of it helps."""
    for seed in range(4):
        text, full = Text(30, 15, seed, off=0.3), weight(seed)
        W = full.double().numpy()
        x, seen = (each.double().numpy() for each in rows(3000, seed, 0.3, text=1))
        V, _ = trusted_weight(full, *text.given)
        followed = W + change_towards(W, text.R, text.C, 1e-3 * text.unit)
        errors = [sequential_error(W, each, x, seen) for each in (V.double().numpy(), followed, W)]
        assert errors[0] < errors[1]
        assert errors[0] < errors[2] * 1.01


def test_a_weight_of_more_rows_than_inputs_is_told_the_same() -> None:
    """It is looked at in fewer rows."""
    text = Text(60, 20, off=0.3)
    tall = torch.cat([weight(seed) for seed in range(4)])
    assert len(tall) > IN
    trust, W = trusted(tall, *text.given), tall.double().numpy()
    size = float(np.trace(W @ text.R @ W.T))
    assert trust.gain > 0
    gain = text.error(W, trust.pull, 0.0) - text.error(W, trust.pull, trust.part)
    assert trust.gain == pytest.approx(gain / size, abs=ROUNDING)


@pytest.mark.parametrize("stream", [False, True])
def test_the_weight_is_that_of_all_rows_with_half_the_pull(stream: bool) -> None:
    text, full = Text(80, 40, stream=stream), weight()
    found, trust = trusted_weight(full, *text.given, **text.short)
    W = full.double().numpy()
    part = 2 * trust.part / (1 + trust.part)
    expected = W + part * change_towards(W, text.R, text.C, trust.pull / 2 * text.unit, text.S)
    np.testing.assert_allclose(found.double().numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_what_is_missing_in_the_stream_is_made_up_for_on_other_text_too() -> None:
    for seed in range(4):
        text, full = Text(200, 100, seed, stream=True), weight(seed)
        x, seen = rows(3000, seed, 0.2, text=1)
        short = missing(seen, seed, text=1).double().numpy()
        x, seen, W = x.double().numpy(), seen.double().numpy(), full.double().numpy()
        V, U = (trusted_weight(full, *text.given, **given)[0].double().numpy() for given in (text.short, {}))
        left = [float(np.mean((short + x @ W.T - seen @ each.T) ** 2)) for each in (V, U, W)]
        assert left[0] < 0.8 * left[1]
        assert left[0] < 0.8 * left[2]


def test_without_halves_a_shortfall_is_made_up_for_all_the_way() -> None:
    """The reference is least squares over the samples."""
    text, full = Text(300, 150, stream=True), weight()
    R, C, _ = text.given
    W = full.double().numpy()
    V = aligned_weight(full, R, C, 1e-3, **text.short).double().numpy()
    pulled = W + change_towards(W, text.R, text.C, 1e-3 * text.unit, text.S)
    np.testing.assert_allclose(V, pulled, atol=1e-5 * np.abs(pulled).max())
    given = {"statistics": R, "cross": C, "quant_type": "uniform8", "blocksize": 8, "damping": 1e-3}
    result = factorize(full, 3, method="aligned", **given, **text.short)
    assert result.goal is not None
    np.testing.assert_allclose(result.goal.double().numpy(), pulled, atol=1e-5 * np.abs(pulled).max())


def test_a_shortfall_that_can_t_be_is_refused() -> None:
    text = Text(60, 30, stream=True)
    R, C, half = text.given
    short, given = text.short["shortfall"], {"method": "aligned", "statistics": R}
    with pytest.raises(
        ConfigError, match=r"shortfall: expected finite moments .* of shape \(13, 24\).*found \(24, 24\)"
    ):
        factorize(weight(), 3, cross=C, half=half, shortfall=R, **given)
    with pytest.raises(ConfigError, match="shortfall: expected it beside cross"):
        factorize(weight(), 3, shortfall=short, **given)
    with pytest.raises(ConfigError, match="beside the half's own"):
        factorize(weight(), 3, cross=C, half=replace(half, shortfall=None), shortfall=short, **given)
    with pytest.raises(ConfigError, match=r"shortfall: .*aren't finite"):
        factorize(weight(), 3, cross=C, half=half, shortfall=short * torch.inf, **given)


@pytest.mark.parametrize(("count", "first"), [(400, 200), (60, 20), (20, 10)])
def test_damping_makes_the_other_half_likeliest(count: int, first: int) -> None:
    text = Text(count, first)
    damping = trusted_damping(*text.given)

    def cost(pull: float) -> float:
        (own, *_), (other, *_) = text.parts
        total = (1 - text.share) * unlikelihood(own, other, pull * text.unit)
        return total + text.share * unlikelihood(other, own, pull * text.unit)

    assert cost(damping) <= min(cost(pull) for pull in PULLS) + ROUNDING * IN


def test_fewer_rows_are_damped_more() -> None:
    dampings = [trusted_damping(*Text(count, count // 2).given) for count in (4000, 100, 20)]
    assert dampings[0] < dampings[1] < dampings[2]


def test_where_nothing_differs_nothing_is_changed() -> None:
    text, full = Text(60, 30), weight()
    R, _, half = text.given
    found, trust = trusted_weight(full, R, R, Half(half.statistics, half.statistics, 0.5))
    assert trust == Trust(trust.pull, 0.0, 0.0)
    assert found is full
    for nothing in (torch.zeros_like(full), full):
        zeros = torch.zeros_like(R)
        given = (R, R) if nothing is not full else (zeros, zeros)
        assert trusted(nothing, *given, Half(*given, 0.5)).part == 0.0
    assert trusted_damping(zeros, zeros, Half(zeros, zeros, 0.5)) in PULLS


@pytest.mark.parametrize("units", [1e-15, 1e15])
def test_units_don_t_matter(units: float) -> None:
    R, C, half = Text(60, 30).given
    plain = trusted(weight(), R, C, half)
    moved = trusted(weight() * units, R * units, C * units, Half(half.statistics * units, half.cross * units, 0.5))
    assert moved.pull == plain.pull
    assert (moved.part, moved.gain) == pytest.approx((plain.part, plain.gain), rel=1e-3)


def test_weights_with_the_same_inputs_share_what_is_made_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *args: calls.append(1) or eigh(*args))
    R, C, half = Text(60, 30).given
    factors = Factors()
    given = {"method": "aligned", "bits": 2, "statistics": R, "cross": C, "half": half}
    shared = [factorize(weight(seed), 3, factors=factors, **given) for seed in range(3)]
    assert len(calls) == 2, "a decomposition for each half"
    alone = [factorize(weight(seed), 3, **given) for seed in range(3)]
    assert len(calls) == 2 + 3 * 2
    assert all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B) for a, b in zip(shared, alone, strict=True))


def test_the_start_follows_the_text_as_far_as_the_halves_say() -> None:
    text, full = Text(60, 30, off=0.3), weight()
    R, C, half = text.given
    result = factorize(full, 3, bits=2, method="aligned", statistics=R, cross=C, half=half)
    target, _ = trusted_weight(full, R, C, half)
    assert torch.equal(result.goal, target)
    damping = trusted_damping(R, C, half)
    asked = factorize(full, 3, bits=2, method="aligned", statistics=R, cross=C, half=half, damping=damping)
    assert torch.equal(asked.A, result.A)
    other = factorize(full, 3, bits=2, method="aligned", statistics=R, cross=C, half=half, damping=5.0)
    assert not torch.equal(other.A, result.A)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"half": Half(torch.eye(IN), torch.eye(IN), 1.0)},
            "half: expected full moments .* between 0 and 1, .* of 1.0",
        ),
        ({"half": Half(torch.ones(IN), torch.eye(IN), 0.5)}, r"half: expected full moments .* found \(24,\) of 0.5"),
        ({"half": Half(torch.eye(3), torch.eye(3), 0.5)}, r"statistics: expected second moments of shape \(24, 24\)"),
        ({"half": Half(torch.eye(IN), torch.eye(3), 0.5)}, r"cross: expected finite moments .* of shape \(24, 24\)"),
        ({"cross": None}, "half: expected the moments of all inputs beside those of a part"),
    ],
)
def test_what_can_t_be_a_part_is_named(changed: dict[str, object], message: str) -> None:
    R, C, half = Text(60, 30).given
    with pytest.raises(ConfigError, match=message):
        factorize(weight(), 3, method="aligned", **{"statistics": R, "cross": C, "half": half, **changed})
