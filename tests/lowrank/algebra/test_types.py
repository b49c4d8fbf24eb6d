"""Every combination type against dense float64 definitions, and the account that comes with it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from lowrank.algebra.adapters import DENSITY_TYPES, arrays, branches, product, relative
from reference import algebra as reference

from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.lowrank import truncated_svd
from qlora_kit.lowrank.algebra import Branch, Combined, Recipe, combination_types, combine, register_combination
from qlora_kit.lowrank.algebra.pruning import ENTRYWISE

# Factors rounded to float32 and products of them: a few roundings of 6e-8.
FLOAT32 = 1e-6
FLOAT64 = 1e-13
WEIGHTS = [0.7, -0.4, 1.1]
SHAPES = [(17, 23), (23, 17), (4, 31), (31, 4), (5, 5)]


def recipe(name: str, **fields: object) -> Recipe:
    return Recipe(name, **{"density": 0.5 if name in DENSITY_TYPES else None, **fields})  # type: ignore[arg-type]


def test_the_names_are_pefts_and_three_more() -> None:
    pefts = {"svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd"}
    pefts |= {"dare_linear_svd", "magnitude_prune", "magnitude_prune_svd"}
    assert set(combination_types()) == pefts | {"exact", "knots", "iso_c"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("ranks", "weights"), [((3, 3, 3), WEIGHTS), ((1, 4, 2), WEIGHTS), ((2,), [-1.5])])
def test_exact_and_cat_are_the_weighted_sum(
    shape: tuple[int, int], ranks: tuple[int, ...], weights: list[float]
) -> None:
    for dtype, tolerance in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):
        given = branches(ranks, shape, dtype=dtype)
        expected = reference.weighted_sum(arrays(given), weights)
        for name in ("exact", "cat"):
            found = combine(given, weights, Recipe(name))
            assert found.A.dtype == found.B.dtype == dtype
            assert relative(product(found), expected) < tolerance
            assert (found.captured, found.error) == (1.0, pytest.approx(0, abs=1e-7))
            assert found.distance < 1e-6
            assert found.rank == (sum(ranks) if name == "cat" else np.linalg.matrix_rank(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 4, 30])
def test_svd_is_eckart_and_youngs_optimum_of_the_sum(shape: tuple[int, int], rank: int) -> None:
    given = branches((2, 3, 1), shape)
    total = reference.weighted_sum(arrays(given), WEIGHTS)
    found = combine(given, WEIGHTS, Recipe("svd", rank=rank))
    assert found.rank == min(rank, 6, *shape)
    assert relative(product(found), reference.truncated(total, rank)) < FLOAT32
    values = np.linalg.svd(total, compute_uv=False)
    lost = np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())
    assert found.error == pytest.approx(lost, abs=1e-7)
    assert found.distance == pytest.approx(lost, abs=1e-6)
    assert found.captured == pytest.approx(1 - lost**2, abs=1e-7)
    exact = combine(given, WEIGHTS, Recipe("exact", rank=rank))
    assert relative(product(exact), reference.truncated(total, rank)) < FLOAT32


def test_svd_alone_takes_the_largest_rank() -> None:
    assert combine(branches((2, 5, 3)), WEIGHTS, Recipe()).rank == 5


def test_an_energy_chooses_the_smallest_rank() -> None:
    given = branches((4, 4))
    values = np.linalg.svd(reference.weighted_sum(arrays(given), [1, 1]), compute_uv=False)
    shares = np.cumsum(values**2) / (values**2).sum()
    for name in ("svd", "exact"):
        for energy in (0.2, 0.5, 0.9, 0.99, 1.0):
            found = combine(given, [1, 1], Recipe(name, energy=energy))
            assert found.rank == min(int(np.searchsorted(shares, energy)) + 1, 8)
            assert found.captured >= energy - 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_has_its_cross_terms_and_says_so(shape: tuple[int, int]) -> None:
    given = branches(shape=shape)
    found = combine(given, WEIGHTS, Recipe("linear"))
    expected = reference.on_factors(arrays(given), WEIGHTS, "linear")
    assert relative(product(found), expected) < FLOAT32
    total = reference.weighted_sum(arrays(given), WEIGHTS)
    assert found.distance == pytest.approx(relative(expected, total), rel=1e-5)
    assert found.distance > 0.1


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("way", ["ties", "magnitude_prune"])
def test_pruned_types(way: str, density: float, method: str) -> None:
    given = branches()
    fields = {"density": density, "majority_sign": method}
    found = combine(given, WEIGHTS, recipe(way, **fields))
    assert relative(product(found), reference.on_factors(arrays(given), WEIGHTS, way, density, method)) < FLOAT32
    dense = reference.on_deltas(arrays(given), WEIGHTS, way, density, method)
    for rank in (2, 17):
        found = combine(given, WEIGHTS, recipe(f"{way}_svd", rank=rank, **fields))
        assert relative(product(found), reference.truncated(dense, rank)) < 10 * FLOAT32
        lost = relative(reference.truncated(dense, rank), dense)
        assert found.error == pytest.approx(lost, abs=1e-3)  # of float32's singular values near 0
        assert found.captured == pytest.approx(1 - lost**2, abs=1e-6)


@pytest.mark.slow
def test_large_deltas_are_cut_as_an_exact_decomposition_would() -> None:
    """Where the Krylov solver takes over; the factors' rounding is all that is apart."""
    given = branches((4, 4, 4), (1100, 1024))
    drawn = Recipe("dare_ties_svd", density=0.5)
    found = combine(given, WEIGHTS, drawn)
    dense = ENTRYWISE["dare_ties"]([b.scaling * (b.B @ b.A) for b in given], WEIGHTS, drawn, drawn.generator())
    U, S, Vh = truncated_svd(dense, 4, solver="gram")
    assert relative(product(found), ((U * S) @ Vh).double().numpy()) < 10 * FLOAT32
    assert found.captured == pytest.approx(float(S.square().sum() / dense.square().sum()), abs=1e-5)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_knots(shape: tuple[int, int], density: float, method: str) -> None:
    given = branches((2, 3, 1), shape)
    found = combine(given, WEIGHTS, Recipe("knots", density=density, majority_sign=method))
    expected = reference.knots(arrays(given), WEIGHTS, density, method)
    assert relative(product(found), expected) < 10 * FLOAT32
    cut = combine(given, WEIGHTS, Recipe("knots", density=density, majority_sign=method, rank=2))
    assert relative(product(cut), reference.truncated(expected, 2)) < 10 * FLOAT32


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c(shape: tuple[int, int]) -> None:
    given = branches((2, 1, 2), shape)
    for rank in (None, 2):
        found = combine(given, WEIGHTS, Recipe("iso_c", rank=rank))
        assert relative(product(found), reference.iso_c(arrays(given), WEIGHTS, rank)) < 10 * FLOAT32
        values = np.linalg.svd(product(found), compute_uv=False)[: found.rank]
        np.testing.assert_allclose(values, values[0], rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", combination_types())
def test_half_precision_is_combined_in_float32(name: str, dtype: torch.dtype) -> None:
    given = branches(dtype=dtype)
    whole = [dataclasses.replace(b, A=b.A.float(), B=b.B.float()) for b in given]
    found, expected = (combine(b, WEIGHTS, recipe(name)) for b in (given, whole))
    assert found.A.dtype == found.B.dtype == torch.float32
    assert torch.equal(found.A, expected.A)
    assert torch.equal(found.B, expected.B)


@pytest.mark.parametrize("name", combination_types())
def test_inputs_stay_as_they_are_and_autocast_is_kept_out(name: str) -> None:
    given = branches()
    before = [(b.A.clone(), b.B.clone()) for b in given]
    plain = combine(given, WEIGHTS, recipe(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = combine(given, WEIGHTS, recipe(name))
    assert torch.equal(plain.A, cast.A)
    assert torch.equal(plain.B, cast.B)
    for branch, (A, B) in zip(given, before, strict=True):
        assert torch.equal(branch.A, A)
        assert torch.equal(branch.B, B)
    assert plain.A.data_ptr() not in [b.A.data_ptr() for b in given]
    assert plain.B.data_ptr() not in [b.B.data_ptr() for b in given]


@pytest.mark.parametrize("name", combination_types())
def test_zero_adapters_rank_one_and_a_single_one(name: str) -> None:
    zero = [Branch(torch.randn(1, 6), torch.zeros(5, 1)), Branch(torch.zeros(1, 6), torch.randn(5, 1))]
    found = combine(zero, [0.5, 0.5], recipe(name, density=1.0 if name in DENSITY_TYPES else None))
    assert found.rank >= 1
    if name not in ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"):  # B_2 A_1 is a cross term
        assert np.abs(product(found)).max() == 0
        assert found.distance == 0
    (one,) = branches((1,), (5, 6))
    found = combine([one], [1.0], recipe(name, density=1.0 if name in DENSITY_TYPES else None))
    assert found.rank == 1
    assert relative(product(found), product(one)) < FLOAT32
    assert found.distance < 1e-6


def test_a_sum_that_cancels_is_zero() -> None:
    (one,) = branches((4,))
    found = combine([one, one], [1.0, -1.0], Recipe("exact"))
    assert (found.rank, found.distance) == (1, 0.0)
    assert np.abs(product(found)).max() == 0


def test_clamp_cuts_extreme_entries_and_sees_no_signs() -> None:
    given = branches((3, 3), (40, 30))
    whole = combine(given, [1, 1], Recipe("svd", clamp=1.0))
    assert relative(product(whole), reference.truncated(reference.weighted_sum(arrays(given), [1, 1]), 3)) < FLOAT32
    found = combine(given, [1, 1], Recipe("svd", clamp=0.95))
    sizes = np.abs(np.concatenate([whole.A.numpy().ravel(), whole.B.numpy().ravel()]))
    bound = np.quantile(sizes, 0.9)  # the 0.95 quantile of the sizes and their negatives
    np.testing.assert_allclose(found.B.numpy(), whole.B.numpy().clip(-bound, bound), rtol=1e-5)
    np.testing.assert_allclose(found.A.numpy(), whole.A.numpy().clip(-bound, bound), rtol=1e-5)
    assert found.distance > whole.distance


def test_a_type_of_ones_own() -> None:
    from qlora_kit.lowrank.algebra import registry

    @register_combination("first")
    def first(given: list[Branch], weights: list[float], _: Recipe) -> Combined:
        return Combined(given[0].A * weights[0], given[0].B)

    try:
        given = branches(scalings=(1.0,))
        assert torch.equal(combine(given, [2, 0, 0], Recipe("first")).A, given[0].A * 2)
    finally:
        del registry._registry["first"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"combination_type": "tie"}, r"combination_type: expected one of .* found 'tie'; did you mean 'ties'\?"),
        ({"combination_type": "ties"}, "density: expected a share of entries to keep, since 'ties' prunes, found None"),
        ({"combination_type": "ties", "density": 0}, r"density: expected a share in \(0, 1\], found 0"),
        ({"combination_type": "ties", "density": 1.01}, r"density: expected a share in \(0, 1\], found 1.01"),
        ({"combination_type": "ties", "density": float("nan")}, "density: expected a share"),
        ({"combination_type": "ties", "density": True}, "density: expected a share"),
        ({"combination_type": "svd", "density": 0.5}, "density: expected None with combination_type='svd'"),
        ({"combination_type": "cat", "rank": 4}, "svd_rank: expected None with combination_type='cat'"),
        ({"rank": 0}, "svd_rank: expected an integer of at least 1, found 0"),
        ({"rank": 2.0}, "svd_rank: expected an integer"),
        ({"rank": 2, "energy": 0.5}, "energy: expected None beside svd_rank=2"),
        ({"energy": 1.5}, r"energy: expected a share in \(0, 1\], found 1.5"),
        ({"clamp": 0.5}, r"svd_clamp: expected a quantile in \(0.5, 1\], found 0.5"),
        ({"combination_type": "exact", "clamp": 0.9}, "svd_clamp: expected None"),
        ({"majority_sign": "most"}, "majority_sign_method: expected one of .*'total', 'frequency'"),
        ({"seed": -1}, "seed: expected an integer of at least 0, found -1"),
    ],
)
def test_recipes_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**fields)  # type: ignore[arg-type]


def test_branches_are_checked() -> None:
    good = branches((2, 2), (4, 5))
    A, B = good[0].A, good[0].B
    for given, weights, message in (
        ([], [], "expected at least one adapter to combine"),
        (good, [1.0], r"expected 2 weights, one for each adapter, found 1 \(\[1.0\]\)"),
        (good, 1.0, "expected 2 weights, one for each adapter, found 1.0"),
        (good, [1.0, float("inf")], "expected finite numbers as weights, found inf"),
        (good, [1.0, "2"], "expected finite numbers as weights, found '2'"),
        ([good[0], *branches((2,), (4, 6))], [1, 1], r"expected adapters of one module.*\(4, 5\).*\(4, 6\)"),
        ([Branch(A, B.T)], [1], r"expected factors A \(rank, in\) and B \(out, rank\), found \(2, 5\) and \(2, 4\)"),
        ([Branch(A[:0], B[:, :0])], [1], "expected factors A"),
        ([Branch(A.to("meta"), B)], [1], "expected factors with memory"),
        ([Branch(A / 0, B)], [1], "expected finite factors and scaling, found 10 NaN or infinite values"),
        ([Branch(A, B, float("nan"))], [1], "scaling nan"),
        ([Branch(A * 3e38, B)], [1e10], "expected finite factors|found an overflow"),
    ):
        with pytest.raises(AdapterError, match=message):
            combine(given, weights, Recipe("cat"))  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"expected adapters of one rank, since 'ties' .*'exact', 'svd'"):
        combine(branches((2, 3)), [1, 1], Recipe("ties", density=0.5))
    with pytest.raises(AdapterError, match=r"found an overflow of torch.float32; lower the weights"):
        combine([Branch(A, B)], [1e39], Recipe("cat"))
