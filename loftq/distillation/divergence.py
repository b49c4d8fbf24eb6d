"""KL(p || q) where of p the likeliest words are known, and of the others only how likely they are together.

With T the words that are known, p_r = 1 - sum_T p the rest and Z_r the sum of exp(z) over the words outside T,

    KL = sum_T p (log p - log q) + p_r (log p_r - log q_r),      d KL / d z = q - p in T,
                                                                 d KL / d z_j = q_j - p_r exp(z_j) / Z_r outside.

That is no more than the divergence over all words, and equal to it if q divides what is left among the others as p
does. Logits are taken a few rows at a time, fewer of more words, and what is kept for the way back is the gradient
alone, in their dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kit.merging.agreement import divergence_terms

# Of logits at a time: 128 MiB in float32, and three times that while they are worked on.
_NUMBERS = 1 << 25


class Likeliest(NamedTuple):
    """Of n tokens the k likeliest words: ``ids`` int32 and ``logs`` float32 log-probabilities, (n, k) each."""

    ids: Tensor
    logs: Tensor


@torch.no_grad()
def likeliest(logits: Tensor, count: int) -> Likeliest:
    """The ``count`` likeliest words of ``logits`` (n, words), or all if there are fewer; on the CPU."""
    parts = []
    for rows in logits.split(_rows_of(logits)):
        logs, ids = rows.float().log_softmax(-1).topk(min(count, logits.shape[-1]))
        parts.append(Likeliest(ids.int().cpu(), logs.cpu()))
    return Likeliest(*map(torch.cat, zip(*parts, strict=True)))


def divergence(logits: Tensor, known: Likeliest) -> Tensor:
    """The sum over tokens of KL(known || softmax(logits)), in nats.

    Args:
        logits: (n, words), floating; gradients flow to them, and can't be differentiated again.
        known: of the same tokens.

    Returns:
        A float32 number on the logits' device.
    """
    found: Tensor = _Divergence.apply(logits, known.ids, known.logs)
    return found


class _Divergence(torch.autograd.Function):
    """The sum of all rows' divergences; gradients are made in the forward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, logs: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        slope = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        rows = _rows_of(logits)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            known = ids[part].to(logits.device).long(), logs[part].to(logits.device)
            total += _of_rows(logits[part].float(), *known, None if slope is None else slope[part])
        ctx.save_for_backward(*([] if slope is None else [slope]))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return slope * above[0].to(slope.dtype), None, None


def _rows_of(logits: Tensor) -> int:
    """How many rows of ``logits`` (n, words) are taken at a time."""
    return max(1, _NUMBERS // logits.shape[-1])


def _of_rows(z: Tensor, ids: Tensor, logs: Tensor, slope: Tensor | None) -> Tensor:
    """The sum of the rows' divergences, float64; its gradient by ``z`` (n, words) is written into ``slope``."""
    whole = z.logsumexp(-1, keepdim=True)
    others = z.scatter(-1, ids, float("-inf"))
    left = others.logsumexp(-1, keepdim=True)
    rest = (-logs.double().logsumexp(-1, keepdim=True).expm1()).clamp_min(0).float()
    rest = rest.where(left.isfinite(), 0)  # of no others rounding may leave some
    parts = torch.cat([logs, rest.log()], -1), torch.cat([z.gather(-1, ids), left], -1) - whole
    if slope is not None:
        others.sub_(left.where(left.isfinite(), 0)).exp_().mul_(rest)
        slope.copy_((z - whole).exp_().sub_(others).scatter_add_(-1, ids, -logs.exp()))
    return divergence_terms(*parts).sum(dtype=torch.float64)
