"""The share of a delta that arrives in a layer's output: by its definition in float64, and as a refusal's measure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from merge_nets import PATHS, adapted, delta_of, stored_weight
from torch import Tensor

from qlora_kit import MergeError, merge


def moments(width: int) -> Tensor:
    """Of inputs that have a few directions in common."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(400, 6, generator=generator) @ torch.randn(6, width, generator=generator)
    rows += 0.3 * torch.randn(400, width, generator=generator)
    return rows.T @ rows / 400


def statistics(lora: Any, *, diagonal: bool = False) -> dict[str, Tensor]:
    widths = {path: layer.codec.shape(layer.base_layer)[1] for path, layer in lora.adapter_layers().items()}
    found = {path: moments(width) for path, width in widths.items()}
    return {path: matrix.diagonal().clone() for path, matrix in found.items()} if diagonal else found


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("options", [{}, {"residual_rank": 2}, {"into": "nf3"}])
@pytest.mark.slow
def test_it_is_the_projection_by_the_inputs_moments(options: dict[str, Any], diagonal: bool) -> None:
    lora = adapted("nf4", ("a", "b"), size=0.05)
    before = {path: stored_weight(layer.base_layer) for path, layer in lora.adapter_layers().items()}
    deltas = {path: delta_of(lora, path, ("a", "b")) for path in PATHS}
    known = statistics(lora, diagonal=diagonal)
    report = merge(lora, statistics=known, force=True, **options)
    for row in report.layers:
        module = report.model.get_submodule(f"model.{row.path}" if "residual_rank" in options else row.path)
        stored = stored_weight(getattr(module, "base_layer", module))
        if "residual_rank" in options:
            A, B = (factor.detach().double().numpy() for factor in module.factors("residual"))
            stored = stored + B @ A
        R = known[row.path].double().numpy()
        weigh = (lambda E, R=R: E * R) if diagonal else (lambda E, R=R: E @ R)
        change, delta = stored - before[row.path], deltas[row.path]
        expected = np.sum(weigh(change) * delta) / np.sum(weigh(delta) * delta)
        assert row.arrived == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert row.kept == row.arrived
    squares = [row.delta_norm**2 for row in report.layers]
    assert report.kept == pytest.approx(np.average([row.arrived for row in report.layers], weights=squares))


def test_a_refusal_judges_by_the_output_where_it_is_known() -> None:
    """Codes that make up for one another bring the delta to the output, of which the weight alone shows little."""
    lora = adapted("nf4", size=0.01)
    known = statistics(lora)
    with pytest.raises(MergeError, match=r"expected at least 50% of the delta to survive"):
        merge(lora, statistics=known)
    report = merge(lora, rounding="error-feedback", statistics=known)
    assert report.retained < 0.5 < 0.9 < report.kept < 1.1
    assert "of it in the layers' outputs" in str(report)
    assert report.to_dict()["kept"] == report.kept


def test_without_moments_the_weight_speaks() -> None:
    report = merge(adapted("nf4"))
    assert all(row.arrived is None and row.kept == row.retained for row in report.layers)
    assert report.kept == report.retained
    assert "outputs" not in str(report)
