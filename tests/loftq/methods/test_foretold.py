"""What error feedback leaves, foretold: against what it then leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loftq import factorize
from loftq.methods.factors import Factors
from loftq.methods.foretold import foretold_error
from loftq.methods.quantizers import quantizer_for
from loftq.methods.registry import Problem, some_rows

OUT, IN = 160, 128


def weight(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(OUT, IN, generator=draw) * torch.rand(IN, generator=draw) * 0.05


def moments(seed: int, spread: float) -> Tensor:
    """Of inputs that are correlated, with a few directions that matter more, ``spread`` decades of them."""
    draw = torch.Generator().manual_seed(20 + seed)
    mixing = torch.linalg.qr(torch.randn(IN, IN, generator=draw))[0]
    rows = torch.randn(2000, IN, generator=draw) * torch.logspace(spread, 0, IN) @ mixing
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["signed2", "lloyd3", "nf4", "uniform8", "trellis2", "trellis3", "rotated4"])
def test_it_comes_close_to_what_is_left(kind: str, spread: float) -> None:
    for seed in range(2):
        W, R = weight(seed), moments(seed, spread)
        problem = Problem(W, 8, 1.0, quantizer_for(quant_type=kind), 1, R, factors=Factors())
        found = factorize(W, 8, quant_type=kind, steps=1, statistics=R, method="cloq", adapter_aware=True)
        assert foretold_error(problem) == pytest.approx(found.output_error, rel=0.3), seed


def test_more_bits_and_ranks_leave_less() -> None:
    problem = Problem(weight(0), 8, 1.0, quantizer_for(quant_type="signed2"), 1, moments(0, 1.0))
    kinds = [foretold_error(replace(problem, quantize=quantizer_for(quant_type=k))) for k in ("signed2", "lloyd3")]
    ranks = [foretold_error(replace(problem, rank=rank)) for rank in (2, 8, 32)]
    assert kinds[0] > kinds[1]  # type: ignore[operator]
    assert ranks[0] > ranks[1] > ranks[2]  # type: ignore[operator]


def test_rows_of_heads_tell_of_all() -> None:
    """The first rows of every head are a tenth of others, as positional rotations leave them; heads of 32 rows, as
    many rows apart as rows are taken."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.linspace(0.1, 1.9, 32).repeat(64)
    W, R = torch.randn(2048, 32, generator=draw) * sizes[:, None], moments(0, 1.0)[:32, :32]
    problem = Problem(W, 4, 1.0, quantizer_for(quant_type="signed2"), 1, R)
    shuffled = W[torch.randperm(2048, generator=draw)]
    assert foretold_error(problem) == pytest.approx(foretold_error(replace(problem, weight=shuffled)), rel=0.1)
    assert [len(some_rows(torch.zeros(count, 1))) for count in (63, 127, 128, 191, 192, 4096)] == [
        63,
        127,
        128,
        191,
        64,
        66,
    ]


def test_where_nothing_can_be_said() -> None:
    R = moments(0, 1.0)
    problem = Problem(weight(0), 8, 1.0, quantizer_for(quant_type="nf4"), 1, R)
    assert foretold_error(replace(problem, statistics=None)) is None
    assert foretold_error(replace(problem, statistics=R.diagonal())) is None
    assert foretold_error(replace(problem, statistics=torch.zeros(IN, IN))) is None
    assert foretold_error(replace(problem, weight=torch.zeros(OUT, IN))) is None
    assert foretold_error(replace(problem, rank=65)) is None
    assert foretold_error(replace(problem, scale_search=False)) is not None
