"""The adapters on a model as a value: what functions below ``LoraModel`` are written over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_kit import AdapterError, LoraConfig, MergeError, apply_lora, merge
from qlora_kit.adapter_files.tensors import adapter_state, load_adapter_state_
from qlora_kit.injection.adapted import Adapted, adapted_of


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def adapted() -> Adapted:
    lora = apply_lora(net(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False), "a")
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    return lora.adapted


def test_files_and_merges_need_no_more_than_the_value() -> None:
    value = adapted()
    state = adapter_state(value, "a")
    load_adapter_state_(value, "b", state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter_state(value, "b").items())
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = value.root(x)
        report = merge(value, adapters="a", into="float32")
        torch.testing.assert_close(report.model(x), expected, rtol=1e-5, atol=1e-6)
    assert value.configs == {}
    assert isinstance(report.model.get_submodule("0"), nn.Linear)


def test_who_holds_a_copy_of_a_module() -> None:
    value = adapted()
    assert value.copies(["b", "a"]) == {"1": ["b", "a"]}
    assert value.copies(["b"]) == {"1": ["b"]}
    value.check_one_copy(["a"], "unused")
    with pytest.raises(MergeError, match=r"1: expected at most one .* found \['a', 'b'\]; so take one"):
        value.check_one_copy(["a", "b"], "so take one", MergeError)


@pytest.mark.parametrize("names", [["a", "b"], ["c"]])
def test_a_choice_that_cannot_be_changes_nothing(names: list[str]) -> None:
    value = adapted()
    with pytest.raises(AdapterError):
        value.choose_(names, trainable=True)
    assert value.active == value.trainable == ["a"]


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"expected a model with adapters .*, found Sequential; call apply_lora"):
        merge(net())
    value = adapted()
    assert adapted_of(value) is value
