"""How far a merged model's output is from the adapted one's, on the same text.

The adapted model's logits go to the disk batch by batch before the merge; the merged model's are compared with them
after it, so the two models needn't be there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..checkpoints.spill import Spill
from ..codecs import protect_storage_
from ..errors import ConfigError, MergeError

# Rows of logits that are compared in float32 at a time.
_ROWS = 512
Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Agreement:
    """Of a merged model with the adapted one it was made from.

    Attributes:
        tokens: compared.
        error: ||merged - adapted|| / ||adapted|| of the logits, or of the last hidden states of a model without a
            head.
        kl: mean over tokens of KL(adapted || merged), in nats; None without logits, as for ``top1``.
        top1: share of tokens for which both prefer the same.
        loss_before, loss_after: mean next-token loss of either, for causal language models, else None.
    """

    tokens: int
    error: float
    kl: float | None = None
    top1: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None

    def __str__(self) -> str:
        parts = [f"on {self.tokens:,} tokens of text: relative error of the output {self.error:.2e}"]
        if self.kl is not None and self.top1 is not None:
            parts.append(f"KL {self.kl:.2e} nats, same first choice {self.top1:.1%}")
        if self.loss_before is not None and self.loss_after is not None:
            parts.append(f"loss {self.loss_before:.4f} adapted, {self.loss_after:.4f} merged")
        return ", ".join(parts)


@torch.no_grad()
def record(model: nn.Module, batches: Batches, spill: Spill) -> Callable[[nn.Module], Agreement]:
    """Keep ``model``'s output for ``batches``; a call that compares another model's with it."""
    with evaluating(model):
        kept = [spill.keep(output_of(model, batch)) for batch in batches]

    @torch.no_grad()
    def compare(merged: nn.Module) -> Agreement:
        sums: dict[str, float] = dict.fromkeys(("kl", "top1", "lost", "whole", "before", "after"), 0.0)
        tokens = predicted = 0
        with_logits = True
        with evaluating(merged):
            for batch, expected in zip(batches, kept, strict=True):
                (before, logits), (after, _) = expected(), output_of(merged, batch)
                mask = shown_in(batch, before)
                with_logits &= logits
                _add(sums, before[mask], after[mask], logits)
                tokens += int(mask.sum())
                if logits and (targets := _targets(merged, batch, before)) is not None:
                    predicted += int((targets >= 0).sum())
                    for name, out in (("before", before), ("after", after)):
                        sums[name] += _summed_loss(out, targets)
        return Agreement(
            tokens,
            (sums["lost"] / sums["whole"]) ** 0.5 if sums["whole"] else 0.0,
            sums["kl"] / max(tokens, 1) if with_logits else None,
            sums["top1"] / max(tokens, 1) if with_logits else None,
            sums["before"] / predicted if predicted else None,
            sums["after"] / predicted if predicted else None,
        )

    return compare


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Batches) -> float:
    """The mean next-token loss of a causal language model.

    Raises:
        MergeError: it isn't one.
    """
    total, predicted = 0.0, 0
    with evaluating(model):
        for batch in batches:
            out, logits = output_of(model, batch)
            targets = _targets(model, batch, out) if logits else None
            if targets is None:
                raise MergeError(
                    "base='auto': expected a causal language model, whose loss on a text can be measured, found "
                    f"{model.__class__.__name__}; choose base='dequantized' or base='original'"
                )
            total += _summed_loss(out, targets)
            predicted += int((targets >= 0).sum())
    return total / max(predicted, 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block ``model`` is in evaluation mode; afterwards each module is in the one that it was in.

    Its storage is protected, as adapters protect it: bitsandbytes' evaluation forwards would repack 4-bit weights.
    """
    protect_storage_(model)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def output_of(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """Logits, or the last hidden states, or else the first numbers that the model gives; and whether they are logits.

    Those of a single class foretell nothing, and aren't called so. A loss, which comes first where there are labels,
    has no rows and isn't looked at.

    Raises:
        ConfigError: the model gives nothing of the kind.
    """
    output = model(**batch)
    for name in ("logits", "last_hidden_state", None):
        value = output if name is None else _named(output, name)
        if (found := next((v for v in tree_leaves(value) if _has_rows(v)), None)) is not None:
            return found, name == "logits" and found.shape[-1] > 1
    raise ConfigError(
        f"{type(model).__name__}: expected an output with rows of numbers, found {type(output).__name__} without; "
        "have its forward return a tensor, or a dictionary with 'logits'"
    )


def _named(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def shown_in(batch: Mapping[str, Any], output: Tensor) -> Tensor:
    """Which positions of ``output`` (batch, tokens, ...) are no padding; all, where the mask is of another shape.

    What a decoder is given has a mask of its own; that of the text beside it says nothing of its output.
    """
    decodes = any(key.startswith("decoder_input") for key in batch)
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    if mask is not None and mask.shape == output.shape[:-1]:
        return mask.bool()
    return torch.ones(output.shape[:-1], dtype=torch.bool, device=output.device)


def _targets(model: nn.Module, batch: Mapping[str, Any], logits: Tensor) -> Tensor | None:
    """What each position is to predict, -100 where nothing; None if the model doesn't predict the next token."""
    ids = batch.get("input_ids")
    kind = model.__class__.__name__  # a LoraModel's is that of the model inside
    causal = "ForCausalLM" in kind or "LMHeadModel" in kind
    if not causal or ids is None or logits.shape[:-1] != ids.shape:
        return None
    shown = shown_in(batch, logits)
    targets = torch.where(shown, ids, -100)
    return F.pad(targets[:, 1:], (0, 1), value=-100)


def _add(sums: dict[str, float], before: Tensor, after: Tensor, logits: bool) -> None:
    """Take in rows (n, width) of both outputs."""
    for one, other in zip(before.split(_ROWS), after.split(_ROWS), strict=True):
        x, y = one.float(), other.to(one.device).float()
        sums["lost"] += float((y - x).square().sum(dtype=torch.float64))
        sums["whole"] += float(x.square().sum(dtype=torch.float64))
        if logits:
            sums["kl"] += float(divergence_terms(x.log_softmax(-1), y.log_softmax(-1)).sum(dtype=torch.float64))
            sums["top1"] += float((x.argmax(-1) == y.argmax(-1)).sum())


def divergence_terms(p: Tensor, q: Tensor) -> Tensor:
    """Terms that sum to KL(p || q) of log-probabilities: p (q/p - 1 - log(q/p)), none of which is negative.

    The plain p log(p/q) loses a small sum to rounding, for they cancel.
    """
    ratio = torch.where(p == q, 0.0, q - p)
    share = p.exp()
    far = q.exp() - share - torch.where(share == 0, 0.0, share * ratio)
    return torch.where(ratio.abs() < 1, share * (ratio.expm1() - ratio), far)


def _summed_loss(logits: Tensor, targets: Tensor) -> float:
    pairs: Iterable[tuple[Tensor, Tensor]] = zip(
        logits.flatten(0, -2).split(_ROWS), targets.flatten().split(_ROWS), strict=True
    )
    return sum(float(F.cross_entropy(x.float(), t.to(x.device), reduction="sum", ignore_index=-100)) for x, t in pairs)
