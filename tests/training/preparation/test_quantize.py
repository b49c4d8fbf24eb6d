"""Linear layers quantized where they stand: all of them or none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qlora_kit import quantize_
from qlora_kit.errors import CodecError, ConfigError, TargetError


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


def test_a_number_of_bits_that_no_type_has() -> None:
    with pytest.raises(ConfigError, match=r"^bits: expected one of \[.*2.*\], found 5; pass bits=4, or a quant_type"):
        quantize_(nn.Sequential(nn.Linear(8, 8)), 5)


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


class Cast(nn.Module):
    """Computes in the dtype of a layer's weight, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.wi(x).to(self.wo.weight.dtype))


@pytest.mark.parametrize("bits", [2, 4, 8])
@torch.no_grad()
def test_what_is_read_past_its_layer_stays_dense(bits: int) -> None:
    torch.manual_seed(0)
    cast, attention = Cast().eval(), nn.TransformerEncoderLayer(64, 4, 64, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 64)
    right, attended = cast(x), attention(x)
    quantize_(cast, bits)
    assert type(cast.wi) is not nn.Linear
    assert type(cast.wo) is nn.Linear
    assert (cast(x) - right).norm() < 0.6 * right.norm()  # 2 bits; integers for a dtype would be farther off
    with pytest.raises(TargetError, match="the weights of all linear layers are read past them"):
        quantize_(attention, bits)
    assert torch.equal(attention(x), attended)


@pytest.mark.parametrize(
    ("build", "name", "reason"),
    [
        (Cast, "wo", "the dtype or shape of its weight is read by Cast"),
        (lambda: nn.MultiheadAttention(64, 4), "out_proj", "its weight is read by MultiheadAttention, and nobody"),
    ],
)
def test_by_name_it_is_refused(build: Callable[[], nn.Module], name: str, reason: str) -> None:
    net = nn.ModuleDict({"inner": build(), "other": nn.Linear(64, 64)})
    other = net["other"]
    with pytest.raises(TargetError, match=rf"^inner.{name}: expected a layer that computes all .*{reason}"):
        quantize_(net, 4, target_modules=["other", name])
    assert net["other"] is other
