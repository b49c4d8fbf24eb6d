"""What others do with parts of the fused form: write into its output, pass no tokens, change its base, replicate it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_bases import BASES, casts, fused_layer
from torch import nn

import qlora_kit
from qlora_kit import AdapterError


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)])
@pytest.mark.parametrize("name", BASES)
@casts
def test_an_output_may_be_written_to(name: str, shape: tuple[int, ...]) -> None:
    """As Falcon and Llama 4 write into what a linear layer gives them."""
    layer = fused_layer(BASES[name](torch.float32))
    gradients = []
    for kind in ("plain", "fused"):
        layer.zero_grad()
        torch.manual_seed(2)
        with qlora_kit.set_branch(kind):
            y = layer(torch.randn(shape))
        y += 1
        torch.relu_(y).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    assert len(gradients[0]) == 2
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_tokens(shape: tuple[int, ...], dropout: float) -> None:
    layer = fused_layer(nn.Linear(64, 24), lora_dropout=dropout)
    y = layer(torch.randn(shape, requires_grad=True))
    assert y.shape == (*shape[:-1], 24)
    y.sum().backward()
    assert all(not p.grad.any() for p in layer.parameters() if p.requires_grad)


def test_a_base_weight_changed_before_the_backward_is_noticed() -> None:
    layer = fused_layer(nn.Linear(8, 6))
    y = layer(torch.randn(3, 8, requires_grad=True))
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    with pytest.raises(AdapterError, match=r"Linear\.weight: expected the weight of the forward pass"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_a_replica_whose_weights_are_no_parameters(kind: str) -> None:
    """As DataParallel makes them: tensors among a module's attributes, through which gradients go."""
    layer = fused_layer(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    copies: dict[nn.Module, Any] = {m: m._replicate_for_data_parallel() for m in layer.modules()}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            copy._modules[name] = copies[child] if child is not None else None
        for name, parameter in module._parameters.items():
            copy._parameters.update({name: None} if parameter is None else {})
            if parameter is not None:
                setattr(copy, name, parameter * 1)
    with qlora_kit.set_branch(kind):
        copies[layer](x).sum().backward()
        found = [p.grad.clone() for p in layer.parameters() if p.grad is not None and p.requires_grad]
        layer.zero_grad()
        layer(x).sum().backward()
    expected = [p.grad for p in layer.parameters() if p.grad is not None]
    assert len(expected) == 2
    torch.testing.assert_close(found, expected)
