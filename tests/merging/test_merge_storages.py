"""Merges from every kind of module into every storage, weighted and not, and what they have in common."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from merge_nets import PATHS, adapted, delta_of, net, output, stored_weight
from reference import branches
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_kit import LoraConfig, LoraModel, MergeError, apply_lora, merge
from qlora_kit.codecs import codec_for
from qlora_kit.codecs.quantized import Quantizer
from qlora_kit.training.preparation.quantize import quantize_

# float32 sums in another order, relative to weights of order 0.1.
FLOAT32 = 2e-7
LINEARS = ["fc", "proj", "head"]
KINDS = ["emb", *LINEARS, "one", "two", "three"]


class EveryKind(nn.Module):
    """One module of each kind, of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc, self.proj = nn.Embedding(11, 12), nn.Linear(12, 97), Conv1D(33, 97)
        self.one, self.two, self.three = nn.Conv1d(33, 8, 2), nn.Conv2d(1, 3, 2, bias=False), nn.Conv3d(1, 2, 2)
        self.head = nn.Linear(97, 33, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.proj(torch.tanh(self.fc(self.emb(ids))))
        x = self.one(x.transpose(1, 2)).transpose(1, 2)
        planes, cubes = self.two(x[:, None]), self.three(x[:, None, None].expand(-1, -1, 2, -1, -1))
        x = torch.cat([planes.flatten(1), cubes.flatten(1)], 1)
        return self.head(nn.functional.pad(x, (0, 97 - x.shape[1])))


def every_kind(storage: str | None = None, dtype: torch.dtype = torch.float32) -> LoraModel:
    model = EveryKind().to(dtype).eval()
    if storage is not None:
        quantize_(model, quant_type=storage, target_modules=LINEARS)
    return apply_lora(model, LoraConfig(r=2, target_modules=KINDS, init_lora_weights=False))


@pytest.mark.parametrize("into", ["float32", "float16", "nf4", "fp4", "int8", "nf3", "nf2", "trellis2"])
@pytest.mark.parametrize(("storage", "dtype"), [(None, "float32"), (None, "bfloat16"), ("nf4", "float32")])
@pytest.mark.slow
def test_every_kind_into_every_storage(storage: str | None, dtype: str, into: str) -> None:
    lora = every_kind(storage, getattr(torch, dtype))
    ideal = {path: layer.merged_weight(["default"]) for path, layer in lora.adapter_layers().items()}
    report = merge(lora, into=into, force=True)
    assert [layer.path for layer in report.layers] == list(ideal)
    dense = into in ("float32", "float16")
    for path, weight in ideal.items():
        module = report.model.get_submodule(path)
        codec = codec_for(module)
        if dense or path not in LINEARS:
            assert module.weight.dtype == getattr(torch, into if dense else dtype), path
            assert torch.equal(codec.read(module), weight.to(module.weight.dtype).float())
        else:
            rows = codec.shape(module)[1] if into == "trellis2" else 64  # its scales are of rows whatever is asked for
            quantizer = Quantizer(into, None if into == "int8" else rows)
            assert codec.quantizer(module) == quantizer
            assert torch.equal(codec.read(module), quantizer(weight).dequantize()), path
        assert torch.is_floating_point(report.model(torch.randint(11, (3, 5))))


@pytest.mark.parametrize(
    ("storage", "options", "expected"),  # a row of "0" has 64 values
    [
        ("nf4-double", {"into": "nf4"}, Quantizer("nf4", 64, True)),  # as the module has it, which is of that type
        ("nf4-double", {"into": "nf4", "blocksize": 128, "double_quant": False}, Quantizer("nf4", 128, False)),
        ("nf4-double", {"into": "nf3"}, Quantizer("nf3", 64, False)),
        (
            "float32",
            {"into": "nf4", "blocksize": "row", "double_quant": True},
            Quantizer("nf4", 64, True),
        ),  # rows of 64
        ("float32", {"into": "nf3", "blocksize": 32}, Quantizer("nf3", 32, False)),
        ("int8", {"into": "int8", "blocksize": 32}, Quantizer("int8", None)),
    ],
)
def test_blocks_and_double_quantization(storage: str, options: dict[str, Any], expected: Quantizer) -> None:
    model = merge(adapted(storage, target_modules=["0"]), force=True, **options).model
    assert codec_for(model[0]).quantizer(model[0]) == expected
    other = None if storage == "float32" else expected
    assert codec_for(model[4]).quantizer(model[4]) == other, "of the modules that no adapter is on, those of few bits"


@pytest.mark.parametrize("into", ["same", "bfloat16", "nf3"])
def test_a_layer_that_only_another_adapter_has(into: str) -> None:
    lora = adapted("nf4", target_modules=["0"])
    lora.add_adapter("b", LoraConfig(r=1, target_modules=["4"], init_lora_weights=False))
    before = stored_weight(lora.adapter_layers()["4"].base_layer)
    model = merge(lora, adapters="a", into=into, force=True).model
    if into == "same":
        np.testing.assert_array_equal(stored_weight(model[4]), before)
    else:
        assert type(model[4]) is type(model[0]), "it goes where the others go"
        assert 0 <= np.linalg.norm(stored_weight(model[4]) - before) < 0.25 * np.linalg.norm(before)


@pytest.mark.parametrize("storage", ["float32", "nf4-double", "int8", "packed-nf3"])
def test_weights_are_the_deltas_factors(storage: str) -> None:
    weights = {"a": 1.5, "b": -0.75, "c": 0.25}
    lora = adapted(storage, tuple(weights), use_rslora=False)
    base = {path: stored_weight(lora.adapter_layers()[path].base_layer) for path in PATHS}
    deltas = {path: sum(w * delta_of(lora, path, (n,)) for n, w in weights.items()) for path in PATHS}
    listed = merge(copy.deepcopy(lora), weights=[1.5, -0.75, 0.25], into="float32")
    report = merge(lora, weights=dict(reversed(weights.items())), into="float32")
    assert report.weights == listed.weights == weights
    for layer in report.layers:
        stored = stored_weight(report.model.get_submodule(layer.path))
        np.testing.assert_allclose(stored, base[layer.path] + deltas[layer.path], rtol=0, atol=FLOAT32)
        assert layer.delta_norm == pytest.approx(np.linalg.norm(deltas[layer.path]), rel=1e-6)
        np.testing.assert_array_equal(stored, stored_weight(listed.model.get_submodule(layer.path)))


@pytest.mark.parametrize("storage", ["float32", "nf4"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_weight_scales_the_adapter(storage: str, rslora: bool) -> None:
    lora = adapted(storage, use_rslora=rslora)
    scaled = copy.deepcopy(lora)
    with torch.no_grad():
        for layer in scaled.adapter_layers().values():
            layer.factors("a")[1].mul_(-2.0)  # exact in floats, as the sign is
    one, other = merge(lora, weights=[-2.0], force=True).model, merge(scaled, force=True).model
    found = other.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in one.state_dict().items())


def test_the_order_of_adapters_does_not_matter() -> None:
    lora = adapted("float32", ("a", "b", "c"))
    one = merge(copy.deepcopy(lora), adapters=["a", "b", "c"]).model
    other = merge(lora, adapters=["c", "a", "b"]).model
    for path in PATHS:
        np.testing.assert_allclose(*(stored_weight(m.get_submodule(path)) for m in (one, other)), rtol=0, atol=FLOAT32)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([1.0], r"weights=\[1\.0\]: expected a number for each of the adapters \['a', 'b'\], found 1"),
        ([1.0, 2.0, 3.0], "found 3"),
        ({"a": 1.0}, "found 1"),
        ({"a": 1.0, "c": 1.0}, "expected a number for each"),
        ([1.0, float("nan")], r"expected a finite number for 'b', found nan"),
        ([float("inf"), 1.0], r"expected a finite number for 'a', found inf"),
        ([1.0, "2"], r"expected a finite number for 'b', found '2'"),
        ([True, 1.0], r"expected a finite number for 'a', found True"),
        ([0.0, 0.0], r"nothing to merge: every weight is 0"),
    ],
)
def test_weights_that_do_not_fit(weights: Any, match: str) -> None:
    lora = adapted("float32", ("a", "b"))
    before = output(lora)
    with pytest.raises(MergeError, match=match):
        merge(lora, weights=weights)
    assert torch.equal(output(lora), before)


@pytest.mark.parametrize("part", [{"bias": "lora_only"}, {"modules_to_save": ["4"]}])
def test_what_cannot_be_weighted(part: dict[str, Any]) -> None:
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, **part)
    lora = apply_lora(net(), config)
    what = "trained biases" if "bias" in part else "a trained copy of 4"
    with pytest.raises(MergeError, match=rf"'default': expected weight 1 for an adapter with {what}.*found 0\.5"):
        merge(lora, weights=[0.5])
    merge(lora, weights=[1])


def test_biases_of_an_adapter_that_is_not_merged_go_back() -> None:
    base = net()
    before = {path: base[int(path)].bias.detach().clone() for path in PATHS}
    lora = apply_lora(base, LoraConfig(r=2, target_modules=["0", "2"], bias="all", init_lora_weights=False), "a")
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    with torch.no_grad():
        for path in PATHS:
            base.get_submodule(path).bias.add_(1.0)
    twin = copy.deepcopy(lora)
    other, own = merge(lora, adapters="b").model, merge(twin, adapters="a").model
    for path in PATHS:
        assert torch.equal(other.get_submodule(path).bias, before[path])
        assert torch.equal(own.get_submodule(path).bias, before[path] + 1.0)


def test_float64_stays_as_exact_as_the_adapter() -> None:
    base = net().double()
    lora = apply_lora(base, LoraConfig(r=4, target_modules=list(PATHS), init_lora_weights=False))
    x = torch.randn(5, 64, dtype=torch.float64)
    with torch.no_grad():
        apart = lora(x)
        merged = merge(lora).model
        assert {p.dtype for p in merged.parameters()} == {torch.float64}
        torch.testing.assert_close(merged(x), apart, rtol=1e-6, atol=1e-6)


def test_four_bit_weights_that_compute_in_float64() -> None:
    """The stock CPU kernel computes garbage there."""
    lora = apply_lora(net().double(), LoraConfig(r=4, target_modules=list(PATHS), init_lora_weights=False))
    model = merge(lora, into="nf4", force=True).model
    x, y = torch.randn(5, 64, dtype=torch.float64), None
    for path, act in zip(PATHS, (np.tanh, np.tanh, lambda v: v), strict=True):
        module = model.get_submodule(path)
        rows = branches.array(x) if y is None else y
        y = act(branches.linear(rows, stored_weight(module), branches.array(module.bias), []))
    with torch.no_grad():
        np.testing.assert_allclose(branches.array(model(x)), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("into", ["same", "float32", "bfloat16", "nf4", "nf3"])
def test_a_parameter_that_two_modules_hold_is_not_emptied(into: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    model[2].weight = model[1].weight
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    shared = model[1].weight.detach().clone()
    merged = merge(lora, into=into, force=True).model
    for path in (1, 2):
        assert torch.equal(merged[path].weight.float(), shared.to(merged[path].weight.dtype).float())
    assert merged[1].weight is merged[2].weight


def test_training_goes_on_after_a_merge() -> None:
    """Leaves that require gradients keep them, and a model in training stays there."""
    base = net()
    lora = apply_lora(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).train()
    lora(torch.randn(2, 64)).sum().backward()
    model = merge(lora).model
    assert model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    model(torch.randn(2, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
