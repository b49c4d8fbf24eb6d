"""A linear layer straight from its codec: outputs and gradients are the dense layer's, and no dense weight is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_kit.codecs import codec_for
from qlora_kit.codecs.lookup import lookup_linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 0, 6), (2, 3, 6)])
def test_outputs_and_gradients(shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(6, 5, bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = [x, *([linear.bias] if bias else [])]
    with torch.no_grad():  # the codec reads in float32
        linear.weight.copy_(linear.weight.float())
    found, expected = (
        lookup_linear(linear, codec_for(linear), x, torch.float64),
        F.linear(x, linear.weight, linear.bias),
    )
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_it_computes_in_the_dtype_asked_for_and_gives_the_inputs() -> None:
    linear, x = nn.Linear(6, 5), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert lookup_linear(linear, codec_for(linear), x.bfloat16(), torch.float32).dtype == torch.bfloat16
        exact = lookup_linear(linear, codec_for(linear), x, torch.float32)
    torch.testing.assert_close(exact, linear(x))


def test_no_dense_weight_is_kept_for_backward() -> None:
    linear, x = nn.Linear(6, 5), torch.randn(3, 6, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lookup_linear(linear, codec_for(linear), x, torch.float32)
    assert not any(t.shape == linear.weight.shape for t in saved)
