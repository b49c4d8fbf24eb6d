"""The approximate solvers: how much of the best approximation's energy their few products with the matrix hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_kit.codecs.quantized import quantize_matrix
from qlora_kit.errors import ConfigError
from qlora_kit.lowrank import pick_solver, truncated_svd
from qlora_kit.lowrank.decomposition import COLD_DEPTH

RANK = 16
BLOCKS = ["krylov", "subspace"]
Triplets = tuple[Tensor, Tensor, Tensor]


def normal(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def residual(shape: tuple[int, int] = (384, 512), noise: float = 0.0) -> Tensor:
    """What 4 bits leave of a normal weight: the flattest spectrum that the solvers meet."""
    weight = normal(shape) + noise * normal(shape, 1)
    return weight - quantize_matrix(weight, "nf4").dequantize()


def decaying(shape: tuple[int, int], values: Tensor) -> Tensor:
    left, _ = torch.linalg.qr(normal((shape[0], len(values)), 1).double())
    right, _ = torch.linalg.qr(normal((shape[1], len(values)), 2).double())
    return ((left * values) @ right.T).float()


def captured(matrix: Tensor, U: Tensor) -> float:
    """The energy of the matrix in the span of U's columns, over the most that as many columns can hold."""
    full = matrix.double()
    held = (torch.linalg.qr(U.double()).Q.T @ full).square().sum()
    return float(held / torch.linalg.svdvals(full)[: U.shape[1]].square().sum())


def check_triplets(matrix: Tensor, rank: int, triplets: Triplets) -> None:
    U, S, Vh = triplets
    assert (U.shape, S.shape, Vh.shape) == ((matrix.shape[0], rank), (rank,), (rank, matrix.shape[1]))
    assert all(part.isfinite().all() for part in triplets)
    assert (S >= 0).all()
    assert (S.diff() <= 0).all()
    # Sums of some hundred float32 products, and an eigenbasis rounded to float32.
    tight = 1e-12 if S.dtype == torch.float64 else 2e-5
    eye = torch.eye(rank, dtype=S.dtype)
    torch.testing.assert_close(U.T @ U, eye, rtol=0, atol=tight)
    torch.testing.assert_close(Vh @ Vh.T, eye, rtol=0, atol=tight)


@pytest.mark.parametrize("solver", BLOCKS)
@pytest.mark.parametrize("shape", [(384, 512), (512, 384), (40, 300), (300, 40), (64, 64)])
def test_gives_orthonormal_triplets_in_order(shape: tuple[int, int], solver: str) -> None:
    matrix = residual(shape)
    for rank in (1, 8, 16):
        check_triplets(matrix, rank, truncated_svd(matrix, rank, solver=solver))


@pytest.mark.parametrize("solver", BLOCKS)
@pytest.mark.parametrize("shape", [(384, 512), (300, 40)])
def test_is_the_matrix_projected_onto_the_span(shape: tuple[int, int], solver: str) -> None:
    """Nothing is added to the matrix: however few products found U, the rest is its exact projection."""
    matrix = residual(shape)
    for depth in (1, 2, 4):
        U, S, Vh = truncated_svd(matrix, 8, solver=solver, depth=depth)
        projected = U.double() @ (U.double().T @ matrix.double())
        # Entries up to 0.1, a float32 rounding in each of a few hundred products.
        torch.testing.assert_close(((U * S) @ Vh).double(), projected, rtol=0, atol=1e-6)


def test_few_blocks_hold_most_of_a_flat_spectrum_s_energy() -> None:
    matrix = residual()
    share = {
        depth: captured(matrix, truncated_svd(matrix, RANK, solver="krylov", depth=depth)[0]) for depth in (4, 6, 8)
    }
    assert share[4] < share[6] < share[8] <= 1 + 1e-9
    assert share[6] >= 0.97
    assert COLD_DEPTH == 6
    default = truncated_svd(matrix, RANK, solver="krylov")[0]
    assert captured(matrix, default) == pytest.approx(share[6], rel=1e-9)


@pytest.mark.parametrize("depth", [2, 4, 6, 8])
def test_keeping_all_blocks_holds_more_than_keeping_the_last(depth: int) -> None:
    matrix = residual()
    shares = [captured(matrix, truncated_svd(matrix, RANK, solver=solver, depth=depth)[0]) for solver in BLOCKS]
    assert shares[0] > shares[1]


@pytest.mark.parametrize("solver", BLOCKS)
@pytest.mark.parametrize("depth", [None, 1, 2, 4])
@pytest.mark.slow
def test_a_start_from_a_similar_matrix_beats_a_random_one(solver: str, depth: int | None) -> None:
    matrix = residual()
    near = matrix + 0.1 * matrix.std() * normal((384, 512), 3)
    start = truncated_svd(near, RANK, solver="full")[0]
    warm = truncated_svd(matrix, RANK, solver=solver, start=start, depth=depth)
    cold = truncated_svd(matrix, RANK, solver=solver, depth=depth or 2)
    check_triplets(matrix, RANK, warm)
    assert captured(matrix, warm[0]) > captured(matrix, cold[0])
    assert torch.equal(start, truncated_svd(near, RANK, solver="full")[0]), "the start isn't written to"


@pytest.mark.parametrize("solver", BLOCKS)
@pytest.mark.parametrize("columns", [4, RANK, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_a_start_may_have_any_number_of_columns(solver: str, columns: int, dtype: torch.dtype) -> None:
    matrix = residual()
    start = truncated_svd(matrix, columns, solver="full")[0].to(dtype)
    check_triplets(matrix, RANK, truncated_svd(matrix, RANK, solver=solver, start=start, depth=4))


@pytest.mark.parametrize("solver", ["full", "gram"])
def test_exact_solvers_don_t_look_at_the_start(solver: str) -> None:
    matrix = residual((130, 140))
    plain = truncated_svd(matrix, 4, solver=solver)
    started = truncated_svd(matrix, 4, solver=solver, start=normal((130, 4)), depth=1, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(plain, started, strict=True))


@pytest.mark.parametrize("solver", BLOCKS)
@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
def test_a_decaying_spectrum_is_nearly_exact(shape: tuple[int, int], solver: str) -> None:
    values = 0.8 ** torch.arange(60, dtype=torch.float64)
    matrix = decaying(shape, values)
    krylov = solver == "krylov"
    U, S, Vh = truncated_svd(matrix, RANK, solver=solver, depth=6 if krylov else 12)
    # Without the earlier blocks the last wanted value has an error of some 0.8^(4 * 12 - 2) = 3e-5, with them less
    # than float32's rounding of the products.
    torch.testing.assert_close(S.double(), values[:RANK], rtol=1e-5 if krylov else 1e-3, atol=1e-6)
    best = float(values[RANK:].norm())
    assert float((matrix - (U * S) @ Vh).double().norm()) <= best * (1 + 1e-3)


@pytest.mark.parametrize("solver", BLOCKS)
@pytest.mark.parametrize("own", [1, 5, 12])
@pytest.mark.parametrize("shape", [(150, 140), (40, 300)])
def test_a_matrix_of_lower_rank_is_reproduced(shape: tuple[int, int], own: int, solver: str) -> None:
    matrix = decaying(shape, torch.linspace(2, 1, own, dtype=torch.float64))
    U, S, Vh = truncated_svd(matrix, RANK, solver=solver)
    check_triplets(matrix, RANK, (U, S, Vh))
    torch.testing.assert_close((U * S) @ Vh, matrix, rtol=0, atol=2e-6)  # float32 rounds values of up to 2
    assert (S[own:] < 1e-5).all()


@pytest.mark.parametrize("solver", BLOCKS)
@pytest.mark.parametrize("start", [None, normal((20, 4))])
def test_a_zero_matrix_has_zero_values(solver: str, start: Tensor | None) -> None:
    matrix = torch.zeros(20, 30)
    U, S, Vh = truncated_svd(matrix, 4, solver=solver, start=start)
    check_triplets(matrix, 4, (U, S, Vh))
    assert torch.equal((U * S) @ Vh, matrix)


@pytest.mark.parametrize("solver", BLOCKS)
@pytest.mark.parametrize("shape", [(12, 12), (17, 9), (9, 17), (24, 70), (1, 5), (5, 1)])
def test_all_of_the_rank_is_exact(shape: tuple[int, int], solver: str) -> None:
    matrix = normal(shape)
    triplets = truncated_svd(matrix, min(shape), solver=solver)
    check_triplets(matrix, min(shape), triplets)
    U, S, Vh = triplets
    torch.testing.assert_close((U * S) @ Vh, matrix, rtol=0, atol=2e-5)  # values of norm up to 40 in float32


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("depth", [3, 6, 50])
def test_no_more_blocks_are_taken_than_there_are_dimensions(shape: tuple[int, int], depth: int) -> None:
    matrix = residual(shape)
    triplets = truncated_svd(matrix, RANK, solver="krylov", depth=depth)
    check_triplets(matrix, RANK, triplets)
    assert all(torch.equal(a, b) for a, b in zip(triplets, truncated_svd(matrix, RANK, solver="krylov"), strict=True))
    whole = truncated_svd(matrix, 20, solver="krylov", depth=50)  # two blocks of twenty are all of 40
    check_triplets(matrix, 20, whole)
    assert captured(matrix, whole[0]) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("solver", BLOCKS)
def test_float64_stays_float64(solver: str) -> None:
    matrix = residual().double()
    U, S, Vh = truncated_svd(matrix, RANK, solver=solver)
    assert U.dtype == S.dtype == Vh.dtype == torch.float64
    torch.testing.assert_close((U * S) @ Vh, U @ (U.T @ matrix), rtol=0, atol=1e-13)
    check_triplets(matrix, RANK, (U, S, Vh))


@pytest.mark.parametrize("solver", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_float32(solver: str, dtype: torch.dtype) -> None:
    matrix = residual().to(dtype)
    found = truncated_svd(matrix, RANK, solver=solver)
    assert all(part.dtype == torch.float32 for part in found)
    assert all(
        torch.equal(a, b) for a, b in zip(found, truncated_svd(matrix.float(), RANK, solver=solver), strict=True)
    )


@pytest.mark.parametrize("solver", BLOCKS)
def test_the_seed_decides_the_bits_alone(solver: str) -> None:
    matrix = residual()
    first = truncated_svd(matrix, RANK, solver=solver, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = truncated_svd(matrix, RANK, solver=solver, seed=3)
    other = truncated_svd(matrix, RANK, solver=solver, seed=4)
    assert torch.equal(torch.get_rng_state(), state), "the global generator isn't drawn from"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("solver", BLOCKS)
@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e15])
def test_numbers_stay_finite_at_every_magnitude(solver: str, scale: float) -> None:
    matrix = residual() * scale
    triplets = truncated_svd(matrix, RANK, solver=solver)
    check_triplets(matrix, RANK, triplets)
    plain = truncated_svd(residual(), RANK, solver=solver)
    # Blocks are normalized, so a scale of the matrix is one of S; roundings differ as the scale isn't a power of two.
    torch.testing.assert_close(triplets[1] / scale, plain[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("solver", BLOCKS)
def test_a_few_rows_far_above_the_rest_do_no_harm(solver: str) -> None:
    matrix = residual()
    matrix[[3, 77]] *= 1e3
    matrix[:, 100] = 0
    matrix[5] = 0
    triplets = truncated_svd(matrix, RANK, solver=solver)
    check_triplets(matrix, RANK, triplets)
    assert captured(matrix, triplets[0]) > 0.99


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((1024, 1024), 85, "krylov"),  # 2 * 6 * 85 = 1020
        ((1024, 1024), 86, "gram"),
        ((1024, 1024), 256, "gram"),
        ((1024, 1024), 257, "full"),
        ((4096, 1023), 1, "gram"),
        ((1024, 4096), 16, "krylov"),
        ((4096, 1024), 16, "krylov"),
        ((128, 500), 32, "gram"),
        ((128, 500), 33, "full"),
        ((127, 500), 1, "full"),
    ],
)
def test_auto_takes_the_solver_that_pays(shape: tuple[int, int], rank: int, expected: str) -> None:
    assert pick_solver(shape, rank) == expected
    assert pick_solver(torch.Size(shape[::-1]), rank) == expected


@pytest.mark.parametrize("solver", BLOCKS)
@pytest.mark.parametrize(("own", "rank"), [(3, 3), (3, 5), (40, 16), (40, 40), (40, 60), (17, 16)])
def test_a_matrix_whose_rank_is_used_up_between_blocks(solver: str, own: int, rank: int) -> None:
    """Beyond its own rank a block is rounding noise, which normalized would pass for directions."""
    matrix = torch.zeros(300, 280)
    matrix[:own] = normal((own, 280))
    U, S, Vh = truncated_svd(matrix, rank, solver=solver)
    check_triplets(matrix, rank, (U, S, Vh))
    best = float(torch.linalg.svdvals(matrix.double())[rank:].norm())
    # The last block alone comes near; all of them reach the optimum, but for float32's rounding of norms of 100.
    slack = 1e-3 * float(matrix.norm()) if solver == "krylov" else 0.1 * float(matrix.norm())
    assert float((matrix - (U * S) @ Vh).double().norm()) <= best + slack


def test_a_start_that_can_t_be_one_is_named() -> None:
    for start in (normal((5, 4)), torch.full((300, 4), float("nan"))):
        with pytest.raises(ConfigError, match="start: expected finite columns of 300 rows"):
            truncated_svd(normal((300, 280)), 4, solver="krylov", start=start)
