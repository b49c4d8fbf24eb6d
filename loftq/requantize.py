"""What merging asks of LoftQ: roundings that look further than the nearest code, the branch for what they lose, and the
inputs to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.agreement import Batches
from qlora_kit.codecs.quantized import Quantizer
from qlora_kit.requantize import Rounded

from .calibration import batches_for
from .factorize import factorize
from .metric import Metric
from .rounding import round_by_search, round_with_feedback
from .statistics import collect_statistics

# Alternations of the residual branch, and how much of a text is read.
STEPS = 5
ROWS, WINDOW = 32, 256


@torch.no_grad()
def rounded(ideal: Tensor, quantizer: Quantizer, way: str, moments: Tensor | None, residual_rank: int) -> Rounded:
    """``qlora_kit.requantize.rounded`` where the nearest codes aren't all."""
    if not residual_rank:
        by = round_with_feedback if way == "error-feedback" else round_by_search
        return Rounded(by(ideal, quantizer, Metric.of(moments)))
    method = "loftq" if moments is None else "qera" if moments.dim() == 2 else "qera-diag"
    found = factorize(
        ideal,
        min(residual_rank, *ideal.shape),
        quant_type=quantizer.quant_type,
        blocksize=quantizer.blocksize,
        double_quant=quantizer.double_quant,
        steps=STEPS,
        method="cloq" if way == "error-feedback" else method,
        statistics=moments,
        scale_search=None if way == "nearest" else True,
    )
    return Rounded(found.quantized, (found.A, found.B))


def batches_of(text: Any, model: nn.Module) -> Batches:
    """``text`` ("builtin", a text file, token ids (rows, tokens), or batches) as what ``model`` is called with."""
    return batches_for(text, model, rows=ROWS, window=WINDOW)


def moments_on(text: Any, model: nn.Module, paths: list[str]) -> Mapping[str, Tensor]:
    """Second moments of the inputs of the modules at ``paths`` on ``text``, by path."""
    return collect_statistics(model, batches_of(text, model), paths)
