"""The choice under a budget equals that of trying everything, and keeps its limit."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from loftq.bits.budget import Budget, Choice, choose, mean_bits
from qlora_kit.errors import ConfigError

FIXED = 1000
# The solver may stop within 1e-4 of the least error.
GAP = 1 + 1e-4
Layers = dict[str, list[Choice]]


def case(seed: int, ranks: tuple[int, ...] = (4,), layers: int = 4) -> tuple[Layers, dict[str, int]]:
    """Layers of random widths, whose errors fall with bits and rank by several orders of magnitude."""
    random = np.random.default_rng(seed)
    choices, weights = {}, {}
    for number in range(layers):
        rows, columns = (int(n) for n in random.integers(8, 60, 2))
        importance = float(10.0 ** random.uniform(-3, 0))
        choices[f"layer{number}"] = [
            Choice(
                bits,
                rank,
                rows * columns * bits // 8 + 4 * rank * (rows + columns) + int(random.integers(0, 64)),
                importance * float(random.uniform(0.5, 1)) * 4.0 ** (2 - bits) / rank**0.5,
                4 * rank * (rows + columns),
            )
            for bits in (2, 3, 4, 8)
            for rank in ranks
        ]
        weights[f"layer{number}"] = rows * columns
    return choices, weights


def chosen(choices: Layers, weights: Mapping[str, int], budget: Budget, own_rank: int = 4) -> dict[str, Choice]:
    return choose(choices, weights, budget, fixed=FIXED, rank_of=dict.fromkeys(choices, own_rank))


def error(choice: Mapping[str, Choice]) -> float:
    return sum(one.error for one in choice.values())


def bytes_of(choice: Mapping[str, Choice]) -> int:
    return FIXED + sum(one.nbytes for one in choice.values())


def least_error(choices: Layers, fits: Callable[[dict[str, Choice]], bool]) -> float:
    """By trying every assignment."""
    every = (dict(zip(choices, picks, strict=True)) for picks in itertools.product(*choices.values()))
    return min(error(choice) for choice in every if fits(choice))


# -- the integer program ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2.0, 2.3, 3.1, 5.0, 7.9, 8.0])
@pytest.mark.parametrize("seed", range(6))
def test_mean_bits_are_spent_as_well_as_any_assignment_could(seed: int, bits: float) -> None:
    choices, weights = case(seed)
    limit = bits * sum(weights.values()) * (1 + 1e-12)  # a product of floats

    def fits(choice: dict[str, Choice]) -> bool:
        return sum(one.bits * weights[path] for path, one in choice.items()) <= limit

    found = chosen(choices, weights, Budget(bits=bits))
    assert list(found) == list(choices)
    assert fits(found)
    assert error(found) <= GAP * least_error(choices, fits)
    assert mean_bits(found, weights) == sum(found[p].bits * n for p, n in weights.items()) / sum(weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("ranks", [(4,), (2, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_memory_is_spent_as_well_as_any_assignment_could(seed: int, ranks: tuple[int, ...], share: float) -> None:
    choices, weights = case(seed, ranks)
    least, most = (FIXED + sum(end(c.nbytes for c in own) for own in choices.values()) for end in (min, max))
    memory = int(least + share * (most - least))
    found = chosen(choices, weights, Budget(memory=memory, ranks=ranks))
    assert bytes_of(found) <= memory
    assert error(found) <= GAP * least_error(choices, lambda choice: bytes_of(choice) <= memory)


@pytest.mark.parametrize("ranks", [(4,), (1, 4, 8), (2, 16)])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_under_mean_bits_take_no_more_factors_than_the_own_rank(seed: int, ranks: tuple[int, ...]) -> None:
    choices, weights = case(seed, ranks, layers=3)
    allowed = sum(own[0].factors // own[0].rank * 4 for own in choices.values())

    def fits(choice: dict[str, Choice]) -> bool:
        codes = sum(one.bits * weights[path] for path, one in choice.items())
        return codes <= 3 * sum(weights.values()) and sum(one.factors for one in choice.values()) <= allowed

    found = chosen(choices, weights, Budget(bits=3, ranks=ranks))
    assert fits(found)
    assert {one.rank for one in found.values()} <= set(ranks)
    assert error(found) <= GAP * least_error(choices, fits)


@pytest.mark.parametrize("ranks", [(), (2, 8)])
@pytest.mark.slow
def test_a_larger_budget_never_leaves_more_error(ranks: tuple[int, ...]) -> None:
    choices, weights = case(11, ranks or (4,), layers=12)
    by_bits = [error(chosen(choices, weights, Budget(bits=bits, ranks=ranks))) for bits in np.linspace(2, 8, 13)]
    least = FIXED + sum(min(c.nbytes for c in own) for own in choices.values())
    sizes = np.linspace(least, 4 * least, 13).astype(int)
    by_memory = [error(chosen(choices, weights, Budget(memory=int(size), ranks=ranks))) for size in sizes]
    for errors in (by_bits, by_memory):
        assert all(later <= GAP * earlier for earlier, later in itertools.pairwise(errors))
        assert errors[-1] < errors[0] / 10


def test_a_limit_is_kept_to_the_byte() -> None:
    """One byte of ten million is within what the solver calls equal."""
    choices = {"layer": [Choice(2, 4, 9_000_000, 1.0), Choice(4, 4, 10_000_001, 0.0)]}
    for memory, bits in ((10_000_000, 2), (10_000_001, 4)):
        found = choose(choices, {"layer": 1}, Budget(memory=memory), fixed=0, rank_of={"layer": 4})
        assert found["layer"].bits == bits


def test_one_hopeless_layer_does_not_blind_the_others() -> None:
    """An error that nobody would take mustn't make those of the other layers look alike."""
    choices = {
        "hopeless": [Choice(2, 4, 1, 1e6), Choice(4, 4, 1, 1e-3)],
        "other": [Choice(2, 4, 1, 2e-3), Choice(4, 4, 2, 1e-3)],
    }
    found = choose(choices, dict.fromkeys(choices, 1), Budget(memory=3), fixed=0, rank_of=dict.fromkeys(choices, 4))
    assert {path: one.bits for path, one in found.items()} == {"hopeless": 4, "other": 4}


# -- the rule of the first layers ------------------------------------------------------------------------------


def alike(layers: int = 16) -> tuple[Layers, dict[str, int]]:
    own = [Choice(bits, 4, 100 * bits, 4.0**-bits, 50) for bits in (2, 3, 4, 8)]
    return {f"layer{number}": list(own) for number in range(layers)}, {f"layer{n}": 100 for n in range(layers)}


@pytest.mark.parametrize(("bits", "share"), [(2, 0), (2.25, 1 / 8), (2.5, 1 / 4), (3, 1 / 2), (4, 1)])
def test_the_first_layers_get_4_bits_and_the_rest_2(bits: float, share: float) -> None:
    """LoftQ's mixed precision: a mean of 3, 2.5 or 2.25 bits is a half, a quarter or an eighth at 4 bits."""
    choices, weights = alike()
    found = chosen(choices, weights, Budget(bits=bits, rule="first-layers"))
    expected = [4] * int(16 * share) + [2] * (16 - int(16 * share))
    assert [one.bits for one in found.values()] == expected
    assert mean_bits(found, weights) == bits


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2.0, 2.25, 2.5, 3.0, 3.3, 4.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_integer_program_is_never_worse_than_the_first_layers(seed: int, bits: float) -> None:
    choices, weights = case(seed, layers=20)
    rule = chosen(choices, weights, Budget(bits=bits, rule="first-layers"))
    program = chosen(choices, weights, Budget(bits=bits))
    assert mean_bits(rule, weights) <= bits + 1e-12
    assert mean_bits(program, weights) <= bits + 1e-12
    assert error(program) <= GAP * error(rule)


# -- what can't be ---------------------------------------------------------------------------------------------


def test_an_impossible_memory_says_the_least_that_is_possible() -> None:
    choices, weights = case(3)
    least = FIXED + sum(min(c.nbytes for c in own) for own in choices.values())
    for memory in (0, least - 1):
        with pytest.raises(ConfigError, match=rf"memory: expected at least {least} bytes.*found {memory};") as caught:
            chosen(choices, weights, Budget(memory=memory))
    said = int(re.search(r"at least ([0-9]+)", str(caught.value))[1])  # type: ignore[index]
    assert bytes_of(chosen(choices, weights, Budget(memory=said))) == said


def test_impossible_bits_say_the_least_that_is_possible() -> None:
    """Where layers can't go down to 2 bits."""
    choices = {"first": [Choice(3, 4, 1, 1.0)], "second": [Choice(4, 4, 1, 1.0)]}
    weights = {"first": 200, "second": 100}
    with pytest.raises(ConfigError, match=r"bits: expected at least 3\.3334, .* found 2\.5; raise it") as caught:
        chosen(choices, weights, Budget(bits=2.5))
    said = float(re.search(r"at least ([0-9.]+),", str(caught.value))[1])  # type: ignore[index]
    assert mean_bits(chosen(choices, weights, Budget(bits=said)), weights) == pytest.approx(10 / 3)


def test_ranks_that_are_all_too_large_are_named() -> None:
    choices, weights = case(3, (8, 16))
    with pytest.raises(ConfigError, match=r"ranks: .* found [0-9,]+ with the smallest of \(8, 16\); add a smaller one"):
        chosen(choices, weights, Budget(bits=3, ranks=(8, 16)))
    assert {one.rank for one in chosen(choices, weights, Budget(bits=3, ranks=(8, 16)), own_rank=8).values()} == {8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"budget: expected either bits or memory, found bits=None and memory=None; pass one"),
        ({"bits": 3, "memory": 5}, r"budget: expected either bits or memory, found bits=3 and memory=5"),
        ({"bits": 1.9}, r"bits: expected a mean from 2 to 8, found 1\.9"),
        ({"bits": 8.1}, r"bits: expected a mean from 2 to 8, found 8\.1"),
        ({"bits": float("nan")}, r"bits: expected a mean from 2 to 8, found nan"),
        ({"bits": 3, "rule": "best"}, r"rule: expected 'milp' or 'first-layers', found 'best'"),
        ({"bits": 3, "ranks": (8, 0)}, r"ranks: expected integers of at least 1, found \(8, 0\)"),
        ({"bits": 3, "ranks": (8, 2.5)}, r"ranks: expected integers of at least 1, found \(8, 2\.5\)"),
        ({"bits": 3, "ranks": (True,)}, r"ranks: expected integers of at least 1, found \(True,\)"),
        ({"memory": 9, "rule": "first-layers"}, r"rule: expected bits of at most 4 .*memory=9"),
        ({"bits": 3, "ranks": (8,), "rule": "first-layers"}, r"rule: expected bits of at most 4 .*ranks=\(8,\)"),
        ({"bits": 5, "rule": "first-layers"}, r"rule: expected bits of at most 4 .*bits=5"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**fields)


# -- sizes -----------------------------------------------------------------------------------------------------
