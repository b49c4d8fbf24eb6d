"""``add_weighted_adapter`` beside peft's on the same adapters: its values where it is right, and its faults seen."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lowrank.algebra.adapters import PRUNING
from lowrank.algebra.pairs import assert_close, deltas, in_peft, ours, peft_deltas, peft_talks

from qlora_kit import AdapterError, LoraModel
from qlora_kit.compat.peft import PeftModel
from qlora_kit.lowrank.algebra import Recipe

pytestmark = peft_talks
peft = pytest.importorskip("peft", reason="combinations are compared with the installed peft")

# float32 factors of order 1, products and decompositions taken in another order.
FLOAT32 = 1e-5
WEIGHTS = [0.7, -0.4, 1.1]
DENSE = [f"{name}_svd" for name in PRUNING]
TYPES = ["svd", "linear", "cat", *PRUNING, *DENSE]
THREE: list[dict[str, Any]] = [{"lora_alpha": 3}, {"lora_alpha": 1}, {"lora_alpha": 8}]


def both(lora: LoraModel, folder: Path, weights: list[float], kind: str, **fields: Any) -> tuple[Any, Any]:
    """Our combination and theirs; equal masks where they are drawn."""
    names = list(lora.peft_config)
    if kind.startswith(("ties", "dare", "magnitude")):
        fields = {"density": 0.5, **fields}
    lora.add_weighted_adapter(names, weights, "new", kind, **fields)
    theirs = in_peft_without(lora, folder)
    with pytest.MonkeyPatch.context() as patch:
        if "dare" in kind:
            masks = drawn_like_ours(lora, names, kind, fields["density"])
            patch.setattr("peft.utils.merge_utils.torch.bernoulli", lambda input: next(masks).reshape(input.shape))
        theirs.add_weighted_adapter(names, weights, "new", kind, **fields)
    return deltas(lora, "new"), peft_deltas(theirs, "new")


def in_peft_without(lora: LoraModel, folder: Path) -> Any:
    config = lora.peft_config.pop("new")
    try:
        return in_peft(lora, folder)
    finally:
        lora.peft_config["new"] = config


def drawn_like_ours(lora: LoraModel, names: list[str], kind: str, density: float) -> Iterator[torch.Tensor]:
    """The masks of seed 0, in the order in which peft asks: layer by layer, A's before B's."""
    draw = torch.bernoulli  # before it is patched
    masks = []
    for path, layer in lora.adapter_layers().items():
        generator = Recipe(kind, density=density).for_layer(path).generator()
        factors = [layer.factors(name) for name in names if name in layer.r]
        if kind.endswith("_svd"):
            shapes = [(B.shape[0], A.shape[1]) for A, B in factors]
        else:
            shapes = [A.shape for A, _ in factors] + [B.shape for _, B in factors]
        masks += [draw(torch.full(shape, density), generator=generator) for shape in shapes]
    return iter(masks)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.slow
def test_every_type_has_pefts_values(kind: str, tmp_path: Path) -> None:
    """On a linear layer, an embedding, a Conv1D and a convolution; peft draws masks of turned deltas on two of them."""
    paths = ("fc", "conv", "head") if kind.startswith("dare") and kind.endswith("svd") else ()
    lora = ours(*THREE, **({"paths": paths} if paths else {}))
    found, expected = both(lora, tmp_path, WEIGHTS, kind)
    assert_close(found, expected, FLOAT32)
    assert len(found) == len(paths or (1, 2, 3, 4, 5))


@pytest.mark.parametrize("kind", ["ties", "ties_svd", "dare_ties"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_frequency_election(kind: str, density: float, tmp_path: Path) -> None:
    lora = ours(*THREE)
    fields = {"majority_sign_method": "frequency", "density": density}
    assert_close(*both(lora, tmp_path, [1.0, 0.5, 2.0], kind, **fields), FLOAT32)


@pytest.mark.parametrize("kind", ["svd", "cat", "ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("svd_rank", [None, 1, 3])
@pytest.mark.slow
def test_mixed_ranks_alphas_and_patterns(kind: str, svd_rank: int | None, tmp_path: Path) -> None:
    lora = ours(
        {"r": 1, "lora_alpha": 5},
        {"r": 2, "rank_pattern": {"fc": 1, "conv": 3}, "alpha_pattern": {"head": 7}},
        {"r": 2, "lora_alpha": 0.5},
    )
    fields = {} if kind == "cat" else {"svd_rank": svd_rank}
    assert_close(*both(lora, tmp_path, WEIGHTS, kind, **fields), FLOAT32)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.slow
def test_other_targets_are_united(kind: str, tmp_path: Path) -> None:
    lora = ours({"target_modules": ["fc"]}, {"target_modules": ["conv", "fc"]}, {"target_modules": ["head"]})
    found, expected = both(lora, tmp_path, WEIGHTS, kind)
    assert_close(found, expected, FLOAT32)
    assert set(found) == {"fc", "conv", "head"}


@pytest.mark.parametrize("kind", ["svd", "linear", "cat"])
def test_one_adapter(kind: str, tmp_path: Path) -> None:
    found, expected = both(ours({"lora_alpha": 3}), tmp_path, [-0.5], kind)
    assert_close(found, expected, FLOAT32)


def test_the_arguments_are_pefts_in_its_order() -> None:
    expected = inspect.signature(peft.LoraModel.add_weighted_adapter).parameters
    found = inspect.signature(LoraModel.add_weighted_adapter).parameters
    positional = [name for name, p in found.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == list(expected)
    assert all(found[name].default == expected[name].default for name in positional)
    assert PeftModel.add_weighted_adapter is LoraModel.add_weighted_adapter


# -- where peft is wrong ---------------------------------------------------------------------------------


def test_rslora_counts_as_it_is_where_peft_is_off_by_the_root_of_the_rank(tmp_path: Path) -> None:
    lora = ours({"r": 4, "use_rslora": True}, {"r": 4, "use_rslora": True, "lora_alpha": 2}, paths=("fc", "head"))
    total = {path: 0.3 * d + 0.6 * deltas(lora, "a1")[path] for path, d in deltas(lora, "a0").items()}
    found, theirs = both(lora, tmp_path, [0.3, 0.6], "cat")
    assert_close(found, total, FLOAT32)
    assert_close(theirs, {path: np.sqrt(8) * d for path, d in total.items()}, FLOAT32)


def test_weights_too_few_are_refused_where_peft_drops_adapters(tmp_path: Path) -> None:
    lora = ours({}, {}, paths=("fc",))
    theirs = in_peft(lora, tmp_path)
    theirs.add_weighted_adapter(["a0", "a1"], [1.0], "new", "cat")
    assert_close(peft_deltas(theirs, "new"), deltas(lora, "a0"), FLOAT32)
    with pytest.raises(AdapterError, match=r"expected 2 weights, one for each adapter, found 1 \(\[1.0\]\)"):
        lora.add_weighted_adapter(["a0", "a1"], [1.0], "new", "cat")


def test_a_name_that_is_taken_is_refused_where_peft_does_nothing(tmp_path: Path) -> None:
    lora = ours({}, {}, paths=("fc",))
    theirs = in_peft(lora, tmp_path)
    before = peft_deltas(theirs, "a1")
    theirs.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "a1", "cat")
    assert_close(peft_deltas(theirs, "a1"), before, 0)
    with pytest.raises(AdapterError, match="adapter 'a1' exists already; delete_adapter"):
        lora.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "a1", "cat")


def test_one_adapter_is_pruned_as_asked_where_peft_goes_over_to_linear(tmp_path: Path) -> None:
    lora = ours({"lora_alpha": 3}, paths=("fc",))
    found, theirs = both(lora, tmp_path, [1.0], "ties")
    assert_close(theirs, deltas(lora, "a0"), FLOAT32)
    A, B = lora.adapter_layers()["fc"].factors("new")
    assert (int(A.count_nonzero()), int(B.count_nonzero())) == (8, 8)  # half of 2 x 8
    assert np.abs(found["fc"] - theirs["fc"]).max() > 0.1


def test_a_rank_above_a_modules_smallest_dimension_is_cut_where_pefts_factors_do_not_fit(tmp_path: Path) -> None:
    lora = ours({"r": 3}, {"r": 3}, paths=("head",))  # 3 outputs
    theirs = in_peft(lora, tmp_path)
    theirs.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "new", "svd", svd_rank=4)
    with pytest.raises(ValueError, match="mismatch"):
        peft_deltas(theirs, "new")
    report = lora.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "new", "svd", svd_rank=4)
    assert report.layers[0].rank == 3
    assert report.layers[0].distance < 1e-6


def test_clamping_sees_no_signs_where_pefts_does(tmp_path: Path) -> None:
    """Turning the weights' signs turns the result's; peft's quantile is of entries whose signs are LAPACK's whim."""
    lora = ours({}, {}, paths=("fc", "head"))
    theirs = in_peft(lora, tmp_path)
    for model in (lora, theirs):
        for name, sign in (("plus", 1.0), ("minus", -1.0)):
            model.add_weighted_adapter(["a0", "a1"], [sign, sign], name, "svd", svd_clamp=0.8)
    turned = {path: -d for path, d in deltas(lora, "minus").items()}
    assert_close(turned, deltas(lora, "plus"), FLOAT32)
    with pytest.raises(AssertionError, match="fc"):
        assert_close({path: -d for path, d in peft_deltas(theirs, "minus").items()}, peft_deltas(theirs, "plus"), 1e-2)
