"""What merging asks of LoftQ: roundings that look further than the nearest code, the branch for what they lose, and the
inputs to look at. ``qlora_kit.merging.requantize`` imports this module when it is asked for one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.codecs.codebooks import is_rotated
from qlora_kit.codecs.quantized import Quantized, Quantizer
from qlora_kit.lowrank import add_product_, norm, share_arrived
from qlora_kit.lowrank.algebra import Branch, Recipe, combine
from qlora_kit.merging.agreement import Batches
from qlora_kit.merging.requantize import Grid, Rounded

from .inputs.moments import collect_statistics
from .inputs.text import batches_for
from .methods.descent import round_from_codes
from .methods.factorization import factorize
from .methods.metric import Metric
from .methods.rounding import round_by_search, round_with_feedback

# Alternations of the residual branch, and how much of a text is read.
STEPS = 5
ROWS, WINDOW = 64, 256
# A branch for the delta alone that leaves less of it than this, relative to it, leaves rounding errors.
_NOTHING = 1e-6
# Where rounding anew brings this share of the delta, or as little too much, there is no bias to speak of, and it leaves
# less noise.
_ENOUGH = 0.95


@torch.no_grad()
def round_merged(
    ideal: Tensor, quantizer: Quantizer, way: str, moments: Tensor | None, residual_rank: int, grid: Grid | None
) -> Rounded:
    """What ``qlora_kit.merging.requantize.rounded`` gives where the nearest codes aren't all that is asked for.

    Rounding anew costs a small delta on the grid twice: nearly all of it is lost, and each block's scale moves by as
    much as its largest value does, and every value of the block with it. So there the codes that are stored are tried
    as well, some of them changed (``descent``), or with the best branch for the delta alone. By error feedback they are
    taken unless the delta arrives anew too: what is missing of it is missing in every layer in the same direction,
    while errors that have nothing to do with it, of which changed codes leave more, average out. Otherwise what leaves
    less error is taken.
    """
    metric = Metric.of(moments)
    if residual_rank:
        rank = min(residual_rank, *ideal.shape)
        kept, all_of_it = (None, False) if grid is None else _beside(grid, way, moments, metric, rank)
        if kept is not None and all_of_it:
            return kept
        anew = _with_branch(ideal, quantizer, way, moments, rank)
    elif way == "scale-search":
        return Rounded(round_by_search(ideal, quantizer, metric))
    else:
        if grid is not None and not (grid.A.any() and grid.B.any()):
            return Rounded(grid.stored)
        changed = None if grid is None else _changed(grid.stored, grid.A, grid.B, moments)
        kept = None if changed is None else Rounded(changed)
        anew = Rounded(round_with_feedback(ideal, quantizer, metric))
    if kept is None or grid is None:
        return anew
    if way == "error-feedback":
        return anew if abs(_arrived(anew, ideal, grid, metric) - 1) <= 1 - _ENOUGH else kept
    left = [norm(metric.weigh(_read(found).sub_(ideal))) for found in (anew, kept)]
    return anew if left[0] < left[1] else kept


def _read(found: Rounded) -> Tensor:
    """float32 (out, in), branch included."""
    weight = found.quantized.dequantize()
    return weight if found.residual is None else add_product_(weight, *found.residual)


def _arrived(found: Rounded, ideal: Tensor, grid: Grid, metric: Metric) -> float:
    """The share of the delta that is in ``found``, see ``share_arrived``.

    By ``metric``, as codes are chosen by it: its damping counts inputs that the text never showed. A delta on these
    alone would have no effect by the plain moments, all of which arrives whatever becomes of it.
    """
    features = metric.weigh(grid.A)
    missing = metric.weigh(_read(found).sub_(ideal).neg_())
    return share_arrived(missing @ features.T, grid.B, features @ features.T)


def _beside(grid: Grid, way: str, moments: Tensor | None, metric: Metric, rank: int) -> tuple[Rounded, bool]:
    """The stored weight with the best branch for the delta beside it, and whether that leaves nothing of the delta;
    with error feedback, codes are changed for what the branch leaves."""
    best = combine([Branch(metric.weigh(grid.A), grid.B)], [1.0], Recipe("svd", rank=rank))
    branch = metric.unweigh(best.A), best.B
    if best.error < _NOTHING or way != "error-feedback":
        return Rounded(grid.stored, branch), best.error < _NOTHING
    left = torch.cat([grid.A, -branch[0]]), torch.cat([grid.B, branch[1]], dim=1)
    return Rounded(_changed(grid.stored, *left, moments) or grid.stored, branch), False


def _changed(stored: Quantized, A: Tensor, B: Tensor, moments: Tensor | None) -> Quantized | None:
    """The stored codes, some of them changed, so that B @ A arrives; None where they have no table to choose from, each
    by itself, or none that brings it."""
    if stored.blocksize is None or is_rotated(stored.quant_type) or moments is None:
        return None
    found = round_from_codes(stored, A, B, moments)
    return None if found is stored else found


def _with_branch(ideal: Tensor, quantizer: Quantizer, way: str, moments: Tensor | None, rank: int) -> Rounded:
    """The weight quantized anew together with a branch, as LoftQ starts an adapter, by the method fit for ``way``."""
    method = "loftq" if moments is None else "qera" if moments.dim() == 2 else "qera-diag"
    found = factorize(
        ideal,
        rank,
        quant_type=quantizer.quant_type,
        blocksize=quantizer.blocksize,
        double_quant=quantizer.double_quant,
        steps=STEPS,
        method="cloq" if way == "error-feedback" else method,
        statistics=moments,
        scale_search=None if way == "nearest" else True,
    )
    return Rounded(found.quantized, (found.A, found.B))


def text_batches(text: Any, model: nn.Module) -> Batches:
    """``text`` ("builtin", a text file, token ids (rows, tokens), or batches) as what ``model`` is called with."""
    return batches_for(text, model, rows=ROWS, window=WINDOW)


def text_moments(text: Any, model: nn.Module, paths: list[str]) -> Mapping[str, Tensor]:
    """Second moments of the inputs of the modules at ``paths`` on ``text``, by path."""
    return collect_statistics(model, text_batches(text, model), paths)
