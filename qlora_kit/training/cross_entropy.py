"""Cross-entropy of a head's logits, a few rows at a time, so that logits of all tokens are never held.

With V words and N tokens the plain loss holds the logits in the head's dtype, in float32, their log-softmax and the
gradients of these: about 14 N V bytes in bfloat16, which for 2,048 tokens and 128k words is more than all else in a
step of LoRA. But the gradient of a row's loss needs that row alone,

    loss_i = logsumexp(z_i) - (1 - e) z_i[t_i] - e mean(z_i),      d loss_i / d z_i = softmax(z_i) - (1 - e) 1[t_i] -
    e/V

(t_i the target, e the label smoothing), so ``chunk`` rows are projected, scored and taken back through the head in the
forward already, and what is kept is the gradient of the rows of hidden states and of what is trained in the head. The
alternative, to recompute each chunk in the backward, projects everything twice, and draws dropout in the head anew.
The backward multiplies by one number. That number has the 1/N in it and a loss scaler's factor, so gradients that are
kept in half precision are of size one.

How the head stores its weight, and what is trained in it, is not asked: its own forward computes the logits of a chunk
and autograd takes their gradient back. Rows whose target is ignored are not computed at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError

_HALF = (torch.float16, torch.bfloat16)
#: Rows at a time: 64 MiB of float32 logits for 128k words. ``benchmarks/loss_memory.py`` has others.
CHUNK = 128


def chunked_cross_entropy(
    hidden: Tensor,
    head: nn.Module | Tensor,
    target: Tensor,
    *,
    chunk: int = CHUNK,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy(head(hidden), target)`` without logits of more than ``chunk`` rows at a time.

    In float64 and float32 it is the plain loss but for the order of sums: loss and gradients agree to 1e-12 and 1e-5 of
    their norms. In half precision the loss is computed in float32 from the same rounded logits (1e-5), and gradients,
    which are rounded once more than in the plain loss, agree to 1e-2 of their norms.

    Args:
        hidden: (..., H), floating.
        head: a module from (n, H) to (n, V), whatever it is made of, or a weight (V, H).
        target: (...) of whole numbers: which word comes at each place; no shift happens here.
        chunk: rows whose logits are held at a time, about 8 V bytes each.
        reduction: "mean" over the targets that count, or "sum".
        label_smoothing: as in ``F.cross_entropy``.

    Returns:
        A number in the dtype of the logits, float32 at least where they are of half precision. Its gradient can't be
        differentiated again.

    Raises:
        ConfigError: a ``chunk`` under one, another ``reduction``, shapes that don't fit.
    """
    check_chunk(chunk)
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"reduction: expected 'mean' or 'sum', found {reduction!r}; a loss a token needs all logits")
    if hidden.shape[:-1] != target.shape:
        raise ConfigError(
            f"target: expected the shape {tuple(hidden.shape[:-1])} of hidden without its last dimension, "
            f"found {tuple(target.shape)}; shift and cut both alike"
        )
    logits_of: Callable[[Tensor], Tensor] = head if isinstance(head, nn.Module) else partial(F.linear, weight=head)
    rows = torch.arange(target.numel(), device=hidden.device)
    scored = Scored(logits_of, rows, target.flatten(), chunk, ignore_index, label_smoothing)
    return scored.loss(hidden.flatten(0, -2), trained_in(head), reduction)


def check_chunk(chunk: Any) -> None:
    """Raises ConfigError unless ``chunk`` is a number of rows."""
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ConfigError(f"chunk: expected a number of rows, 1 or more, found {chunk!r}; leave it at {CHUNK}")


def trained_in(head: nn.Module | Tensor) -> list[Tensor]:
    """What of ``head`` gradients are wanted for."""
    held = head.parameters() if isinstance(head, nn.Module) else [head]
    return [tensor for tensor in held if tensor.requires_grad]


@dataclass(frozen=True)
class Scored:
    """Which rows of hidden states are scored against which targets (N,), and how their logits are computed.

    Attributes:
        logits_of: from rows (n, H) to logits (n, V).
        rows, target: (N,), of hidden states and of words.
    """

    logits_of: Callable[[Tensor], Tensor]
    rows: Tensor
    target: Tensor
    chunk: int
    ignore_index: int = -100
    smoothing: float = 0.0

    def loss(self, hidden: Tensor, trained: Sequence[Tensor], reduction: str) -> Tensor:
        """The loss of rows of ``hidden`` (M, H); gradients flow to it and to ``trained``."""
        target = self.target.to(hidden.device)
        counts = target != self.ignore_index
        job = Scored(self.logits_of, self.rows[counts], target[counts], self.chunk, smoothing=self.smoothing)
        total: Tensor = _Chunked.apply(job, hidden, *trained)
        return total / len(job.target) if reduction == "mean" else total

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and targets, a chunk at a time; without values two chunks show what all of them take."""
        parts = zip(self.rows.split(self.chunk), self.target.split(self.chunk), strict=True)
        return islice(parts, 2) if self.rows.is_meta else parts


class _Chunked(torch.autograd.Function):
    """The sum of all rows' losses; gradients are made in the forward."""

    @staticmethod
    def forward(ctx: Any, job: Scored, hidden: Tensor, *trained: Tensor) -> Tensor:
        asked = ctx.needs_input_grad[1:]
        of_rows = hidden.new_empty(len(job.rows), hidden.shape[1]) if asked[0] else None
        of_trained: list[Tensor | None] = [None] * len(trained)
        total: Tensor = hidden.new_zeros((), dtype=_wide(hidden.dtype))
        done = 0
        for rows, target in job.parts():
            part = hidden[rows].detach().requires_grad_(asked[0])
            with torch.set_grad_enabled(any(asked)):
                logits = job.logits_of(part)
            loss, slope = _loss_and_slope(logits.detach(), target, job.smoothing, logits.requires_grad)
            total = total + loss
            if slope is not None:
                wanted = [tensor for tensor, is_asked in zip((part, *trained), asked, strict=True) if is_asked]
                found = iter(torch.autograd.grad(logits, wanted, slope.to(logits.dtype), allow_unused=True))
                if of_rows is not None:
                    of_rows[done : done + len(rows)] = next(found)
                of_trained = [
                    _added(old, next(found)) if a else None for old, a in zip(of_trained, asked[1:], strict=True)
                ]
            del logits, slope
            done += len(rows)
        ctx.save_for_backward(job.rows, of_rows, *of_trained)
        ctx.shape, ctx.dtypes = hidden.shape, [tensor.dtype for tensor in trained]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (slope,), (rows, of_rows, *of_trained) = grad_outputs, ctx.saved_tensors
        of_hidden = None
        if of_rows is not None:
            scaled = (of_rows * slope).to(of_rows.dtype)
            of_hidden = of_rows.new_zeros(ctx.shape).index_add_(0, rows, scaled)
        scaled_trained = [
            None if one is None else (one * slope).to(dtype) for one, dtype in zip(of_trained, ctx.dtypes, strict=True)
        ]
        return None, of_hidden, *scaled_trained


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Sums over chunks are kept in float32 at least: a half's would lose what the later ones add."""
    if part is None or total is None:
        return total if part is None else part.to(_wide(part.dtype))
    return total.add_(part)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _loss_and_slope(logits: Tensor, target: Tensor, smoothing: float, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """The summed loss of ``logits`` (n, V), and its derivative by them if asked for; both float32 at least."""
    z = logits.to(_wide(logits.dtype), copy=with_slope)
    at, top = target[:, None], z.amax(-1, keepdim=True)
    hit = z.gather(-1, at) * (1 - smoothing)
    if smoothing:
        hit = hit + smoothing * z.mean(-1, keepdim=True)
    slope = z.sub_(top).exp_() if with_slope else z.sub(top).exp_()  # in place: it is the largest tensor here
    total = slope.sum(-1, keepdim=True)
    loss = (total.log() + top - hit).sum()
    if not with_slope:
        return loss, None
    slope.div_(total).scatter_add_(-1, at, slope.new_full((1, 1), smoothing - 1).expand_as(at))
    return loss, slope.sub_(smoothing / z.shape[-1]) if smoothing else slope
