"""The product and the best rank-r pair, against Jacobi rotations in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import descent
from reference.lowrank import best_approximation, jacobi_svd

from qlora_kit.errors import ConfigError
from qlora_kit.lowrank import delta, factor_pair, share_arrived, truncated_svd

# float32 arithmetic on matrices of norm about 30: a few hundred roundings of 6e-8 relative each.
FLOAT32 = 2e-5


def flat(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A matrix with the nearly flat spectrum of a quantization residual."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rebuilt(triplets: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    U, S, Vh = triplets
    return (U * S) @ Vh


@pytest.mark.parametrize("solver", ["auto", "full", "gram"])
@pytest.mark.parametrize("shape", [(12, 12), (17, 9), (9, 17), (24, 31)])
@pytest.mark.slow
def test_is_the_best_approximation(shape: tuple[int, int], solver: str) -> None:
    matrix = flat(shape)
    for rank in (1, 4, min(shape)):
        expected = best_approximation(matrix.numpy(), rank)
        found = rebuilt(truncated_svd(matrix, rank, solver=solver)).numpy()
        np.testing.assert_allclose(found, expected, atol=FLOAT32)


@pytest.mark.parametrize("shape", [(160, 200), (200, 160)])
def test_gram_captures_all_that_full_does(shape: tuple[int, int]) -> None:
    matrix = flat(shape)
    U, S, Vh = truncated_svd(matrix, 16, solver="gram")
    exact = torch.linalg.svdvals(matrix.double())[:16]
    torch.testing.assert_close(S.double(), exact, rtol=1e-6, atol=0)
    eye = torch.eye(16)
    # Orthonormality of 16 vectors rounded to float32.
    torch.testing.assert_close(U.T @ U, eye, rtol=0, atol=2e-6)
    torch.testing.assert_close(Vh @ Vh.T, eye, rtol=0, atol=2e-6)
    assert U.dtype == S.dtype == Vh.dtype == torch.float32


@pytest.mark.parametrize("decay", [1.0, 1e-2, 1e-6, 0.0])
def test_gram_is_right_on_decaying_and_deficient_spectra(decay: float) -> None:
    """Where squaring would lose the small values, the full SVD takes over."""
    left, _ = torch.linalg.qr(flat((150, 8), 1).double())
    right, _ = torch.linalg.qr(flat((140, 8), 2).double())
    S = torch.tensor([decay ** (i / 7) if decay else float(i < 3) for i in range(8)], dtype=torch.float64)
    matrix = ((left * S) @ right.T).float()
    U, found, Vh = truncated_svd(matrix, 8, solver="gram")
    # float32 can't hold more of the small values than its rounding of the largest.
    torch.testing.assert_close(found.double(), S, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close((U * found) @ Vh, matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(U.T @ U, torch.eye(8), rtol=0, atol=5e-6)


def test_float64_stays_float64() -> None:
    matrix = flat((20, 14)).double()
    U, S, Vh = truncated_svd(matrix, 5, solver="gram")
    assert S.dtype == torch.float64
    np.testing.assert_allclose(S.numpy(), jacobi_svd(matrix.numpy())[1][:5], rtol=1e-12)
    np.testing.assert_allclose(rebuilt((U, S, Vh)).numpy(), best_approximation(matrix.numpy(), 5), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    matrix = flat((15, 11)).to(dtype)
    U, S, Vh = truncated_svd(matrix, 11)
    assert S.dtype == torch.float32
    torch.testing.assert_close((U * S) @ Vh, matrix.float(), rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0, 16 / 8**0.5])
def test_factor_pair_counts_the_scaling_and_is_balanced(scaling: float) -> None:
    U, S, Vh = truncated_svd(flat((13, 19)), 6)
    A, B = factor_pair(U, S, Vh, scaling)
    assert A.shape == (6, 19)
    assert B.shape == (13, 6)
    torch.testing.assert_close(scaling * B @ A, (U * S) @ Vh, rtol=0, atol=FLOAT32)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
    torch.testing.assert_close(A.norm(dim=1), (S / scaling).sqrt())


def test_delta_is_float32_also_under_autocast() -> None:
    A, B = flat((3, 7), 1), flat((5, 3), 2)
    expected = 0.5 * B.double() @ A.double()
    with torch.autocast("cpu", torch.bfloat16):
        found = delta(A, B, 0.5)
    assert found.dtype == torch.float32
    # bfloat16 products would be off by 1e-2.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    half = delta(A.bfloat16(), B.bfloat16(), 0.5)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, delta(A.bfloat16().float(), B.bfloat16().float(), 0.5), rtol=0, atol=0)


def test_delta_carries_gradients_and_works_on_meta() -> None:
    A, B = flat((3, 7)).requires_grad_(), flat((5, 3)).requires_grad_()
    delta(A, B, 2.0).sum().backward()
    torch.testing.assert_close(A.grad, 2.0 * B.detach().sum(0)[:, None].expand(3, 7))
    assert delta(A.detach().to("meta"), B.detach().to("meta"), 2.0).shape == (5, 7)


@pytest.mark.parametrize(
    ("matrix", "rank", "options", "message"),
    [
        (torch.zeros(3), 1, {}, r"matrix: expected a 2-D .* \(out, in\), found torch.float32 with shape \(3,\)"),
        (torch.zeros(3, 4, dtype=torch.int8), 1, {}, r"matrix: .* found torch.int8"),
        (torch.zeros(3, 4), 0, {}, r"rank: expected an integer between 1 and 3 .* found 0; lower r"),
        (torch.zeros(3, 4), 4, {}, r"rank: .* found 4"),
        (torch.zeros(3, 4), True, {}, r"rank: .* found True"),
        (torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]]), 1, {}, r"found 2 NaN or infinite of 4"),
        (
            torch.zeros(3, 4),
            1,
            {"solver": "magic"},
            r"solver: expected one of auto, full, .* found 'magic'",
        ),
    ],
)
def test_bad_input_is_named(matrix: torch.Tensor, rank: int, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        truncated_svd(matrix, rank, **options)


def test_bad_factors_and_scaling_are_named() -> None:
    with pytest.raises(ConfigError, match=r"A and B: .* found \(3, 7\) and \(5, 4\)"):
        delta(torch.zeros(3, 7), torch.zeros(5, 4), 1.0)
    for scaling in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="scaling: expected a positive finite number, found"):
            factor_pair(torch.eye(2), torch.ones(2), torch.eye(2), scaling)


@pytest.mark.parametrize("moments", ["plain", "full", "diagonal"])
@pytest.mark.parametrize("noise", [0.0, 0.1, 3.0])
def test_the_share_that_arrives_is_the_projection_on_the_delta(moments: str, noise: float) -> None:
    A, B = flat((3, 11)), flat((7, 3), seed=1)
    rows = flat((40, 11), seed=2) * torch.arange(1, 12)
    R = {"plain": torch.eye(11), "full": rows.T @ rows / 40, "diagonal": rows.square().mean(0).diag()}[moments]
    change = 0.3 * B @ A + noise * flat((7, 11), seed=3)
    expected = descent.share(*(matrix.double().numpy() for matrix in (change, B @ A, R)))
    found = share_arrived((B @ A - change) @ R @ A.T, B, A @ R @ A.T)
    assert found == pytest.approx(expected, rel=FLOAT32, abs=FLOAT32)


def test_a_delta_without_effect_has_arrived() -> None:
    assert share_arrived(torch.zeros(7, 3), torch.ones(7, 3), torch.zeros(3, 3)) == 1
    assert share_arrived(torch.zeros(7, 3), torch.zeros(7, 3), torch.eye(3)) == 1
