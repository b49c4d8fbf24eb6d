"""What must hold whatever the adapters are: theorems, symmetries, rules for ties, and chance under control."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowrank.algebra.adapters import DENSITY_TYPES, arrays, branches, product, relative
from reference import algebra as reference

from qlora_kit.errors import AdapterError
from qlora_kit.lowrank.algebra import Branch, CombineReport, Recipe, combination_types, combine, combine_layers
from qlora_kit.lowrank.algebra.pruning import disjoint_mean, drop_at_random, elected_sign, keep_largest

FLOAT32, FLOAT64 = 1e-6, 1e-12
CHANCE = {"dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd"}
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.tuples(st.integers(1, 20), st.integers(1, 20))
rank_lists = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def recipe(name: str, **fields: object) -> Recipe:
    return Recipe(name, **{"density": 0.5 if name in DENSITY_TYPES else None, **fields})  # type: ignore[arg-type]


def weights_for(count: int, seed: int) -> list[float]:
    return np.random.default_rng(seed).uniform(-2, 2, count).tolist()


# -- theorems --------------------------------------------------------------------------------------------


@few
@given(shape=sizes, ranks=rank_lists, seed=st.integers(0, 999))
def test_exact_is_the_sum_to_float64_at_the_sums_own_rank(shape: tuple[int, int], ranks: list[int], seed: int) -> None:
    made = branches(tuple(ranks), shape, seed, torch.float64)
    weights = weights_for(len(made), seed)
    found = combine(made, weights, Recipe("exact"))
    assert relative(product(found), reference.weighted_sum(arrays(made), weights)) < FLOAT64
    assert found.rank == min(sum(ranks), *shape)


@few
@given(shape=sizes, ranks=rank_lists, rank=st.integers(1, 8), seed=st.integers(0, 999))
def test_no_other_of_its_rank_is_closer_than_svd(
    shape: tuple[int, int], ranks: list[int], rank: int, seed: int
) -> None:
    made = branches(tuple(ranks), shape, seed, torch.float64)
    weights = weights_for(len(made), seed)
    total = reference.weighted_sum(arrays(made), weights)
    values = np.linalg.svd(total, compute_uv=False)
    found = combine(made, weights, Recipe("svd", rank=rank))
    optimum = np.sqrt((values[found.rank :] ** 2).sum())
    assert np.linalg.norm(product(found) - total) <= optimum + 1e-10 * values[0]


@few
@given(shape=sizes, ranks=rank_lists, copies=st.integers(2, 4), seed=st.integers(0, 999))
def test_shared_directions_are_found(shape: tuple[int, int], ranks: list[int], copies: int, seed: int) -> None:
    """Adapters that are multiples of few others give the rank of those few, also from float32 factors."""
    made = branches(tuple(ranks), shape, seed)
    weights = weights_for(len(made) * copies, seed)
    found = combine(made * copies, weights, Recipe("exact"))
    assert found.rank <= min(sum(ranks), *shape)
    assert relative(product(found), reference.weighted_sum(arrays(made * copies), weights)) < 1e-5


@pytest.mark.parametrize("name", sorted(set(combination_types()) - CHANCE))
def test_identical_adapters_give_the_adapter_back(name: str) -> None:
    """With weights that sum to 1; for TIES, which takes a mean, with weights of 1."""
    (one,) = branches((3,), (12, 9))
    full = 1.0 if name in DENSITY_TYPES else None
    weights = [1.0, 1.0, 1.0] if "ties" in name or name == "knots" else [0.5, 0.3, 0.2]
    found = combine([one] * 3, weights, recipe(name, density=full))
    if name in ("linear", "magnitude_prune"):  # the roots of the weights sum to more than 1: cross terms
        gain = sum(w**0.5 for w in weights) ** 2
        assert relative(product(found), gain * product(one)) < FLOAT32
    elif name == "iso_c":
        assert relative(product(found), reference.iso_c(arrays([one]), [1.0])) < 10 * FLOAT32
    else:
        assert relative(product(found), product(one)) < 10 * FLOAT32


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_knots_of_one_adapter_is_that_adapter_pruned_in_its_own_basis(density: float) -> None:
    (one,) = branches((4,), (15, 11), dtype=torch.float64)
    U, S, Vh = np.linalg.svd(product(one), full_matrices=False)
    pruned = reference.prune(S[:4, None] * Vh[:4], density)
    found = combine([one], [1.0], Recipe("knots", density=density))
    assert relative(product(found), U[:, :4] @ pruned) < FLOAT64


# -- symmetries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(combination_types()) - CHANCE))
def test_the_order_of_adapters_says_nothing(name: str) -> None:
    made, weights = branches((3, 3, 3), (14, 10), dtype=torch.float64), [0.7, -0.4, 1.1]
    order = [2, 0, 1]
    first = combine(made, weights, recipe(name))
    second = combine([made[i] for i in order], [weights[i] for i in order], recipe(name))
    assert relative(product(second), product(first)) < FLOAT64


@pytest.mark.parametrize("factor", [3.0, 0.25])
@pytest.mark.parametrize("name", combination_types())
def test_weights_and_scalings_are_linear(name: str, factor: float) -> None:
    """Twice the weights give twice the result; so do twice the scalings."""
    made, weights = branches((3, 3, 3), (14, 10), dtype=torch.float64), [0.7, -0.4, 1.1]
    once = product(combine(made, weights, recipe(name)))
    heavier = product(combine(made, [w * factor for w in weights], recipe(name)))
    assert relative(heavier, factor * once) < FLOAT64
    larger = [dataclasses.replace(b, scaling=b.scaling * factor) for b in made]
    assert relative(product(combine(larger, weights, recipe(name))), factor * once) < FLOAT64


@pytest.mark.parametrize("name", sorted(set(combination_types()) - CHANCE))
def test_turning_the_outputs_turns_what_knows_no_entries(name: str) -> None:
    """An orthogonal change of the outputs commutes with every type that looks at directions, not entries."""
    if name not in ("svd", "exact", "cat", "iso_c"):
        return
    made = branches((3, 2), (14, 10), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(14, 14, dtype=torch.float64)).Q
    turned = [dataclasses.replace(b, B=turn @ b.B) for b in made]
    straight = product(combine(made, [1, 2], recipe(name)))
    assert relative(product(combine(turned, [1, 2], recipe(name))), turn.numpy() @ straight) < FLOAT64


@pytest.mark.parametrize("name", ["ties", "ties_svd", "magnitude_prune_svd", "knots", "exact", "svd", "cat", "iso_c"])
def test_an_adapter_of_zeros_votes_for_nothing(name: str) -> None:
    made = branches((3, 3), (14, 10), dtype=torch.float64)
    zero = Branch(torch.zeros(3, 10, dtype=torch.float64), torch.zeros(14, 3, dtype=torch.float64))
    fields = {"rank": 6} if recipe(name).kind.ranked else {}
    without = combine(made, [0.5, 0.8], recipe(name, **fields))
    with_it = combine([*made, zero], [0.5, 0.8, 9.0], recipe(name, **fields))
    assert relative(product(with_it), product(without)) < FLOAT64


# -- TIES and DARE ---------------------------------------------------------------------------------------


def test_ties_of_signs_go_to_plus() -> None:
    a, b = torch.tensor([2.0, -3.0, 0.0, -1.0, 1.0]), torch.tensor([-2.0, 3.0, 0.0, -1.0, -4.0])
    assert elected_sign([a, b], "total").tolist() == [1, 1, 1, -1, -1]
    assert elected_sign([a, b], "frequency").tolist() == [1, 1, 1, -1, 1]
    assert disjoint_mean([a, b], [1.0, 1.0], "total").tolist() == [2, 3, 0, -1, -4]
    assert disjoint_mean([a, b], [1.0, 1.0], "frequency").tolist() == [2, 3, 0, -1, 1]


def test_frequency_and_total_differ_where_few_are_loud() -> None:
    values = [torch.tensor([-9.0]), torch.tensor([1.0]), torch.tensor([2.0])]
    assert disjoint_mean(values, [1.0, 1.0, 1.0], "total").item() == -9
    assert disjoint_mean(values, [1.0, 1.0, 1.0], "frequency").item() == 1.5
    # The election is by the values alone; a negative weight turns what was elected.
    assert disjoint_mean(values, [-1.0, 1.0, 1.0], "total").item() == 9


def test_pruning_keeps_the_floor_of_the_share() -> None:
    values = torch.tensor([[0.1, -5.0, 3.0], [-0.2, 4.0, 0.0]])
    assert keep_largest(values, 0.5).tolist() == [[0, -5, 3], [0, 4, 0]]
    assert keep_largest(values, 0.4).tolist() == [[0, -5, 0], [0, 4, 0]]
    assert keep_largest(values, 0.1).count_nonzero() == 0
    assert keep_largest(values, 1.0) is values


def test_dare_keeps_the_expectation_and_its_seed() -> None:
    ones = torch.ones(200, 200)
    dropped = drop_at_random(ones, 0.3, torch.Generator().manual_seed(1))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.3])
    # 40,000 draws: three standard deviations of the mean are 3 sqrt(0.7 / 0.3 / 40000).
    assert dropped.mean().item() == pytest.approx(1, abs=0.023)
    assert drop_at_random(ones, 1.0, torch.Generator()) is ones
    made = branches((3, 3), (12, 9), dtype=torch.float64)
    total = reference.weighted_sum(arrays(made), [0.6, -0.8])
    for name in ("dare_linear_svd", "dare_linear"):
        expected = total if name == "dare_linear_svd" else reference.on_factors(arrays(made), [0.6, -0.8], "linear")
        drawn = [
            product(combine(made, [0.6, -0.8], recipe(name, seed=i, **({"rank": 9} if "svd" in name else {}))))
            for i in range(400)
        ]
        # The factors' masks are independent of each other, so their product keeps its expectation too.
        apart = (np.mean(drawn, axis=0) - expected) / (np.std(drawn, axis=0) / 20)
        assert np.sqrt((apart**2).mean()) < 1.3, name
    same, again, other = (combine(made, [1, 1], recipe("dare_ties", seed=s)) for s in (5, 5, 6))
    assert torch.equal(same.A, again.A)
    assert not torch.equal(same.A, other.A)


def test_dare_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    combine(branches(), [1, 1, 1], recipe("dare_ties_svd"))
    assert torch.equal(torch.random.get_rng_state(), before)


# -- whole adapters --------------------------------------------------------------------------------------


def layers_of(*paths: str, ranks: tuple[int, ...] = (2, 2)) -> dict[str, dict[int, Branch]]:
    return {path: dict(enumerate(branches(ranks, seed=i))) for i, path in enumerate(paths)}


def test_a_layers_masks_depend_on_its_path_alone() -> None:
    layers = layers_of("a.q", "a.v", "b.q")
    layers["a.v"] = layers["a.q"]
    whole, _ = combine_layers(layers, ["x", "y"], [1, 1], recipe("dare_linear", seed=3))
    alone, _ = combine_layers({"b.q": layers["b.q"]}, ["x", "y"], [1, 1], recipe("dare_linear", seed=3))
    assert torch.equal(whole["b.q"].A, alone["b.q"].A)
    assert not torch.equal(whole["a.q"].A, whole["a.v"].A)


def test_weights_by_layer() -> None:
    layers = layers_of("model.0.q", "model.1.q", "model.1.v")
    expected = {"model.0.q": [1.0, 2.0], "model.1.q": [3.0, 4.0], "model.1.v": [5.0, 6.0]}
    for weights in (
        {"0.q": [1, 2], r"model\.1\.q": [3, 4], ".*": [5, 6]},
        lambda path: expected[path],
    ):
        found, report = combine_layers(layers, ["x", "y"], weights, Recipe("exact"))
        assert {line.path: list(line.weights) for line in report.layers} == expected
        for path, result in found.items():
            total = reference.weighted_sum(arrays(list(layers[path].values())), expected[path])
            assert relative(product(result), total) < FLOAT32
    for weights, message in (
        ({"0.q": [1, 2]}, r"expected an entry for every adapted module, found none for \['model.1.q'"),
        ({".*": [1, 2], "2.q": [1, 2]}, r"found '2.q', which matches none; closest: \['model"),
        ({".*": [1, 2, 3]}, r"model.0.q: weights: expected 2 weights, one for each adapter, found 3"),
        (lambda path: [1], "model.0.q: weights: expected 2 weights"),
        ([1, 2, 3], "expected 2 weights"),
    ):
        with pytest.raises(AdapterError, match=message):
            combine_layers(layers, ["x", "y"], weights, Recipe("exact"))  # type: ignore[arg-type]


def test_a_missing_branch_is_zero_and_the_default_rank_is_the_largest_anywhere() -> None:
    both, only = branches((2, 5), seed=1), branches((2, 5), seed=2)
    layers = {"a": dict(enumerate(both)), "b": {1: only[1]}}
    found, report = combine_layers(layers, ["x", "y"], [0.5, 2.0], Recipe("svd"))
    assert relative(product(found["b"]), 2 * product(only[1])) < FLOAT32
    assert [(line.adapters, line.ranks, line.rank) for line in report.layers] == [
        (("x", "y"), (2, 5), 5),
        (("y",), (5,), 5),
    ]


def test_errors_name_the_layer_and_come_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_kit.lowrank.algebra import walk

    monkeypatch.setattr(walk, "combine", lambda *_: pytest.fail("computed before everything was checked"))
    layers = layers_of("a", "b")
    layers["b"][1] = Branch(layers["b"][1].A * float("nan"), layers["b"][1].B)
    with pytest.raises(AdapterError, match="b: adapter 'y': expected finite factors"):
        combine_layers(layers, ["x", "y"], [1, 1], Recipe())
    with pytest.raises(AdapterError, match=r"a: expected adapters of one rank.*\{'x': 2, 'y': 3\}"):
        combine_layers(layers_of("a", ranks=(2, 3)), ["x", "y"], [1, 1], Recipe("linear"))
    for names, given_layers in (([], {}), (["x"], {})):
        with pytest.raises(AdapterError, match="expected at least one adapter"):
            combine_layers(given_layers, names, [], Recipe())


def test_the_report_is_a_table_and_data() -> None:
    _, report = combine_layers(layers_of("a.q", "b.v"), ["x", "y"], [1, 1], recipe("ties_svd"))
    text = str(report)
    assert text.splitlines()[0].split() == ["module", "ranks", "rank", "captured", "error", "from", "sum"]
    assert "a.q" in text
    assert "2+2" in text
    assert "2 modules, ties_svd of x, y: mean captured" in text
    data = report.to_dict()
    assert data["layers"][0]["rank"] == 2
    assert data["layers"][0]["captured"] == report.layers[0].captured
    assert report.mean("rank") == 2
    assert "0 modules" in str(CombineReport("svd", (), ()))
