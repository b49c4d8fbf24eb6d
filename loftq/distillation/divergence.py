"""KL(p || q) where of p the likeliest words are known, and of the others only how likely they are together.

With T the words that are known, p_r = 1 - sum_T p the rest and Z_r the sum of exp(z) over the words outside T,

    KL = sum_T p (log p - log q) + p_r (log p_r - log q_r),      d KL / d z = q - p in T,
                                                                 d KL / d z_j = q_j - p_r exp(z_j) / Z_r outside.

That is no more than the divergence over all words, and equal to it if q divides what is left among the others as p
does. Logits are taken a few rows at a time, and what is kept for the way back is the gradient alone, in their dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rows of logits in float32 at a time: 128 MiB for 128k words.
_ROWS = 256


class Likeliest(NamedTuple):
    """Of n tokens the k likeliest words: ``ids`` int32 and ``logs`` float32 log-probabilities, (n, k) each."""

    ids: Tensor
    logs: Tensor


@torch.no_grad()
def likeliest(logits: Tensor, count: int) -> Likeliest:
    """The ``count`` likeliest words of ``logits`` (n, words), or all if there are fewer; on the CPU."""
    parts = []
    for rows in logits.split(_ROWS):
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
        for start in range(0, len(logits), _ROWS):
            part = slice(start, start + _ROWS)
            known = ids[part].to(logits.device).long(), logs[part].to(logits.device)
            lost, own = _of_rows(logits[part].float(), *known, slope is not None)
            total += lost
            if slope is not None and own is not None:
                slope[part] = own
        ctx.save_for_backward(*([] if slope is None else [slope]))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return slope * above[0].to(slope.dtype), None, None


def _of_rows(z: Tensor, ids: Tensor, logs: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of the rows' divergences, float64, and its gradient by ``z`` (n, words)."""
    whole = z.logsumexp(-1, keepdim=True)
    p, known = logs.exp(), z.gather(-1, ids)
    lost = (p * (logs - known + whole)).sum(-1, keepdim=True)
    others = z.scatter(-1, ids, float("-inf"))
    left = others.logsumexp(-1, keepdim=True)
    rest = (-logs.double().logsumexp(-1, keepdim=True).expm1()).clamp_min(0).float()
    some = left.isfinite()  # of no others rounding may leave some
    rest, left = rest.where(some, 0), left.where(some, 0)
    lost = lost + torch.special.xlogy(rest, rest) - rest * (left - whole)
    if not with_slope:
        return lost.sum(dtype=torch.float64), None
    slope = (z - whole).exp().sub_((others - left).exp_().mul_(rest))
    return lost.sum(dtype=torch.float64), slope.scatter_add_(-1, ids, -p)
