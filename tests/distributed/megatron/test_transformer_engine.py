"""TransformerEngine's linears by the names of their types, on stand-ins with their signature."""

from __future__ import annotations

from typing import Any

import pytest
import te_stand_ins as te
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit import LoraConfig, apply_lora, quantize_
from qlora_kit.errors import CodecError
from qlora_kit.layers.sharded.megatron.linear import MegatronLinear
from qlora_kit.layers.sharded.sharding import sharding_of

IN, OUT, RANK = 8, 12, 3
KINDS: dict[str, Any] = {
    "TE linear": lambda **o: te.Linear(IN, OUT, None, **o),
    "TE norm and linear": lambda **o: te.LayerNormLinear(IN, OUT, **o),
    "column": lambda **o: te.TEColumnParallelLinear(IN, OUT, "column", **o),
    "row": lambda **o: te.TERowParallelLinear(IN, OUT, "row", **o),
    "duplicated": lambda **o: te.TELinear(IN, OUT, None, **o),
    "norm and column": lambda **o: te.TELayerNormColumnParallelLinear(IN, OUT, **o),
}


class Holder(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Any:
        return self.linear(x)


def adapted(linear: nn.Module) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["linear"], init_lora_weights=False)
    return apply_lora(Holder(linear), config)


def expected(base: Any, lora: Any, x: Tensor) -> Tensor:
    """In float64: (norm of x) (W + s B A)^T, plus a bias that isn't left to others."""
    (layer,) = lora.adapter_layers().values()
    A, B = (factor.detach().double() for factor in layer.factors("default"))
    x = x.double()
    if hasattr(base, "layer_norm_weight"):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)
        x = x * scale * base.layer_norm_weight.detach().double()
    weight = base.weight.detach().double() + 2.0 * B @ A
    return F.linear(x, weight, None if base.return_bias or base.bias is None else base.bias.detach().double())


@pytest.mark.parametrize("return_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_branches_stand_beside_what_is_multiplied(kind: str, bias: bool, return_bias: bool) -> None:
    torch.manual_seed(0)
    if return_bias and not bias:
        return_bias = False  # as megatron-core has it: there would be none to return
    base = KINDS[kind](bias=bias, return_bias=return_bias)
    x = torch.randn(4, 2, IN)
    before = base(x)
    lora = adapted(base)
    assert isinstance(lora.model.linear, MegatronLinear)
    found = lora(x)
    assert type(found) is type(before)
    out = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(out.detach().double(), expected(base, lora, x), rtol=1e-5, atol=1e-5)
    if isinstance(found, tuple):
        assert len(found) == len(before)
        assert found[1] is before[1]
    lora.merge_adapter()
    merged = lora(x)
    torch.testing.assert_close(merged[0] if isinstance(merged, tuple) else merged, out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("return_bias", [False, True])
@pytest.mark.parametrize("kind", ["TE norm and linear", "norm and column"])
def test_who_asks_for_what_the_norm_gave_gets_it(kind: str, return_bias: bool) -> None:
    base = KINDS[kind](bias=True, return_bias=return_bias)
    x = torch.randn(4, 2, IN)
    lora = adapted(base)
    plain = lora(x)
    base.return_layernorm_output = True
    before, found = base(x), lora(x)
    assert base.return_layernorm_output

    def shape(given: Any) -> Any:
        return tuple(map(shape, given)) if isinstance(given, tuple) else None if given is None else given.shape

    assert shape(found) == shape(before)
    leaves = [found[0][1]] if isinstance(found[0], tuple) else [found[-1]]
    torch.testing.assert_close(leaves[0], F.rms_norm(x, x.shape[-1:], base.layer_norm_weight))
    first = found[0][0] if isinstance(found[0], tuple) else found[0]
    torch.testing.assert_close(first, plain[0] if isinstance(plain, tuple) else plain)


def test_how_they_are_shared_out_is_their_own_word() -> None:
    column = KINDS["column"](bias=False, return_bias=False)
    column.weight.partition_stride = 2
    adapted(column)  # a type is known once it is met
    column.tp_size, column.sequence_parallel = 4, True
    found: Any = sharding_of(column)
    assert (found.kind, found.shape, found.takes, found.gives) == ("column", (4 * OUT, IN), "sequence", "features")
    assert (found.pieces, found.sequence_dim) == (2, 0)
    row = KINDS["row"](bias=False, return_bias=False)
    adapted(row)
    row.tp_size = 4
    found = sharding_of(row)
    assert (found.kind, found.shape, found.takes, found.gives) == ("row", (OUT, 4 * IN), "features", "whole")


def test_few_bits_are_refused_with_what_to_do() -> None:
    model = Holder(KINDS["column"](bias=False, return_bias=False))
    before = model.linear
    with pytest.raises(CodecError, match=r"linear: .*get_gpt_layer_local_spec"):
        quantize_(model, quant_type="nf4", target_modules=["linear"])
    assert model.linear is before
