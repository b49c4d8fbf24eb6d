"""Layers that compute with the weight as it will be merged: forward and gradients against float64, and what is kept."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from adapted_layers import adapt, assert_near, branches
from merge_nets import stored_weight
from reference import branches as ref
from reference import merge_aware as reference
from reference import quantization
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit import AdapterLayer, LoraConfig, LoraModel, quantize_
from qlora_kit.codecs import codec_for
from qlora_kit.codecs.codebooks import SCHEMES
from qlora_kit.errors import AdapterError, MergeError

OUT, IN = 40, 96


def linear(bits: int | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(2)
    module = nn.Linear(IN, OUT, dtype=dtype)
    if bits is None:
        return module
    return quantize_(nn.ModuleDict({"layer": module}), bits, target_modules=["layer"], **options)["layer"]


def aware(base: nn.Module, into: Any = "same", adapters: int = 1, **config: Any) -> tuple[LoraModel, AdapterLayer]:
    lora, layer = adapt(base, adapters, merge_aware=into, **config)
    return lora.train(), layer


def rounded(layer: AdapterLayer) -> np.ndarray:
    """The weight that the layer computes with, read by the reference from what is stored."""
    held = layer.as_merged(layer.active_adapters)
    assert held is not None
    return stored_weight(held.module)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("into", ["nf4", "nf2", "signed2", "lloyd3", "affine3", "uniform8", "fp4"])
def test_it_is_the_rounded_sum(into: str) -> None:
    """By a search through all levels, for the base and both branches together."""
    base = linear()
    _, layer = aware(base, into, adapters=2)
    kind = SCHEMES[into]
    ideal = ref.array(base.weight) + ref.delta(branches(layer))
    expected, _, lead = quantization.round_blocks(
        ideal, np.array(kind.table(64)), 64, kind.scaling, kind.multipliers(64)
    )
    found = rounded(layer)
    sure = lead > 1e-5  # elsewhere float32 may find either of two levels the nearer
    assert sure.mean() > 0.99
    assert np.abs(found - expected)[sure].max() <= 1e-6 * np.abs(expected).max()


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "nf4 again": (4, "same", {}),
    "2 bits again": (2, "same", {}),
    "2 bits, scales in 8 bits": (2, "same", {"double_quant": True}),
    "3 bits": (3, "same", {}),
    "nf4 into 2 bits": (4, {"into": "signed2", "blocksize": 32, "double_quant": True}, {}),
    "dense into nf4": (None, "nf4", {}),
    "dense into 3 bits": (None, "lloyd3", {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_straight_through_gradients(case: str, dtype: torch.dtype) -> None:
    bits, into, options = CASES[case]
    base = linear(bits, dtype, **options)
    _, layer = aware(base, into, adapters=2)
    layer.base_layer.bias.requires_grad_()
    x = draw(2, 5, IN, dtype=dtype).requires_grad_()
    grad = draw(2, 5, OUT, dtype=dtype, seed=6)
    y = layer(x)
    weight, bias = rounded(layer), ref.array(layer.base_layer.bias)
    assert y.dtype == dtype
    assert_near(y, reference.forward(ref.array(x), weight, bias), dtype, "y")
    y.backward(grad)
    of_x, of_bias, factors = reference.gradients(ref.array(x), weight, branches(layer), ref.array(grad))
    assert_near(x.grad, of_x, dtype, "x")
    assert_near(layer.base_layer.bias.grad, of_bias, dtype, "bias")
    for name, expected in zip(layer.active_adapters, factors, strict=True):
        for parameter, gradient in zip(layer.adapter_tensors(name).values(), expected, strict=True):
            assert_near(parameter.grad, gradient, dtype, name)


def test_int8_in_training() -> None:
    _, layer = aware(linear(8))
    x = draw(3, IN)
    assert_near(layer(x), reference.forward(ref.array(x), rounded(layer), ref.array(layer.base_layer.bias)), x.dtype)


def test_conv1d() -> None:
    torch.manual_seed(0)
    _, layer = aware(Conv1D(OUT, IN), "nf3")
    x = draw(3, IN)
    y = layer(x)
    y.backward(draw(3, OUT, seed=6))
    weight = rounded(layer)
    assert_near(y, reference.forward(ref.array(x), weight, ref.array(layer.base_layer.bias)), x.dtype)
    _, _, [(of_A, of_B)] = reference.gradients(ref.array(x), weight, branches(layer), ref.array(draw(3, OUT, seed=6)))
    A, B = layer.adapter_tensors("a0").values()
    assert_near(A.grad, of_A, x.dtype)
    assert_near(B.grad, of_B, x.dtype)


@pytest.mark.parametrize("frozen", [("A",), ("B",), ("A", "B")])
def test_with_frozen_factors(frozen: tuple[str, ...]) -> None:
    """What isn't trained gets no gradient, and the rest the same."""
    _, layer = aware(linear(2))
    _, all_trained = aware(linear(2))
    x, grad = draw(3, IN), draw(3, OUT, seed=6)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    factors = dict(zip("AB", layer.adapter_tensors("a0").values(), strict=True))
    for name in frozen:
        factors[name].requires_grad_(False)
    for each, given in zip((layer, all_trained), inputs, strict=True):
        each(given).backward(grad)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for name, other in zip("AB", all_trained.adapter_tensors("a0").values(), strict=True):
        own = factors[name].grad
        assert own is None if name in frozen else torch.equal(own, other.grad)


def test_training_and_evaluation_give_the_same() -> None:
    lora, layer = aware(linear(2))
    x = draw(3, IN)
    trained = layer(x)
    lora.eval()
    with torch.no_grad():
        evaluated = layer(x)
    assert torch.equal(layer(x), evaluated)  # a gradient wanted or not
    assert_near(trained, ref.array(evaluated), torch.float32)


@pytest.mark.parametrize("bits", [2, 4])
def test_training_goes_on_after_inference(bits: int) -> None:
    """What was rounded in inference mode is no tensor of that mode."""
    lora, layer = aware(linear(bits))
    lora.eval()
    with torch.inference_mode():
        evaluated = layer(draw(3, IN))
    kept = layer._kept
    lora.train()
    x = draw(3, IN).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert layer._kept is kept
    assert_near(y, ref.array(evaluated), torch.float32)
    assert_near(x.grad, np.ones((3, OUT)) @ rounded(layer), torch.float32)


def test_the_rounded_weight_is_kept_until_a_factor_changes() -> None:
    lora, layer = aware(linear(2), adapters=2)
    x = draw(3, IN)
    layer(x).sum().backward()
    kept = layer._kept
    layer(x).sum().backward()
    lora.eval()
    layer(x)
    assert layer._kept is kept
    changes = [
        lambda: layer.adapter_tensors("a1")["lora_B.weight"].data.mul_(2),  # which no version counter tells of
        lambda: torch.optim.SGD(layer.parameters(), lr=1.0).step(),
        lambda: layer.set_scale("a0", 2.0),
        lambda: lora.set_adapter("a0"),
        lambda: layer.base_layer.load_state_dict(other.state_dict()),
    ]
    torch.manual_seed(9)
    other = quantize_(nn.ModuleDict({"layer": nn.Linear(IN, OUT)}), 2, target_modules=["layer"])["layer"]
    for change in changes:
        before = layer(x)
        change()
        after = layer(x)
        assert layer._kept is not kept
        assert not torch.equal(before, after)
        weight = rounded(layer)
        codec = codec_for(layer.base_layer)
        fresh = codec.quantizer(layer.base_layer)(layer.merged_weight(layer.active_adapters)).dequantize()
        assert np.array_equal(weight.astype(np.float32), fresh.numpy())
        kept = layer._kept


def test_a_backward_pass_has_the_weight_of_its_forward() -> None:
    """Also where factors change in between, which leaves the saved ones as they were."""
    _, layer = aware(linear(2))
    _, B = layer.adapter_tensors("a0").values()
    x, grad = draw(3, IN).requires_grad_(), draw(3, OUT, seed=6)
    y = layer(x)
    weight = rounded(layer)
    B.data = B.data * 3
    layer(draw(1, IN))
    y.backward(grad)
    assert_near(x.grad, ref.array(grad) @ weight, torch.float32)


def test_the_base_is_left_alone() -> None:
    base = linear(2)
    before = copy.deepcopy(base.state_dict())
    lora, layer = aware(base)
    layer(draw(3, IN)).sum().backward()
    names = [name for name, _ in lora.named_parameters()]
    assert all(torch.equal(value, before[key]) for key, value in layer.base_layer.state_dict().items())
    assert len(names) == 4  # the rounded weight is nobody's parameter
    assert not any("kept" in key for key in lora.state_dict())


def test_the_switch() -> None:
    lora, layer = aware(linear(2))
    x = draw(3, IN)
    merged = layer(x)
    beside = ref.linear(
        ref.array(x), stored_weight(layer.base_layer), ref.array(layer.base_layer.bias), branches(layer)
    )
    with lora.set_merge_aware(False):
        assert_near(layer(x), beside, torch.float32)
    assert torch.equal(layer(x), merged)
    lora.set_merge_aware(False)
    assert_near(layer(x), beside, torch.float32)
    lora.set_merge_aware()
    assert torch.equal(layer(x), merged)
    with lora.disable_adapter():
        assert_near(
            layer(x),
            ref.linear(ref.array(x), stored_weight(layer.base_layer), ref.array(layer.base_layer.bias), []),
            torch.float32,
        )


def test_adapters_for_different_merges_are_not_active_together() -> None:
    lora, layer = aware(linear(), "nf4")
    lora.add_adapter("other", LoraConfig(r=2, target_modules=["layer"], merge_aware="nf2"))
    lora.add_adapter("plain", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    lora.set_adapter(["a0", "other"])
    with pytest.raises(AdapterError, match=r"expected at most one kind of merge .*nf4.*nf2.*set_merge_aware\(False\)"):
        layer(draw(3, IN))
    lora.set_adapter(["a0", "plain"])
    x = draw(3, IN)
    assert_near(layer(x), reference.forward(ref.array(x), rounded(layer), ref.array(layer.base_layer.bias)), x.dtype)
    lora.delete_adapter("other")
    assert list(layer.merge_aware) == ["a0"]


def test_weights_that_cannot_be_rounded() -> None:
    lora, layer = aware(linear(), "nf4")
    layer.base_layer.weight.requires_grad_()
    with pytest.raises(AdapterError, match=r"Linear\.weight: expected a frozen weight .* found one that is trained"):
        layer(draw(3, IN))
    layer.base_layer.weight = nn.Parameter(torch.empty(OUT, IN, device="meta"), requires_grad=False)
    with pytest.raises(AdapterError, match=r"Linear\.weight: expected a weight in memory .*set_merge_aware\(False\)"):
        lora.model["layer"](draw(3, IN))


def test_the_weight_that_is_read_is_the_rounded_one() -> None:
    _, layer = aware(linear(), "nf3")
    x = draw(3, IN)
    y = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert_near(y, reference.forward(ref.array(x), rounded(layer), ref.array(layer.bias)), torch.float32)
    grad = draw(3, OUT, seed=6)
    y.backward(grad)
    _, _, [(of_A, of_B)] = reference.gradients(ref.array(x), rounded(layer), branches(layer), ref.array(grad))
    A, B = layer.adapter_tensors("a0").values()
    assert_near(A.grad, of_A, torch.float32)
    assert_near(B.grad, of_B, torch.float32)


def test_rows_with_adapters_of_their_own_compute_beside_the_base() -> None:
    _, layer = aware(linear(2), adapters=2)
    x = draw(2, IN)
    with torch.no_grad():
        y = layer(x, adapter_names=["a0", "a1"])
    weight, bias, own = stored_weight(layer.base_layer), ref.array(layer.base_layer.bias), branches(layer)
    for row in range(2):
        assert_near(y[row], ref.linear(ref.array(x[row]), weight, bias, [own[row]]), torch.float32)


def test_a_hook_on_the_base_is_told() -> None:
    _, layer = aware(linear(2))
    seen: list[torch.Size] = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer(draw(3, IN))
    assert seen == [(3, OUT)]


def test_merging_in_place_and_back() -> None:
    for bits, into, options in CASES.values():
        base = linear(bits, **options)
        before = {key: value.clone() for key, value in base.state_dict().items()}
        lora, layer = aware(base, into)
        lora.eval()
        x = draw(3, IN)
        y = layer(x)
        held = layer.as_merged(["a0"])
        assert held is not None
        weight = held.codec.read(held.module)
        if bits == 4 and into != "same":
            with pytest.raises(MergeError, match=r"layer: expected adapters .* merge_and_unload\(\) stores them so"):
                lora.merge_adapter()
            continue
        lora.merge_adapter()
        assert torch.equal(layer.get_base_weight(), weight)
        assert_near(layer(x), ref.array(y), torch.float32)
        lora.unmerge_adapter()
        assert all(torch.equal(value, before[key]) for key, value in layer.base_layer.state_dict().items())
        assert torch.equal(layer(x), y)
