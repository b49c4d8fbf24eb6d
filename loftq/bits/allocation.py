"""How many bits each layer gets: what every choice would leave of its output, and then ``budget.choose``.

The error of a choice is what remains after the low-rank correction, E ||(W - Q - sBA) x||^2 as a share of E ||W x||^2
(of ||W||^2 where there are no statistics); foretold where the method can, else found by a start. Where there is a text,
gradients say what the model makes of an error there (``inputs.gradients``), and costs are nats; without one shares are
summed up as they are, since a layer's scale says nothing of its weight in the model's output: norms and residual sums
come between. benchmarks/RESULTS.md compares.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.config.loftq import MIXED_TYPES, LoftQConfig
from qlora_kit.config.lora import LoraConfig
from qlora_kit.distributed.team import ALONE, Team
from qlora_kit.errors import ConfigError, TargetError
from qlora_kit.initializers import planned
from qlora_kit.injection.engine import PlanEntry, Request, request_for
from qlora_kit.naming import module_at

from ..inputs.batches import evenly
from ..inputs.gradients import loss_weights
from ..inputs.groups import Seen, stages
from ..inputs.text import calibration_batches
from ..methods.factors import Factors
from ..methods.metric import output_norm
from ..methods.registry import needs_of
from ..starts.kept_dense import kept_dense, reason_of
from ..starts.options import factorize_as, foretold_as, module_bytes
from ..starts.startable import DENSE, checked
from .budget import Budget, Choice, check_possible, choose, mean_bits

# So many of the text's tokens choices are made by; more of them don't change what types leave beside one another.
TOKENS = 8192


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes:
        config: the LoraConfig that carries it out: ``loftq_config.bits_pattern`` and ``rank_pattern`` by path.
        choices: each layer's choice by path, in the model's order.
        bits: mean bits of a code.
        nbytes: of the whole model with its adapters.
        error: the choices' total: nats a token that the model is foretold to lose, where a text has told; else the sum
            of their errors.
    """

    config: LoraConfig
    choices: Mapping[str, Choice]
    bits: float
    nbytes: int
    error: float

    def __str__(self) -> str:
        width = max([len(path) for path in self.choices] + [6])
        lines = [f"{'module':{width}}  bits  rank  error"]
        lines += [f"{path:{width}}  {c.bits:>4}  {c.rank:>4}  {c.error**0.5:.4f}" for path, c in self.choices.items()]
        last = f"{self.bits:.3f} bits a code, {self.nbytes:,} bytes in all"
        if any(choice.importance is not None for choice in self.choices.values()):
            last += f"; {self.error:.3g} nats a token more to be expected than before"
        return "\n".join([*lines, last])


@torch.no_grad()
def allocate(
    model: nn.Module,
    config: LoraConfig,
    *,
    bits: float | None = None,
    memory: int | None = None,
    ranks: Sequence[int] = (),
    rule: str = "milp",
) -> Allocation:
    """Bits (2, 3, 4 or 8), and ranks if asked, of the modules that ``config`` targets; ``model`` isn't changed.

    Args:
        config: with ``init_lora_weights="loftq"``; its ``loftq_config`` says how starts are found and calibrated.
        bits, memory, ranks, rule: see ``loftq.bits.budget.Budget``.

    Raises:
        ConfigError: the budget can't be met (says the smallest possible), or ``config`` has types or bits already.
        TargetError: a module is quantized already; besides, as StorageError, see ``loftq.starts.whole_model.prepare``.
    """
    budget = Budget(bits, memory, tuple(ranks), rule)
    options = undecided(config.loftq_config or LoftQConfig())
    few = replace(options, bits_pattern={".*": 2})  # as any budget allows, for what a start of few bits needs
    config, plan = planned(model, replace(config, init_lora_weights="loftq", loftq_config=few))
    options = replace(config.loftq_config or options, bits_pattern={})
    kept = kept_dense(model, options)
    asked = ((entry, checked(request_for(model, entry, config))) for entry in plan.entries)
    entries = {entry: _dense(request) for entry, request in asked if reason_of(request, kept) is None}
    requests = {entry.path: request for entry, request in entries.items()}
    targeted = {id(request.base.weight) for request in requests.values()}
    fixed = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in targeted)
    # Those are copied beside the adapter.
    fixed += sum(p.nbytes for path in plan.modules_to_save for p in module_at(model, path).parameters())
    sizes = {path: request.shape[0] * request.shape[1] for path, request in requests.items()}
    costs = {path: costs_of(request, options, budget) for path, request in requests.items()}
    rank_of = {entry.path: entry.rank for entry in entries}
    check_possible(costs, sizes, budget, fixed=fixed, rank_of=rank_of)
    found: dict[str, list[Choice]] = {}
    told: Mapping[str, float] = {}

    def measure(path: str, seen: Seen | None) -> None:
        request = requests[path]
        found[path] = measured(request.codec.read(request.base), request, options, budget, seen, told.get(path))

    if needs_of(options.chosen_method).statistics is None:
        for path in requests:
            measure(path, None)
    else:
        batches = calibration_batches(options, model)
        told = gradients_told(model, batches, requests, options, budget)
        for stage in stages(model, evenly(batches, TOKENS), requests):
            for path in stage.paths:
                measure(path, stage.seen().get(path))
        for path in requests.keys() - found.keys():
            measure(path, None)
    return decide(config, {path: found[path] for path in requests}, sizes, budget, fixed, list(entries))


def decide(
    config: LoraConfig,
    choices: Mapping[str, Sequence[Choice]],
    sizes: Mapping[str, int],
    budget: Budget,
    fixed: int,
    entries: Sequence[PlanEntry],
) -> Allocation:
    """Choose, and write the choice into ``config``, by which ``entries`` were planned."""
    known = [choice.importance for own in choices.values() for choice in own if choice.importance is not None]
    if known:  # of modules that no token reached, as those are that some did
        usual = median(known)
        choices = {
            path: [choice if choice.importance is not None else replace(choice, importance=usual) for choice in own]
            for path, own in choices.items()
        }
    chosen = choose(choices, sizes, budget, fixed=fixed, rank_of={entry.path: entry.rank for entry in entries})
    # Patterns match the ends of paths too: longer ones first, so that each path meets its own.
    order = sorted(chosen, key=len, reverse=True)
    loftq = replace(config.loftq_config or LoftQConfig(), bits_pattern={path: chosen[path].bits for path in order})
    ranks: dict[str, int] = {path: chosen[path].rank for path in order} if budget.ranks else dict(config.rank_pattern)
    alphas = dict(config.alpha_pattern)
    if budget.ranks:
        # Each scaling stays what it was meant to be: alpha follows the rank as the scaling does.
        more = {entry.path: chosen[entry.path].rank / entry.rank for entry in entries}
        alpha_of = {e.path: e.alpha * (sqrt(more[e.path]) if config.use_rslora else more[e.path]) for e in entries}
        alphas = {path: alpha_of[path] for path in order}
    return Allocation(
        replace(config, init_lora_weights="loftq", loftq_config=loftq, rank_pattern=ranks, alpha_pattern=alphas),
        chosen,
        mean_bits(chosen, sizes),
        fixed + sum(choice.nbytes for choice in chosen.values()),
        sum(choice.cost for choice in chosen.values()),
    )


def undecided(options: LoftQConfig) -> LoftQConfig:
    """``options``, if they leave bits to the budget. Raises ConfigError otherwise."""
    if options.bits_pattern:
        raise ConfigError(
            f"bits_pattern: expected none with a budget, which gives each layer one of "
            f"{', '.join(map(options.mixed_type, MIXED_TYPES))}, found {options.bits_pattern!r}; leave it out, or the "
            "budget"
        )
    return options


def _dense(request: Request) -> Request:
    if request.codec.name not in DENSE:
        raise TargetError(
            f"{request.path}: expected a weight in 16 or 32 bits to choose bits for, found one that is quantized "
            f"already ({request.codec.name}); load the model in 16 bits"
        )
    return request


def costs_of(request: Request, options: LoftQConfig, budget: Budget) -> list[Choice]:
    """One layer's choices, and what they take; errors are left 0. The weight may be on the meta device."""
    out_features, in_features = request.shape
    own = (request.rank,) if not budget.ranks else budget.ranks
    choices = []
    for bits in MIXED_TYPES:
        kind = options.mixed_type(bits)
        for rank in sorted({min(rank, out_features, in_features) for rank in own}):
            factors = 4 * rank * (out_features + in_features)
            nbytes = module_bytes((out_features, in_features), kind, options)
            if request.family == "embedding":  # simulated: stored as it was
                nbytes = request.codec.nbytes(request.base)
            choices.append(Choice(bits, rank, nbytes + factors, 0.0, factors))
    return choices


def gradients_told(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    paths: Iterable[str],
    options: LoftQConfig,
    budget: Budget,
    team: Team = ALONE,
) -> Mapping[str, float]:
    """``loss_weights`` of ``paths``, if the budget asks for them; none, with a warning, where none can be had."""
    if budget.rule != "milp":
        return {}
    try:
        return loss_weights(model, batches, paths, seed=options.seed, team=team)
    except RuntimeError as error:
        warnings.warn(
            f"budget: no gradient of the model's could be taken ({error}); errors of all layers count alike, as "
            "shares of their outputs",
            stacklevel=3,
        )
        return {}


def measured(
    weight: Tensor,
    request: Request,
    options: LoftQConfig,
    budget: Budget,
    seen: Seen | None,
    loss_weight: float | None = None,
) -> list[Choice]:
    """What one layer's choices cost and leave; each is started in one step, which orders them as more steps would,
    where
    what it leaves can't be foretold.

    Args:
        loss_weight: of ``inputs.gradients``.

    Raises:
        ConfigError: see ``factorize``; names the path.
    """
    # What earlier layers become isn't known yet; "cloq" is what sequential methods do without.
    method = "cloq" if needs_of(options.chosen_method).sequential else options.method
    once = replace(options, method=method, loftq_iter=1)
    if seen is not None and seen.factors is None:
        seen = replace(seen, factors=Factors())  # all choices are for the same inputs
    importance = None
    if seen is not None and loss_weight is not None:
        importance = loss_weight * output_norm(weight, seen.statistics.to(weight.device)) ** 2
    choices = []
    for choice in costs_of(request, options, budget):
        try:
            left = _left_by(once, weight, choice.rank, options.mixed_type(choice.bits), seen)
        except ConfigError as fault:
            raise ConfigError(f"{request.path}: {fault}") from fault
        choices.append(replace(choice, error=left**2, importance=importance))
    return choices


def _left_by(options: LoftQConfig, weight: Tensor, rank: int, kind: str, seen: Seen | None) -> float:
    """The relative error of a start's output, or without inputs of its weight."""
    foretold = None if seen is None else foretold_as(options, weight, rank, kind, seen=seen)
    if foretold is not None:
        return foretold
    result = factorize_as(options, weight, rank, kind, seen=seen)
    return result.error if result.output_error is None else result.output_error
