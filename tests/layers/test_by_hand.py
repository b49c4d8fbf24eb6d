"""Single layers under PEFT's method names: chosen, switched off, rescaled, merged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit import LoraConfig, LoraModel, quantize_
from qlora_kit.errors import AdapterError, MergeError
from qlora_kit.layers import AdapterLayer


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


BASES: dict[str, Any] = {
    "linear": (lambda: nn.Linear(6, 4), (6, 4)),
    "transposed": (lambda: Conv1D(4, 6), (6, 4)),
    "embedding": (lambda: nn.Embedding(9, 5), (9, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), (4, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3)),
}


def adapted(base: nn.Module, *names: str) -> AdapterLayer:
    """A layer on ``base`` with random adapters of rank 2 and alpha 6, the first of them active."""
    names = names or ("default",)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["layer"], init_lora_weights=False)
    model = LoraModel(Net(base), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.adapter_layers()["layer"]


@pytest.mark.parametrize("kind", BASES)
def test_widths_and_deltas_are_those_of_the_base(kind: str) -> None:
    make, widths = BASES[kind]
    layer = adapted(make())
    assert (layer.in_features, layer.out_features) == widths
    before = layer.base_layer.weight.detach().clone()
    delta = layer.get_delta_weight("default")
    assert (delta.shape, delta.dtype) == (before.shape, torch.float32)
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight.detach(), before + delta, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.get_base_weight(), before + delta, rtol=1e-6, atol=1e-6)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_the_delta_is_the_scaled_product() -> None:
    layer = adapted(nn.Linear(6, 4))
    A, B = (factor.detach().double().numpy() for factor in layer.factors("default"))
    np.testing.assert_allclose(layer.get_delta_weight("default").numpy(), 3 * B @ A, rtol=1e-5, atol=1e-6)
    with pytest.raises(AdapterError, match=r"unknown adapter 'nobody'; this layer has \['default'\]"):
        layer.get_delta_weight("nobody")


def test_a_packed_base_has_its_widths_and_its_delta_as_a_matrix() -> None:
    net = Net(nn.Linear(64, 32))
    quantize_(net, 2, target_modules=["layer"])
    layer = adapted(net.layer)
    assert (layer.in_features, layer.out_features) == (64, 32)
    assert layer.get_delta_weight("default").shape == layer.get_base_weight().shape == (32, 64)


def test_scales() -> None:
    layer = adapted(nn.Linear(6, 4), "one", "two")
    layer.scale_layer(2)  # of the active one
    assert layer.scaling == {"one": 6.0, "two": 3.0}
    layer.unscale_layer(4)
    assert layer.scaling["one"] == 1.5
    layer.unscale_layer()
    assert layer.scaling["one"] == 3.0
    layer.set_scale("two", 0.5)
    layer.set_scale("nobody", 0.5)
    assert layer.scaling == {"one": 3.0, "two": 1.5}


def test_rank_stabilized_scales_come_back_as_they_were() -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["layer"])
    layer = LoraModel(Net(nn.Linear(6, 4)), config).adapter_layers()["layer"]
    layer.scale_layer(7)
    layer.unscale_layer()
    assert layer.scaling["default"] == 3.0
    layer.set_scale("default", 2)
    assert layer.scaling["default"] == 6.0


def test_choosing_trains_what_is_chosen() -> None:
    layer = adapted(nn.Linear(6, 4), "one", "two")
    layer.set_adapter("two")
    assert layer.active_adapters == layer.active_adapter == ["two"]
    assert trained(layer) == {"two"}
    layer.set_adapter(["one", "two"], inference_mode=True)
    assert trained(layer) == set()
    layer.set_requires_grad("one")
    assert (trained(layer), layer.active_adapters) == ({"one"}, ["one", "two"])


def trained(layer: AdapterLayer) -> set[str]:
    return {name for name in layer.r if all(p.requires_grad for p in layer.adapter_tensors(name).values())}


def test_switching_off_computes_as_the_base_does_merged_or_not() -> None:
    layer = adapted(nn.Linear(6, 4))
    x = torch.randn(3, 6)
    base = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert layer.disable_adapters
    assert torch.equal(layer(x), base)
    assert trained(layer) == set()
    layer.enable_adapters(True)
    assert trained(layer) == {"default"}
    assert not torch.allclose(layer(x), base)


def test_what_is_merged_already_is_said() -> None:
    layer = adapted(nn.Linear(6, 4), "one", "two")
    layer.merge()
    with pytest.warns(UserWarning, match=r"\['one'\] are merged already; there is nothing more to merge"):
        layer.merge()
    with pytest.warns(UserWarning, match=r"\['one'\] are merged already; \['two'\] are merged beside them"):
        layer.merge(adapter_names=["two"])
    assert layer.merged_adapters == ["one", "two"]
    layer.unmerge()
    with pytest.warns(UserWarning, match="nothing is merged into this layer"):
        layer.unmerge()
    with pytest.raises(TypeError, match="expected a list of names, found 'one'"):
        layer.merge(adapter_names="one")


def test_a_safe_merge_refuses_what_is_not_finite() -> None:
    layer = adapted(nn.Linear(6, 4))
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.factors("default")[0][0, 0] = torch.inf
    with pytest.raises(MergeError, match="NaN or infinite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_trained_copies_are_switched_too() -> None:
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    model = LoraModel(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), config)
    copies = model.saved_modules()["2"]
    copies.enable_adapters(False)
    assert copies.current is copies.original_module
    assert not copies.modules_to_save["default"].weight.requires_grad
    copies.set_adapter("default")
    copies.enable_adapters(True)
    assert copies.active_adapter == ["default"]
    assert copies.current.weight.requires_grad
