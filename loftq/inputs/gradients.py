"""How much a model makes of errors in its modules' outputs, by the gradients of what it foretells itself.

Let p be the model's distribution of what comes next, y drawn from it, and g the gradient of log p(y) by a module's
output. An error d of that output moves p to second order by KL = E[(g . d)^2] / 2, whatever lies between; and for
errors that look alike in every direction that is

    E||g||^2 / (2 out) * E||d||^2

So one number says what an error of a module's output costs, in nats a token. (The Fisher information, of which
Kronecker-factored approximations take E[g g^T] whole; here its trace is enough: what modules cost beside one another,
not directions within one.) Of a model that foretells nothing, a direction drawn at random takes the place of log p(y).

A thousand tokens give it within a tenth. A forward is computed again block by block on the way back, so that no more
than the activations of one block, and the inputs of the others, are held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_kit.distributed.team import ALONE, Team
from qlora_kit.merging.agreement import output_of, shown_in
from qlora_kit.naming import module_at

from .batches import evenly, in_parts
from .forwards import forward_exchanged_
from .moments import watchable
from .walk import stops_for

# So many of the text's tokens are looked at, of rows that lie evenly in it.
_TOKENS = 4096
# How many times the median of all tokens' squares one may count.
_MOST = 100.0
# Gradients are taken of so many times the logarithm: float16 holds few digits below 6e-5, and nothing above 65,504.
_SCALE = 64.0


def loss_weights(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    paths: Iterable[str],
    *,
    seed: int = 0,
    tokens: int = _TOKENS,
    team: Team = ALONE,
) -> dict[str, float]:
    """By path, E||g||^2 / (2 out): the nats a token that a mean squared error of 1 of that module's output costs.

    Args:
        model: called as ``model(**row)``, in evaluation mode meanwhile; its weights may be read as they are needed.
        batches: of which single rows are taken, up to about so many ``tokens``.
        seed: of what is drawn.
        team: shares the rows; each process has the model, and all get the same.

    Returns:
        0 of a path that no gradient came to; nothing of any where the model's output isn't finite.

    Raises:
        RuntimeError: no gradient can be taken, or none that is finite: what the model computes with isn't
            differentiable.
    """
    paths, rows = list(paths), evenly([row for batch in batches for row in in_parts(batch, 1)], tokens)
    found: dict[int, tuple[dict[str, float], int]] = {}
    with watchable(model), alone(model), recomputed(model, paths):
        for number in team.numbers(len(rows)):
            found[number] = _squares_of(model, rows[number], paths, seed + number)
    sums, counts = dict.fromkeys(paths, 0.0), 0
    # Who looks at inputs and weights says better where a value isn't finite.
    everyone = {number: part for gathered in team.gathered(found) for number, part in gathered.items()}
    for number in range(len(rows)):  # in one order, whoever they were computed by
        squares, count = everyone[number]
        if not count:
            return {}
        counts += count
        for path, square in squares.items():
            sums[path] += square
    if not all(map(math.isfinite, sums.values())):
        raise RuntimeError("values that aren't finite")
    return {path: square / (2 * counts) for path, square in sums.items()}


def _squares_of(
    model: nn.Module, row: Mapping[str, Any], paths: Sequence[str], seed: int
) -> tuple[dict[str, float], int]:
    """The sum of ||g||^2 / out over the tokens of ``row``, by path, and how many were foretold; 0 if the output isn't
    finite."""
    squares = dict.fromkeys(paths, 0.0)

    def add(gradient: Tensor, path: str) -> None:
        squares[path] += _bounded(gradient.double().square().mean(-1).reshape(-1))

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any, path: str) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        if not output.requires_grad:  # nothing before it is looked at
            output = output.detach().requires_grad_()
        output.register_hook(partial(add, path=path))
        return output

    with torch.enable_grad(), ExitStack() as stack:
        for path in paths:
            stack.callback(module_at(model, path).register_forward_hook(partial(watch, path=path)).remove)
        surprise, count = _surprise(model, row, seed)
        if not surprise.isfinite():
            return squares, 0
        (surprise * _SCALE).backward()
    return {path: square / _SCALE**2 for path, square in squares.items()}, count


def _bounded(squares: Tensor) -> float:
    """The sum of tokens' (n,) mean squares, none counted as more than ``_MOST`` times the median of those above 0.

    At a token whose embedding is 0, as that of padding is, the first norm's slope is a thousand times that of others,
    and a layer's more: the second order says nothing of real errors there, and would be all of the sum.
    """
    some = squares[squares != 0]
    return float(some.clamp_max(_MOST * some.median()).sum()) if len(some) else 0.0


def _surprise(model: nn.Module, row: Mapping[str, Any], seed: int) -> tuple[Tensor, int]:
    """The sum of -log p(y) of what is drawn from ``model``'s output for the tokens of ``row`` that aren't padding, and
    how many these are. The output itself times random numbers where it foretells nothing."""
    output, predicts = output_of(model, row)
    draw = torch.Generator(output.device).manual_seed(seed)
    rows = output[shown_in(row, output).to(output.device)]
    if not predicts:
        return (rows * torch.randn(rows.shape, generator=draw, device=rows.device).to(rows.dtype)).sum(), len(rows)
    chances = rows.detach().float().softmax(-1)
    drawn = torch.multinomial(chances.nan_to_num(1.0), 1, generator=draw)[:, 0]
    return F.cross_entropy(rows.float(), drawn, reduction="sum"), len(rows)


@contextmanager
def alone(model: nn.Module, parameters: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Inside the block ``parameters``, and nothing else of ``model``, get gradients; these lose what they had."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    own = set(parameters)
    try:
        for parameter in trained:
            parameter.requires_grad_(parameter in own)
        for parameter in own:
            parameter.grad = None
        yield
    finally:
        for parameter, was in trained.items():
            parameter.requires_grad_(was)


@contextmanager
def recomputed(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Inside the block, the blocks around ``paths`` keep their inputs alone and are computed again on the way back."""
    with ExitStack() as stack:
        for stop in stops_for(model, paths).keys() - set(paths):
            stack.callback(forward_exchanged_(module_at(model, stop), _again))
        yield


def _again(forward: Any) -> Any:
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
