"""Modules that stay dense in a model of few bits, why, and where their adapters start.

Few bits hold codes where the matrix was. A module whose weight the model reads past it, or whose weight's dtype it
computes in, can't have them (``qlora_kit.injection.read_past``), and what transformers keeps in float32 its loader for
bitsandbytes' models finds dense or not at all. Their adapters have nothing to make up for and start as plain ones do,
with B zero. A is drawn by the options' seed and the module's path, so that a run that goes on, in whatever order, and a
start in memory get the same.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import nn

from qlora_kit.config.loftq import DEFAULT_TYPES
from qlora_kit.config.lora import LoftQConfig
from qlora_kit.initializers import Request, Start
from qlora_kit.injection.read_past import ReadPast
from qlora_kit.naming import Tree
from qlora_kit.training.preparation.quantize import DENSE_LINEARS, in_bitsandbytes


@dataclass(frozen=True)
class KeptDense:
    """What is reported of such a module."""

    path: str
    reason: str


def kept_dense(model: nn.Module | Tree, options: LoftQConfig) -> dict[str, str]:
    """Paths of the modules in ``model`` that ``options`` don't quantize, wherever they are targeted, and why not.

    Embeddings are no concern: they stay dense always, with the values of few bits.
    """
    tree = Tree.of(model)
    return {**_in_float32(tree, options), **ReadPast(tree).dense()}


def plain_start(request: Request, options: LoftQConfig, reason: str) -> Start:
    """B zero and A uniform in +- 1 / sqrt(in), as torch draws a layer's weight; the base stays."""
    out_features, in_features = request.shape
    generator = torch.Generator().manual_seed(options.seed + zlib.crc32(request.path.encode()))
    A = torch.empty(request.rank, in_features).uniform_(-(in_features**-0.5), in_features**-0.5, generator=generator)
    return Start(A, torch.zeros(out_features, request.rank), report=KeptDense(request.path, reason))


def reason_of(request: Request, kept: dict[str, str]) -> str | None:
    """Why ``request``'s module stays dense; None if it doesn't, or is quantized already."""
    return kept.get(request.path) if request.codec.name in DENSE_LINEARS else None


def _in_float32(tree: Tree, options: LoftQConfig) -> dict[str, str]:
    """What transformers leaves dense in a bitsandbytes model whatever its config says: modules that it keeps in
    float32, T5's ``wo`` for one."""
    patterns = list(getattr(tree.model, "_keep_in_fp32_modules", None) or ())
    kind = options.quant_type or DEFAULT_TYPES[options.loftq_bits]
    if not patterns or options.bits_pattern or not in_bitsandbytes(kind, options.blocksize):
        return {}
    from transformers.quantizers.quantizers_utils import should_convert_module

    why = "transformers keeps it in float32"
    return {path: why for path in tree.modules if not should_convert_module(path, patterns)}
