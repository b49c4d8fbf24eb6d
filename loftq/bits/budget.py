"""Bits, and if asked ranks, of every layer under a budget: an integer program, and the rule that it has to beat.

Each layer takes exactly one of its choices. With cost[i, j], and what choice j of layer i takes of limit k, a[i, j, k]:

    minimize  sum cost[i, j] x[i, j]    over x in {0, 1},  sum_j x[i, j] = 1,
    subject to  sum a[i, j, k] x[i, j] <= limit[k]

which HiGHS solves through ``scipy.optimize.milp``. (Bits by an integer program: LQ-LoRA, Guo et al. 2023, arXiv
2311.12023, with other errors.) A budget counts the bits of codes per targeted weight, or all bytes of model and
adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from qlora_kit.errors import ConfigError

# Seconds after which the best solution so far is taken; a model of hundreds of layers needs about one.
_SECONDS = 120.0
_GAP = 1e-4
# By how much the solver may overdraw a limit (of 1) and still call it kept.
_OVERDRAFT = 2e-6
# Of a limit that is a product of floats.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Choice:
    """What a layer may become.

    Attributes:
        bits, rank: of its weight's codes and its adapter.
        nbytes: of codes, scales and float32 factors.
        error: what it leaves of its layer's output, as a share of the mean square.
        factors: of ``nbytes``, those of the factors.
        importance: the nats a token that an error of 1 costs the model, of all the layer's choices; None if unknown.
    """

    bits: int
    rank: int
    nbytes: int
    error: float
    factors: int = 0
    importance: float | None = None

    @property
    def cost(self) -> float:
        """What is summed up over layers."""
        return self.error if self.importance is None else self.error * self.importance


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
        if self.rule == "first-layers" and (self.bits is None or self.bits > 4 or self.ranks):
            raise ConfigError(
                f"rule: expected bits of at most 4 and nothing else with 'first-layers', found bits={self.bits}, "
                f"memory={self.memory}, ranks={self.ranks}; use 'milp'"
            )
        if any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 for rank in self.ranks):
            raise ConfigError(f"ranks: expected integers of at least 1, found {self.ranks}; pass ranks=(8, 16, 32)")

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "ranks": list(self.ranks)}


def choose(
    choices: Mapping[str, Sequence[Choice]],
    weights: Mapping[str, int],
    budget: Budget,
    *,
    fixed: int,
    rank_of: Mapping[str, int],
) -> dict[str, Choice]:
    """The choice of each layer, by path, with the least total cost within ``budget``.

    Args:
        choices: of each layer, in the model's order.
        weights: how many weights each layer has.
        fixed: bytes of what isn't chosen: embeddings, norms and so on.
        rank_of: the configuration's own ranks.

    Raises:
        ConfigError: even the smallest choices don't fit; says what would.
    """
    check_possible(choices, weights, budget, fixed=fixed, rank_of=rank_of)
    if budget.rule == "first-layers":
        return _first_layers(choices, weights, budget, rank_of)
    rows, limits = _limits(choices, weights, budget, fixed, rank_of)
    taken = _solved(choices, rows, limits)
    if _over(taken, rows, limits):  # within the solver's tolerance
        taken = _solved(choices, rows, [limit * (1 - _OVERDRAFT) for limit in limits])
    if taken is None or _over(taken, rows, limits):
        taken = _least(choices, rows)
    flat = [(path, choice) for path, own in choices.items() for choice in own]
    return {path: choice for (path, choice), one in zip(flat, taken, strict=True) if one}


def check_possible(
    choices: Mapping[str, Sequence[Choice]],
    weights: Mapping[str, int],
    budget: Budget,
    *,
    fixed: int,
    rank_of: Mapping[str, int],
) -> None:
    """Raises ConfigError as ``choose`` does, which the errors of ``choices`` have no part in."""
    rows, limits = _limits(choices, weights, budget, fixed, rank_of)
    for number, (row, limit) in enumerate(zip(rows, limits, strict=True)):
        least = float(_least(choices, [row]) @ row)
        if least > limit * (1 + _ROUNDING):
            raise ConfigError(_impossible(budget, least, limit, fixed, sum(weights.values()), of_ranks=number > 0))


def _solved(
    choices: Mapping[str, Sequence[Choice]], rows: Sequence[np.ndarray], limits: Sequence[float]
) -> np.ndarray | None:
    """1 for each choice that is taken, 0 for the others, one layer's after the other's; None if there is no way."""
    flat = [choice for own in choices.values() for choice in own]
    one_each = np.repeat(np.eye(len(choices)), [len(own) for own in choices.values()], axis=1)
    costs = np.array([choice.cost for choice in flat])
    # The solver stops at 1e-6 from the best too, which is to be little beside the sum and not beside its largest term.
    size = max(sum(min(choice.cost for choice in own) for own in choices.values()), 1e-6 * costs.max()) or 1.0
    solution = milp(
        costs / size,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            # In shares of the limit, so that the solver's tolerance means the same for bytes and bits.
            LinearConstraint(np.array(rows) / np.array(limits)[:, None], -np.inf, 1),
        ],
        options={"time_limit": _SECONDS, "mip_rel_gap": _GAP},
    )
    return None if solution.x is None else np.round(solution.x)


def _least(choices: Mapping[str, Sequence[Choice]], rows: Sequence[np.ndarray]) -> np.ndarray:
    """As ``_solved``: of each layer the choice that takes least of the first row, then of the next, then errs least."""
    taken, start = np.zeros(len(rows[0])), 0
    for own in choices.values():
        ranked = [(*(row[start + k] for row in rows), choice.cost) for k, choice in enumerate(own)]
        taken[start + ranked.index(min(ranked))] = 1
        start += len(own)
    return taken


def _over(taken: np.ndarray | None, rows: Sequence[np.ndarray], limits: Sequence[float]) -> bool:
    if taken is None:
        return False
    return any(float(taken @ row) > limit * (1 + _ROUNDING) for row, limit in zip(rows, limits, strict=True))


def mean_bits(chosen: Mapping[str, Choice], weights: Mapping[str, int]) -> float:
    """Bits of a code over all the layers' weights."""
    return sum(choice.bits * weights[path] for path, choice in chosen.items()) / max(1, sum(weights.values()))


def _limits(
    choices: Mapping[str, Sequence[Choice]],
    weights: Mapping[str, int],
    budget: Budget,
    fixed: int,
    rank_of: Mapping[str, int],
) -> tuple[list[np.ndarray], list[float]]:
    """What every choice takes of each limit, and the limits; the first is the one that was asked for."""
    flat = [(path, choice) for path, own in choices.items() for choice in own]
    if budget.memory is not None:
        return [np.array([float(choice.nbytes) for _, choice in flat])], [max(1.0, float(budget.memory - fixed))]
    assert budget.bits is not None
    rows = [np.array([float(choice.bits * weights[path]) for path, choice in flat])]
    limits = [budget.bits * sum(weights.values())]
    if budget.ranks:
        rows.append(np.array([float(choice.factors) for _, choice in flat]))
        # A layer's factors are of its rank times what one rank takes there.
        limits.append(sum(own[0].factors / own[0].rank * rank_of[path] for path, own in choices.items()))
    return rows, limits


def _first_layers(
    choices: Mapping[str, Sequence[Choice]], weights: Mapping[str, int], budget: Budget, rank_of: Mapping[str, int]
) -> dict[str, Choice]:
    """4 bits for as many of the first modules as the budget allows, 2 for the rest (Li et al. 2023, section 4)."""
    assert budget.bits is not None
    left = (budget.bits - 2) * sum(weights.values())
    chosen, full = {}, True
    for path, own in choices.items():
        full = full and 2 * weights[path] <= left
        left -= 2 * weights[path] if full else 0
        bits = 4 if full else 2
        chosen[path] = next(choice for choice in own if choice.bits == bits and choice.rank == rank_of[path])
    return chosen


def _impossible(budget: Budget, least: float, limit: float, fixed: int, weights: int, *, of_ranks: bool) -> str:
    if of_ranks:
        return (
            f"ranks: expected some that add up to no more than the {limit:,.0f} bytes of factors that the "
            f"configuration's own rank takes, found {least:,.0f} with the smallest of {budget.ranks}; add a smaller "
            "one, or raise the rank"
        )
    if budget.memory is not None:
        return (
            f"memory: expected at least {least + fixed:.0f} bytes, which is what the smallest choices take with "
            f"{fixed} bytes of what isn't quantized, found {budget.memory}; raise it, lower the rank, target more "
            "modules, or pass double_quant"
        )
    smallest = math.ceil(least / weights * 1e4) / 1e4
    return f"bits: expected at least {smallest:g}, the smallest choices' mean, found {budget.bits:g}; raise it"
