"""A model through merges and back: ``merge_adapter``, ``unmerge_adapter``, ``merge_and_unload``, ``unload``."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from merge_nets import (
    DENSE,
    FOUR_BIT,
    IN_PLACE,
    PATHS,
    STORAGES,
    adapted,
    assert_same_bits,
    bits,
    net,
    output,
    stored_weight,
)
from tiny_net import CASES, TinyNet, randomize_trainable_
from torch import nn

from qlora_kit import AdapterError, AdapterLayer, LoraConfig, MergeError, apply_lora, merge

# float32 sums in another order, over three layers.
FLOAT32 = 1e-5


# -- merging in place, and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", IN_PLACE)
def test_unmerging_is_bitwise(storage: str) -> None:
    lora = adapted(storage, ("a", "b"))
    apart = output(lora)  # an int8 linear moves its scales at the first forward
    before = bits(lora)
    lora.merge_adapter()
    assert all(layer.merged_adapters == ["a", "b"] for layer in lora.adapter_layers().values())
    merged = output(lora)
    assert not torch.equal(merged, apart)
    for names in (None, "a"):
        with pytest.raises(MergeError, match=r"nothing to merge: .* are merged already; .*unmerge_adapter\(\) first"):
            lora.merge_adapter(names)
    assert torch.equal(output(lora), merged)
    lora.unmerge_adapter()
    assert_same_bits(lora, before)
    assert torch.equal(output(lora), apart)
    lora.unmerge_adapter()  # nothing is merged
    assert_same_bits(lora, before)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_merges_one_after_the_other_requantize_from_the_base(storage: str) -> None:
    together = adapted(storage, ("a", "b"))
    stepwise = copy.deepcopy(together)
    together.merge_adapter(["a", "b"])
    stepwise.merge_adapter("a")
    stepwise.merge_adapter(["b"])
    for path in PATHS:
        one, other = (lora.adapter_layers()[path].base_layer for lora in (together, stepwise))
        np.testing.assert_array_equal(stored_weight(one), stored_weight(other))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_an_in_place_merge_writes_what_merge_writes(storage: str) -> None:
    lora = adapted(storage, ("a", "b"))
    final = merge(copy.deepcopy(lora)).model
    lora.merge_adapter()
    for path in PATHS:
        found = stored_weight(lora.adapter_layers()[path].base_layer)
        np.testing.assert_array_equal(found, stored_weight(final.get_submodule(path)))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "nf4-double", "int8"])
@pytest.mark.parametrize("into", ["same", "float32"])
def test_merge_takes_up_an_earlier_merge(storage: str, into: str) -> None:
    """What merge_adapter did is neither added twice nor dropped, nor requantized on top of itself."""
    lora = adapted(storage, ("a", "b"))
    expected = merge(copy.deepcopy(lora), into=into).model
    only_b = merge(copy.deepcopy(lora), adapters=["b"], into=into).model
    named = copy.deepcopy(lora)
    for model, active in ((lora, "b"), (named, ["a", "b"])):
        model.merge_adapter(["a"])
        model.set_adapter(active)
    report = merge(lora, into=into)
    assert report.adapters == ["a", "b"]
    merge(named, adapters=["b"], into=into)
    for path in PATHS:
        for found, wanted in ((report.model, expected), (named.model, only_b)):
            np.testing.assert_array_equal(*(stored_weight(m.get_submodule(path)) for m in (found, wanted)))


@pytest.mark.parametrize("storage", ["float32", "nf4-double", "int8"])
def test_merging_what_is_switched_off(storage: str) -> None:
    lora = adapted(storage)
    expected = merge(copy.deepcopy(lora)).model
    before = bits(lora)
    lora.disable_adapter_layers()
    with pytest.raises(MergeError, match=r"switched off.*enable_adapter_layers\(\)"):
        lora.merge_adapter()
    lora.enable_adapter_layers()
    assert_same_bits(lora, before)
    with lora.disable_adapter():
        merged = lora.merge_and_unload()
    for path in PATHS:
        np.testing.assert_array_equal(*(stored_weight(m.get_submodule(path)) for m in (merged, expected)))


def test_a_merge_set_aside_while_switched_off() -> None:
    lora = adapted("nf4-double", ("a", "b"), target_modules=["0"])
    before = bits(lora)
    lora.merge_adapter("a")
    lora.disable_adapter_layers()
    with pytest.raises(AdapterError, match=r"'a' is merged .*unmerge_adapter"):
        lora.delete_adapter("a")
    lora.unmerge_adapter()
    lora.enable_adapter_layers()
    assert_same_bits(lora, before)


@pytest.mark.parametrize("storage", list(FOUR_BIT))
@pytest.mark.parametrize("when", ["before the adapter", "under the adapter", "while merged"])
@pytest.mark.filterwarnings("ignore:.*an earlier evaluation forward had repacked:UserWarning")
@pytest.mark.slow
def test_merging_after_an_evaluation_forward(storage: str, when: str) -> None:
    """On CPUs with AVX512_BF16 a stock evaluation forward repacks 4-bit weights, and garbage is read from them."""
    torch.manual_seed(5)
    clean = adapted(storage)
    expected = merge(copy.deepcopy(clean), into="float32").model
    torch.manual_seed(5)
    if when == "before the adapter":
        model = net(storage)
        for path in ("0", "4"):  # not "2": with 96 inputs that forward itself is wrong
            with torch.no_grad():
                model.get_submodule(path)(torch.randn(3, 64, dtype=torch.bfloat16))
        lora = apply_lora(model, LoraConfig(r=4, lora_alpha=6, target_modules=list(PATHS)), "a").eval()
        lora.load_state_dict({k: v for k, v in clean.state_dict().items() if "lora_" in k}, strict=False)
    else:
        lora = adapted(storage)
        if when == "while merged":
            lora.merge_adapter()
        output(lora)
    merged = merge(lora, into="float32").model
    for path in PATHS:
        found, wanted = (stored_weight(m.get_submodule(path)) for m in (merged, expected))
        # Repacking rounds the scales to bfloat16, 2^-9 of each, which can't be undone.
        tolerance = 2**-8 if when == "before the adapter" else 1e-6
        assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


# -- the model that comes out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("into", ["same", *DENSE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_every_kind_of_module_merges_into_every_dtype(case: str, into: str, dtype: str) -> None:
    base = TinyNet().to(DENSE[dtype]).eval()
    lora = apply_lora(base, LoraConfig(**CASES[case]))
    randomize_trainable_(lora)
    ids = torch.randint(11, (3, 4))
    with torch.no_grad():
        # The same values computed in float32 throughout.
        expected = copy.deepcopy(lora).float()(ids)
    report = merge(lora, into=into)
    found = report.model
    assert found is base
    wanted = DENSE[dtype if into == "same" else into]
    assert {p.dtype for p in found.parameters()} == {wanted}
    # Logits of order 1 to 10 over 54 products; merged into float32, nothing was rounded on the way.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.2}[wanted]
    with torch.no_grad():
        assert (found.float()(ids) - expected).abs().max() < tolerance * max(1.0, expected.abs().max().item())
    assert not any(isinstance(module, AdapterLayer) for module in found.modules())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("switched_off", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_trained_biases_and_copies_become_the_bases(bias: str, switched_off: bool, fails: bool) -> None:
    lora = apply_lora(TinyNet(), LoraConfig(target_modules=["fc", "conv"], bias=bias, modules_to_save=["head"]))
    before = {name: p.detach().clone() for name, p in lora.model.named_parameters() if "lora_" not in name}
    randomize_trainable_(lora)
    trained = {name: layer.bias.detach().clone() for name, layer in lora.adapter_layers().items()}
    head = lora.model.head.modules_to_save["default"].weight.detach().clone()
    if switched_off:
        lora.disable_adapter_layers()
    if fails:
        with torch.no_grad():
            lora.adapter_layers()["conv"].lora_A["default"].weight.fill_(float("nan"))
        with pytest.raises(MergeError, match="conv: adapter"):
            merge(lora)
        lora.enable_adapter_layers()
        assert all(torch.equal(lora.adapter_layers()[name].bias, value) for name, value in trained.items())
        return
    model = merge(lora).model
    assert all(torch.equal(model.get_submodule(name).bias, value) for name, value in trained.items())
    assert torch.equal(model.head.weight, head)
    for name in ("emb.weight", "norm.weight"):
        assert torch.equal(model.get_parameter(name), before[name])
    for name in ("norm.bias", "proj.bias"):
        assert torch.equal(model.get_parameter(name), before[name]) == (bias == "lora_only")


@pytest.mark.parametrize("ending", ["same", "float32", "bfloat16", "unload"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "nf4-double", "int8"])
@pytest.mark.parametrize("train", [False, True])
def test_flags_are_those_of_the_base(ending: str, storage: str, train: bool) -> None:
    """Trainable is what was before the first adapter; training or evaluating is what it is now."""
    base = net(storage)
    base[0].bias.requires_grad_(False)
    trainable = {name for name, p in base.named_parameters() if p.requires_grad}
    dtypes = {name: p.dtype for name, p in base.named_parameters()}
    lora = apply_lora(base, LoraConfig(r=2, target_modules=["0", "4"], bias="lora_only", init_lora_weights=False))
    lora.train(train)
    model = lora.unload() if ending == "unload" else merge(lora, into=ending).model
    assert model is base
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert {module.training for module in model.modules()} == {train}
    if ending in ("same", "unload"):
        assert {name: p.dtype for name, p in model.named_parameters()} == dtypes


@pytest.mark.parametrize("storage", ["float32", "nf4-double", "int8"])
@pytest.mark.parametrize("into", ["same", "float32", "bfloat16"])
def test_hooks_of_the_base_stay(storage: str, into: str) -> None:
    class Uncopyable:
        def __deepcopy__(self, memo: Any) -> None:
            raise AssertionError("a merge must not copy what a hook holds")

        def __init__(self) -> None:
            self.calls: list[str] = []

        def forward(self, *_: object) -> None:
            self.calls.append("forward")

        def before(self, *_: object, **kwargs: object) -> None:
            self.calls.append("before")

        def backward(self, *_: object) -> None:
            self.calls.append("backward")

    base, recorder = net(storage), Uncopyable()
    for path in ("0", "4"):  # adapted, and not adapted
        base.get_submodule(path).register_forward_hook(recorder.forward)
        base.get_submodule(path).register_forward_pre_hook(recorder.before, with_kwargs=True)
    base[4].register_full_backward_hook(recorder.backward)
    handle = base[0].register_forward_hook(recorder.forward)
    lora = apply_lora(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model = merge(lora, into=into).model
    handle.remove()
    dtype = torch.bfloat16 if into == "bfloat16" else torch.float32
    model(torch.randn(2, 64, dtype=dtype, requires_grad=True)).sum().backward()
    assert recorder.calls == ["before", "forward", "before", "forward", "backward"]


@pytest.mark.slow
@pytest.mark.parametrize("storage", IN_PLACE)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("switched_off", [False, True])
def test_unload_gives_the_original_objects(storage: str, merged: bool, switched_off: bool) -> None:
    base = net(storage)
    if storage == "int8":
        output(base)  # the first forward moves the scales
    before = bits(base)
    lora = apply_lora(base, LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=None, init_lora_weights=False))
    if merged:
        lora.merge_adapter()
    if switched_off:
        lora.disable_adapter_layers()
    assert lora.unload() is base
    assert_same_bits(base, before)


def test_unload_gives_the_original_of_a_trained_copy() -> None:
    base = TinyNet()
    before = bits(base)
    lora = apply_lora(base, LoraConfig(**CASES["modules_to_save"]))
    randomize_trainable_(lora)
    assert_same_bits(lora.unload(), before)


def test_a_module_that_stands_at_two_paths() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared, nn.Tanh())})
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["one", "0"], init_lora_weights=False))
    x = torch.randn(3, 8)
    expected = model["two"](model["one"](x))
    for into in ("same", "bfloat16"):
        twin = copy.deepcopy(lora)
        report = merge(twin, into=into)
        assert len(report.layers) == 1, "the delta is added once"
        assert report.model["one"] is report.model["two"][0]
        assert type(report.model["one"]) is nn.Linear
        report.model.float()
        tolerance = FLOAT32 if into == "same" else 3e-2
        torch.testing.assert_close(report.model["two"](report.model["one"](x)), expected, rtol=0, atol=tolerance)
