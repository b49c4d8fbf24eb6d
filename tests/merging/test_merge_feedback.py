"""A small delta on codes that are there already: what error feedback does with it, from one weight to a whole merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llama
import torch
from merge_nets import PATHS, adapted, assert_same_bits, bits, delta_of, stored_weight
from reference import branches, descent, starts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from loftq.methods.descent import round_from_codes
from loftq.methods.metric import Metric
from loftq.methods.quantizers import quantizer_for
from loftq.methods.rounding import round_with_feedback
from qlora_kit import LoraConfig, LoraModel, MergeError, apply_lora, merge
from qlora_kit.codecs import codec_for
from qlora_kit.codecs.quantized import Quantized
from qlora_kit.merging.requantize import Grid, rounded
from qlora_kit.training.preparation.quantize import quantize_

SMALL = 0.01
STORAGES = ["nf4", "nf4-double", "packed-nf3", "packed-affine3-double"]


def correlated(width: int, rows: int = 600, seed: int = 0) -> Tensor:
    """Inputs that a dozen directions dominate."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, width, generator=draw) / 12**0.5
    return torch.randn(rows, 12, generator=draw) @ mixing + 0.15 * torch.randn(rows, width, generator=draw)


def moments(width: int) -> Tensor:
    x = correlated(width)
    return x.T @ x / len(x)


# -- one weight ----------------------------------------------------------------------------------------------------


def grid(size: float, rank: int = 4, **kind: Any) -> tuple[Any, Grid, Tensor]:
    """A quantizer, a delta of ``size`` on a weight of its, and their sum."""
    quantizer = quantizer_for(**{"quant_type": "nf4", **kind})
    stored = quantizer(torch.randn(128, 96) * 0.05)
    A, B = torch.randn(rank, 96), torch.randn(128, rank)
    B *= size * stored.dequantize().norm() / (B @ A).norm()
    return quantizer, Grid(stored, A, B), stored.dequantize() + B @ A


def same(one: Quantized, other: Quantized) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("kind", [{}, {"double_quant": True}, {"quant_type": "affine3"}])
@pytest.mark.slow
def test_a_small_delta_is_met_by_changed_codes_and_a_large_one_by_new_ones(kind: dict[str, Any]) -> None:
    R = moments(96)
    quantizer, small, ideal = grid(SMALL, **kind)
    found = rounded(ideal, quantizer, "error-feedback", R, 0, small)
    assert same(found.quantized, round_from_codes(small.stored, small.A, small.B, R))
    assert found.residual is None
    anew = round_with_feedback(ideal, quantizer, Metric.of(R))
    assert same(rounded(ideal, quantizer, "error-feedback", R, 0, None).quantized, anew)

    quantizer, large, ideal = grid(1.0, **kind)
    found = rounded(ideal, quantizer, "error-feedback", R, 0, large)
    assert same(found.quantized, round_with_feedback(ideal, quantizer, Metric.of(R)))
    share = descent.share(*changes(found.quantized, large), starts.damped(R.numpy()))
    assert share == pytest.approx(1, abs=0.05), "taken because the delta arrives that way too"


def changes(found: Quantized, given: Grid) -> tuple[np.ndarray, np.ndarray]:
    change = branches.array(found.dequantize()) - branches.array(given.stored.dequantize())
    return change, branches.array(given.B) @ branches.array(given.A)


def test_other_roundings_and_int8_look_at_no_codes() -> None:
    quantizer, small, ideal = grid(SMALL)
    for way in ("nearest", "scale-search"):
        with_grid, without = (rounded(ideal, quantizer, way, None, 0, g) for g in (small, None))
        assert same(with_grid.quantized, without.quantized)
    quantizer, small, ideal = grid(SMALL, quant_type="int8")
    found = rounded(ideal, quantizer, "error-feedback", moments(96), 0, small)
    assert same(found.quantized, round_with_feedback(ideal, quantizer, Metric.of(moments(96))))


def test_a_delta_on_inputs_that_the_text_never_showed_is_kept() -> None:
    """By the plain moments it has no effect, and would have arrived in any codes: those rounded anew lose it."""
    R, unseen = moments(96), slice(60, 96)
    R[unseen] = 0
    R[:, unseen] = 0
    quantizer, small, _ = grid(SMALL)
    small.A[:, : unseen.start] = 0
    found = rounded(small.stored.dequantize() + small.B @ small.A, quantizer, "error-feedback", R, 0, small)
    change, delta = changes(found.quantized, small)
    assert descent.share(change, delta, np.eye(96)) == pytest.approx(1, abs=0.1)
    anew = round_with_feedback(small.stored.dequantize() + small.B @ small.A, quantizer, Metric.of(R))
    assert descent.share(changes(anew, small)[0], delta, np.eye(96)) < 0.01


def test_a_branch_beside_changed_codes() -> None:
    """What the branch has no rank for goes into the codes; one that has room for all leaves them as they are."""
    R = moments(96)
    quantizer, small, ideal = grid(SMALL, rank=8)
    found = rounded(ideal, quantizer, "error-feedback", R, 2, small)
    assert found.residual is not None
    A, B = found.residual
    assert (A.shape, B.shape) == ((2, 96), (128, 2))
    assert torch.equal(found.quantized.scales, small.stored.scales)
    assert not torch.equal(found.quantized.codes, small.stored.codes)
    exact, (change, delta) = starts.damped(R.numpy()), changes(found.quantized, small)
    branch = branches.array(B) @ branches.array(A)
    # The branch is the best of its rank under R for the delta.
    best = starts.weighted_error(delta - starts.closest_correction(delta, exact, 2), exact)
    assert starts.weighted_error(delta - branch, exact) == pytest.approx(best, rel=1e-4)
    assert descent.share(change + branch, delta, exact) == pytest.approx(1, abs=0.1)  # of a short rest
    assert descent.share(change, delta - branch, exact) == pytest.approx(1, abs=0.15), "of what is left for the codes"

    whole = rounded(ideal, quantizer, "error-feedback", R, 8, small)
    assert whole.residual is not None
    assert torch.equal(whole.quantized.codes, small.stored.codes)
    lost = whole.residual[1] @ whole.residual[0] - small.B @ small.A
    assert lost.norm() < 1e-5 * (small.B @ small.A).norm()


# -- a merge -------------------------------------------------------------------------------------------------------


def lora_of(storage: str) -> LoraModel:
    torch.manual_seed(0)
    return adapted(storage, size=0.02)


@torch.no_grad()
def seen_moments(lora: LoraModel) -> dict[str, Tensor]:
    """Of what the layers of the adapted net see of correlated inputs."""
    seen: dict[str, Tensor] = {}
    layers = lora.adapter_layers().items()
    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0]}))
        for path, layer in layers
    ]
    lora(correlated(64))
    for handle in handles:
        handle.remove()
    return {path: x.T @ x / len(x) for path, x in seen.items()}


@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
@pytest.mark.slow
def test_the_adapters_effect_is_in_the_output(monkeypatch: pytest.MonkeyPatch, storage: str) -> None:
    """As it is in each layer's. What the codes do besides has nothing to do with it, and isn't small in a net as small
    as this one; nor is it where the nearest codes lose the delta and leave nothing but noise."""
    x, lora = correlated(64), lora_of(storage)
    statistics = seen_moments(lora)
    base = {path: stored_weight(lora.adapter_layers()[path].base_layer) for path in PATHS}
    deltas = {path: delta_of(lora, path, ("a",)) for path in PATHS}
    apart, without = lora(x), lora_of(storage).unload()(x)
    effect = apart - without

    def there(model: Any) -> float:
        return float(((model(x) - without) * effect).sum() / effect.square().sum())

    report = merge(lora, rounding="error-feedback", statistics=statistics)
    assert report.kept == pytest.approx(1, abs=0.05)
    for layer in report.layers:
        stored, R = stored_weight(report.model.get_submodule(layer.path)), branches.array(statistics[layer.path])
        expected = descent.share(stored - base[layer.path], deltas[layer.path], R)
        assert layer.kept == layer.arrived == pytest.approx(expected, rel=1e-3, abs=1e-3)
    nearest = merge(lora_of(storage), statistics=statistics, force=True)
    monkeypatch.setattr("loftq.for_merging._changed", lambda *_: None)
    anew = merge(lora_of(storage), rounding="error-feedback", statistics=statistics, force=True)
    for other in (nearest, anew):
        assert abs(other.kept - 1) > 5 * abs(report.kept - 1)
        assert abs(there(other.model) - 1) > 2 * abs(there(report.model) - 1)
    assert there(report.model) == pytest.approx(1, abs=0.15)
    assert (report.model(x) - apart).norm() < (nearest.model(x) - apart).norm()


@pytest.mark.slow
def test_statistics_of_other_dtypes_and_ones_that_are_none() -> None:
    given = {path: moments(width).bfloat16() for path, width in zip(PATHS, (64, 96, 64), strict=True)}
    merged = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        statistics = {path: R.to(dtype) for path, R in given.items()}
        merged.append(merge(lora_of("nf4"), rounding="error-feedback", statistics=statistics).to_dict())
        assert merge(lora_of("nf4"), statistics=statistics, force=True).kept < 0.5
    assert merged[0] == merged[1] == merged[2]

    lora = lora_of("nf4")
    before, wrong = bits(lora), {path: R.float() for path, R in given.items()}
    for value in (torch.nan, torch.inf, -1.0):
        wrong["2"][3, 3] = value
        for way in ("nearest", "error-feedback"):
            with pytest.raises(MergeError, match=r"^2: expected second moments of its inputs that are finite in float"):
                merge(lora, rounding=way, statistics=wrong)
    wrong["2"] = torch.eye(96) + 3 * (torch.eye(96).roll(1, 0) + torch.eye(96).roll(-1, 0))  # of no inputs at all
    for options in ({"rounding": "error-feedback"}, {"least_retained": 2.0}):
        with pytest.raises(MergeError, match=r"^\d: statistics: expected second moments .* positive semidefinite"):
            merge(lora, statistics=wrong, **options)  # type: ignore[arg-type]
    assert_same_bits(lora, before)


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("options", [{}, {"residual_rank": 2}])
@pytest.mark.slow
def test_an_error_at_the_third_layer(monkeypatch: pytest.MonkeyPatch, storage: str, options: dict[str, Any]) -> None:
    lora = lora_of(storage)
    statistics, before = seen_moments(lora), bits(lora)
    kind = type(lora.adapter_layers()["0"].codec)
    take_, count = kind.take_, [0]

    def broken(self: Any, module: nn.Module, quantized: Quantized) -> None:
        count[0] += 1
        take_(self, module, quantized)
        if count[0] == 3:
            raise BrokenError("the third")

    monkeypatch.setattr(kind, "take_", broken)
    with pytest.raises(BrokenError, match="the third"):
        merge(lora, rounding="error-feedback", statistics=statistics, **options)
    assert_same_bits(lora, before)


def test_only_what_is_stored_is_a_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not the original base, nor another storage."""
    tiny_llama.llama(num_hidden_layers=1, intermediate_size=64).save_pretrained(tmp_path)

    def lora() -> LoraModel:
        torch.manual_seed(0)
        model = quantize_(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), quant_type="nf3")
        return apply_lora(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()

    def broken(*_: Any) -> Callable[[], None]:
        raise BrokenError("codes are looked at")

    monkeypatch.setattr("loftq.for_merging.round_from_codes", broken)
    ids = torch.randint(1, 128, (4, 16))
    with pytest.raises(BrokenError):
        merge(lora(), rounding="error-feedback", statistics=ids)
    for options in ({"base": "original"}, {"into": "nf4"}, {"into": "nf3", "blocksize": 32}):
        report = merge(lora(), rounding="error-feedback", statistics=ids, force=True, **options)  # type: ignore[arg-type]
        module = report.model.get_submodule("model.layers.0.self_attn.q_proj")
        assert codec_for(module).quantizer(module) is not None
