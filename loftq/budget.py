"""Bits, and if asked ranks, of every layer under a budget: an integer program, and the rule that it has to beat.

Each layer takes exactly one of its choices. With error[i, j] and costs a[i, j, k] of layer i's choice j:

    minimize  sum error[i, j] x[i, j]    over x in {0, 1},  sum_j x[i, j] = 1,
    subject to  sum a[i, j, k] x[i, j] <= limit[k]

which HiGHS solves through ``scipy.optimize.milp``. (Bits by an integer program: LQ-LoRA, Guo et al. 2023, arXiv
2311.12023, with other errors.) A budget counts the bits of codes per targeted weight, or all bytes of model and
adapters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from qlora_kit.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Seconds after which the best solution so far is taken; a model of hundreds of layers needs about one.
_SECONDS = 120.0
_GAP = 1e-4


@dataclass(frozen=True)
class Choice:
    """What a layer may become.

    Attributes:
        bits, rank: of its weight's codes and its adapter.
        nbytes: of codes, scales and float32 factors.
        error: what it costs, to be summed up over layers.
    """

    bits: int
    rank: int
    nbytes: int
    error: float


@dataclass(frozen=True)
class Budget:
    """What may be used.

    Attributes:
        bits: mean bits of a code over all targeted weights, or None.
        memory: bytes of the whole quantized model with its adapters, or None; one of the two is given.
        ranks: ranks to choose from; empty keeps those of the configuration. With ``bits`` they may add up to no more
            adapter parameters than those have.
        rule: "milp", or "first-layers": the first layers 4 bits and the rest 2, as in the LoftQ paper.

    Raises:
        ConfigError: a field can't be; names it.
    """

    bits: float | None = None
    memory: int | None = None
    ranks: tuple[int, ...] = ()
    rule: str = "milp"

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.memory is None):
            raise ConfigError(
                f"budget: expected either bits or memory, found bits={self.bits} and memory={self.memory}; pass one"
            )
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise ConfigError(f"bits: expected a mean from 2 to 8, found {self.bits:g}; pass bits=2.5")
        if self.rule not in ("milp", "first-layers"):
            raise ConfigError(f"rule: expected 'milp' or 'first-layers', found {self.rule!r}; leave it out")
        if self.rule == "first-layers" and (self.memory is not None or self.ranks):
            raise ConfigError("rule: 'first-layers' knows mean bits alone, found memory or ranks beside it; use 'milp'")
        if any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 for rank in self.ranks):
            raise ConfigError(f"ranks: expected integers of at least 1, found {self.ranks}; pass ranks=(8, 16, 32)")

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "ranks": list(self.ranks)}


def parse_bytes(text: str) -> int:
    """``"4GiB"``, ``"500MB"`` or plain bytes as a number.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ConfigError(f"size: expected a number with B, KB, MB, GB, KiB, MiB or GiB, found {text!r}; pass 4GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def choose(
    choices: Mapping[str, Sequence[Choice]],
    weights: Mapping[str, int],
    budget: Budget,
    *,
    fixed: int,
    rank_of: Mapping[str, int],
) -> dict[str, Choice]:
    """The choice of each layer, by path, with the least total error within ``budget``.

    Args:
        choices: of each layer, in the model's order.
        weights: how many weights each layer has.
        fixed: bytes of what isn't chosen: embeddings, norms and so on.
        rank_of: the configuration's own ranks.

    Raises:
        ConfigError: even the smallest choices don't fit; says what would.
    """
    if budget.rule == "first-layers":
        return _first_layers(choices, weights, budget, rank_of)
    flat = [(path, choice) for path, own in choices.items() for choice in own]
    owner = {path: row for row, path in enumerate(choices)}
    one_each = np.zeros((len(owner), len(flat)))
    for column, (path, _) in enumerate(flat):
        one_each[owner[path], column] = 1
    rows, limits = _limits(flat, weights, budget, fixed, rank_of)
    least = sum(min(rows[0][k] for k, (path, _) in enumerate(flat) if path == layer) for layer in owner)
    if least > limits[0] * (1 + 1e-9):
        raise ConfigError(_impossible(budget, least, fixed, sum(weights.values())))
    errors = np.array([choice.error for _, choice in flat])
    solution = milp(
        errors / (errors.max() or 1.0),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            # In shares of the limit, so that the solver's tolerance means the same for bytes and bits.
            LinearConstraint(np.array(rows) / np.array(limits)[:, None], -np.inf, 1),
        ],
        options={"time_limit": _SECONDS, "mip_rel_gap": _GAP},
    )
    if solution.x is None:
        raise ConfigError(f"budget: expected one that the solver can meet, found none ({solution.message}); raise it")
    return {path: choice for (path, choice), taken in zip(flat, solution.x, strict=True) if taken > 0.5}


def mean_bits(chosen: Mapping[str, Choice], weights: Mapping[str, int]) -> float:
    """Bits of a code over all the layers' weights."""
    return sum(choice.bits * weights[path] for path, choice in chosen.items()) / max(1, sum(weights.values()))


def _limits(
    flat: Sequence[tuple[str, Choice]],
    weights: Mapping[str, int],
    budget: Budget,
    fixed: int,
    rank_of: Mapping[str, int],
) -> tuple[list[list[float]], list[float]]:
    """What every choice takes of each limit, and the limits; the first is the one that was asked for."""
    if budget.memory is not None:
        return [[float(choice.nbytes) for _, choice in flat]], [max(1.0, float(budget.memory - fixed))]
    assert budget.bits is not None
    rows = [[float(choice.bits * weights[path]) for path, choice in flat]]
    limits = [budget.bits * sum(weights.values())]
    if budget.ranks:
        # A layer's share of adapter bytes is its rank times what one rank takes there.
        by_path = {path: next(c for p, c in flat if p == path) for path, _ in flat}
        of_codes = {path: _bytes_per_rank([c for p, c in flat if p == path]) for path in by_path}
        rows.append([of_codes[path] * choice.rank for path, choice in flat])
        limits.append(sum(of_codes[path] * rank_of[path] for path in by_path))
    return rows, limits


def _bytes_per_rank(choices: Sequence[Choice]) -> float:
    same = [choice for choice in choices if choice.bits == choices[0].bits]
    least, most = min(same, key=lambda c: c.rank), max(same, key=lambda c: c.rank)
    return (most.nbytes - least.nbytes) / (most.rank - least.rank) if most.rank > least.rank else 0.0


def _first_layers(
    choices: Mapping[str, Sequence[Choice]], weights: Mapping[str, int], budget: Budget, rank_of: Mapping[str, int]
) -> dict[str, Choice]:
    """4 bits for as many of the first modules as the budget allows, 2 for the rest (Li et al. 2023, section 4)."""
    assert budget.bits is not None
    left = (budget.bits - 2) * sum(weights.values())
    if left < 0:
        least = 2.0 * sum(weights.values())
        raise ConfigError(_impossible(budget, least, 0, sum(weights.values())))
    chosen, full = {}, True
    for path, own in choices.items():
        full = full and 2 * weights[path] <= left
        left -= 2 * weights[path] if full else 0
        bits = 4 if full else 2
        chosen[path] = next(choice for choice in own if choice.bits == bits and choice.rank == rank_of[path])
    return chosen


def _impossible(budget: Budget, least: float, fixed: int, weights: int) -> str:
    if budget.memory is not None:
        return (
            f"memory: expected at least {least + fixed:,.0f} bytes, which is what the smallest choices take with "
            f"{fixed:,} bytes of what isn't quantized, found {budget.memory:,}; raise it, lower the rank, target more "
            "modules, or pass double_quant"
        )
    return f"bits: expected at least {least / weights:.2f}, the smallest choices' mean, found {budget.bits}; raise it"
