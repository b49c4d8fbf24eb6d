"""Linear layers quantized where they stand: all of them or none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_kit import quantize_
from qlora_kit.errors import CodecError, TargetError


def test_quantizing_a_model_is_all_or_nothing() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(3, 3, 1))
    first = net[0]
    with pytest.raises(TargetError, match="1: expected a dense linear layer to quantize, found Conv2d"):
        quantize_(net, 2, target_modules=["0", "1"])
    assert net[0] is first
    with torch.no_grad():
        first.weight[0, 0] = 1e6
    with pytest.raises(CodecError, match=r"^0: .*below 65504"):
        quantize_(net, 8, target_modules=["0"])
    assert net[0] is first


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8", "signed2", "affine3"])
def test_values_that_are_not_finite_are_refused_by_path(quant_type: str, value: float) -> None:
    net = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 65))
    children = list(net)
    with torch.no_grad():
        net[1].weight[64, 7] = value
    with pytest.raises(CodecError, match=r"^1: .*expected .*(finite|range|65504)"):
        quantize_(net, quant_type=quant_type, target_modules=["0", "1"])
    assert list(net) == children
