"""Rounding that leans on the adapter: what is left once the best B has taken back what it can, and what that gains."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from reference.starts import damped, taken_back, weighted_error
from torch import Tensor

from loftq import LoftQResult, factorize
from loftq.methods.leaning import left_over
from loftq.methods.rounding import round_with_feedback
from qlora_kit.errors import ConfigError

OUT, IN = 48, 32


def weight(seed: int = 0) -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) * 0.05


def moments(seed: int = 0, count: int = 400) -> Tensor:
    draw = torch.Generator().manual_seed(20 + seed)
    mixing = torch.randn(IN, IN, generator=draw) * torch.logspace(-1, 1, IN)
    rows = torch.randn(count, IN, generator=draw) @ mixing
    return rows.T @ rows / count


def leading(R: np.ndarray, rank: int) -> np.ndarray:
    """R's ``rank`` leading eigenvectors as rows."""
    return np.linalg.eigh(R)[1][:, -rank:].T


@pytest.mark.parametrize("rank", [1, 5, 31])
def test_what_is_left_over_is_what_no_b_takes_back(rank: int) -> None:
    R, draw = moments().double().numpy(), np.random.default_rng(0)
    unit = 0.01 * np.trace(R) / IN
    A = leading(R, rank)
    found = left_over(moments(), rank, 0.01).numpy() - unit * np.eye(IN)
    for _ in range(5):
        error = draw.standard_normal((OUT, IN))
        least = weighted_error(taken_back(error, R, A), R)
        assert weighted_error(error, found) == pytest.approx(least, rel=1e-4, abs=1e-6 * weighted_error(error, R))
        for size in (1e-3, 1e-1):  # no B about the best does better
            B = (error - taken_back(error, R, A)) @ A.T
            worse = error - (B + size * draw.standard_normal(B.shape)) @ A
            assert weighted_error(worse, R) > least


@pytest.mark.parametrize("rank", [1, 5, 32])
@pytest.mark.parametrize("solver", ["auto", "krylov"])
def test_the_largest_eigenvalues_become_the_damping(rank: int, solver: str) -> None:
    R = moments().double().numpy()
    unit = np.trace(R) / IN
    values = np.linalg.eigvalsh(R)
    expected = np.sort(np.concatenate([values[: IN - rank] + 0.1 * unit, np.full(rank, 0.1 * unit)]))
    found = np.linalg.eigvalsh(left_over(moments(), rank, 0.1, solver=solver).numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-4 if solver == "auto" else 0.05)
    assert not left_over(torch.zeros(IN, IN), rank, 0.1).any()


def errors(result: LoftQResult, full: Tensor, R: Tensor) -> tuple[float, float]:
    """Of Q + BA and of Q alone, damped, relative and squared."""
    stored = result.quantized.dequantize().double().numpy()
    W, M = full.double().numpy(), damped(R.double().numpy())
    both = stored + result.B.double().numpy() @ result.A.double().numpy()
    size = weighted_error(W, M)
    return weighted_error(W - both, M) / size, weighted_error(W - stored, M) / size


@pytest.mark.parametrize("bits", [2, 3])
def test_it_leaves_less_with_the_adapter_and_more_without(bits: int) -> None:
    gains = []
    for seed in range(5):
        full, R = weight(seed), moments(seed)
        given = {"bits": bits, "steps": 1, "method": "cloq", "statistics": R}
        plain, leaning = (factorize(full, 4, adapter_aware=aware, **given) for aware in (False, True))
        (before, alone), (after, without) = errors(plain, full, R), errors(leaning, full, R)
        gains.append(after / before)
        assert without > alone
    assert max(gains) < 1
    assert np.mean(gains) < 0.95


@pytest.mark.parametrize("aware", [True, False])
def test_a_step_rounds_once(aware: bool) -> None:
    with patch("loftq.methods.error_feedback.round_with_feedback", wraps=round_with_feedback) as rounded:
        factorize(weight(), 4, bits=2, steps=1, method="cloq", statistics=moments(), adapter_aware=aware)
    assert rounded.call_count == 1


@pytest.mark.parametrize("method", ["cloq", "aligned"])
def test_each_method_s_own_choice_is_one_of_the_two(method: str) -> None:
    given = {"bits": 2, "statistics": moments(), "method": method, "steps": 1}
    found = {aware: factorize(weight(), 4, adapter_aware=aware, **given) for aware in (True, False, None)}
    own = method == "aligned"
    assert torch.equal(found[None].quantized.codes, found[own].quantized.codes)
    assert not torch.equal(found[True].quantized.codes, found[False].quantized.codes)


def test_a_switch_that_is_none_is_refused() -> None:
    from qlora_kit import LoftQConfig

    with pytest.raises(ConfigError, match=r"adapter_aware.*'yes'"):
        LoftQConfig(adapter_aware="yes")
