"""Rounding with error feedback along a trellis: rotated rows, searched some columns at a time (LDLQ over blocks, as in
Tseng et al. 2024, QTIP, arXiv 2406.11235).

What ``rounding`` does column by column, with the nearest level each, is done here for pieces of columns with the best
path through each piece: the errors of the pieces before it are fed back into its goal, and those within it, and in the
columns that the search has in view beyond it, count as if inputs were independent and alike there. A smaller piece lets
more errors be made up for, and takes more searching: all columns of a piece and its view for those of the piece.

The inputs of rotated rows are rotated inputs, so the moments are rotated too. That evens their mean squares out, and
columns are taken as they are stored, since a trellis runs that way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kit.codecs.codebooks import codebook, scheme
from qlora_kit.codecs.quantized import Quantized, Quantizer, Scales
from qlora_kit.codecs.trellis.fit import off_zero, sizes
from qlora_kit.codecs.trellis.rotation import rotate
from qlora_kit.codecs.trellis.search import best_path, codes_of

from .metric import Metric

# Columns that are rounded at a time, and more that the search has in view; single values want no search.
_PIECE, _VIEW = 8, 16


@torch.no_grad()
def round_rotated(matrix: Tensor, quantizer: Quantizer, metric: Metric) -> Quantized:
    """Float32 ``matrix`` (out, in) in a rotated type, with codes that make up for one another under ``metric``, and
    each row's scale the best for its codes."""
    if metric.plain:
        return quantizer(matrix)
    kind = scheme(quantizer.quant_type)
    table = codebook(quantizer.quant_type, matrix.device)
    factor = metric.rotated_factor
    size = sizes(matrix)
    goal = rotate(matrix) / off_zero(size)[:, None]
    codes, read = _fed_back(goal.T.contiguous(), factor, table, kind.bits, kind.memory > kind.bits)
    weighed, read = goal @ factor, read.T @ factor
    scales = size * (weighed * read).sum(1) / off_zero(read.square().sum(1))
    stored = Scales.of(scales, quantizer.double_quant)
    return Quantized(quantizer.quant_type, codes.T.contiguous(), stored, None, matrix.shape[1], None, True)


def _fed_back(columns: Tensor, factor: Tensor, table: Tensor, bits: int, searched: bool) -> tuple[Tensor, Tensor]:
    """The uint8 codes and float32 values (in, out) for ``columns`` (in, out)."""
    unit = factor / factor.diagonal()
    piece, view = (_PIECE, _VIEW) if searched else (1, 0)
    rest = columns.clone()
    codes, read = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device), torch.empty_like(columns)
    state = None
    for begin in range(0, len(columns), piece):
        part = slice(begin, min(begin + piece, len(columns)))
        path = best_path(rest[begin : begin + piece + view], table, bits, state)[:piece]
        state = path[-1]
        codes[part], read[part] = codes_of(path, table, bits), table[path]
        if part.stop < len(columns):
            rest[part.stop :].addmm_(unit[part, part.stop :].T, columns[part] - read[part])
    return codes, read
