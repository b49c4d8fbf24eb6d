"""One adapter's branch and another's trained copy on the same module: each is what it would be alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_kit import AdapterError, LoraConfig, LoraModel, apply_lora, merge
from qlora_kit.adapter_files.tensors import adapter_state
from qlora_kit.naming import base_of

X = torch.linspace(-1, 1, 12).view(3, 4)
CONFIGS = {
    "branch": LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False),
    "copy": LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def both() -> LoraModel:
    lora = apply_lora(net(), CONFIGS["branch"], "branch")
    lora.add_adapter("copy", CONFIGS["copy"])
    with torch.no_grad():
        lora.saved_modules()["1"].modules_to_save["copy"].weight.add_(1)
    return lora


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model.eval()(X)


def test_both_are_there_under_one_path() -> None:
    lora = both()
    assert list(lora.adapter_layers()) == ["0", "1"]
    assert list(lora.saved_modules()) == ["1"]
    assert type(lora.saved_modules()["1"].modules_to_save["copy"]) is nn.Linear


@pytest.mark.parametrize("name", CONFIGS)
def test_files_and_merges_are_those_of_one_alone(name: str, tmp_path: Path) -> None:
    lora = both()
    lora.set_adapter(name)
    expected = output(lora)
    lora.save_pretrained(tmp_path)
    alone = LoraModel.from_pretrained(net(), tmp_path / name)
    assert torch.equal(output(alone), expected)
    merged = merge(lora, adapters=name, into="float32").model
    assert [type(module) for module in merged] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(output(merged), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_goes_and_the_other_stays(name: str) -> None:
    lora = both()
    (other,) = CONFIGS.keys() - {name}
    lora.set_adapter(other)
    expected = output(lora)
    lora.delete_adapter(name)
    assert torch.equal(output(lora), expected)
    assert (list(lora.saved_modules()) == ["1"]) == (other == "copy")
    assert list(lora.adapter_layers()) == (["0"] if other == "copy" else ["0", "1"])
    original = net()
    assert torch.equal(output(lora.unload()), output(original))
    assert [type(module) for module in lora.model] == [nn.Linear, nn.Linear]


def test_in_place_and_switched_off() -> None:
    lora = both()
    lora.set_adapter("branch")
    expected = output(lora)
    lora.merge_adapter()
    torch.testing.assert_close(output(lora), expected, rtol=0, atol=1e-6)
    with lora.disable_adapter():
        assert torch.equal(output(lora), output(net()))
    lora.unmerge_adapter()
    assert torch.equal(output(lora), expected)


def test_a_branch_on_what_is_trained_whole_is_refused() -> None:
    lora = apply_lora(net(), CONFIGS["copy"], "copy")
    with pytest.raises(AdapterError, match="1: expected a module that is free to be adapted by 'branch'"):
        lora.add_adapter("branch", CONFIGS["branch"])


def test_trained_biases_are_those_of_one_alone(tmp_path: Path) -> None:
    """Whatever other adapters put in the place of their modules: branches or trained copies."""
    for bias, targets in (("lora_only", ["0"]), ("all", ["1"])):
        lora = apply_lora(net(), LoraConfig(r=2, target_modules=targets, bias=bias, init_lora_weights=False), "biases")
        alone = list(adapter_state(lora, "biases"))
        lora.add_adapter("copy", LoraConfig(r=2, target_modules=["1"], modules_to_save=["0"]))
        lora.add_adapter("branch", LoraConfig(r=2, target_modules=["1"]))
        assert list(adapter_state(lora, "biases")) == alone
        base: Any = (
            lora.adapter_layers()["1"].base_layer if bias == "all" else lora.saved_modules()["0"].original_module
        )
        base = base_of(base)
        assert base.bias.requires_grad
        with torch.no_grad():
            base.bias.add_(1)
        expected = output(lora)
        lora.save_pretrained(tmp_path / bias, state_dict=lora.state_dict())
        assert torch.equal(output(LoraModel.from_pretrained(net(), tmp_path / bias / "biases")), expected)


def test_a_module_with_adapters_inside_is_not_copied_whole() -> None:
    """The copy would hold them too, and neither adapter could be told from its file."""
    model = nn.Sequential(Twice(), nn.Linear(4, 2))
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["0.first"]), "a")
    with pytest.raises(
        AdapterError, match=r"^0: expected a module without adapters inside.*'b', found \['a'\] at 0\.first;"
    ):
        lora.add_adapter("b", LoraConfig(r=2, target_modules=["1"], modules_to_save=["0"]))
    assert list(lora.adapter_layers()) == ["0.first"]
    assert not lora.saved_modules()


class Twice(nn.Module):
    """One module at two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.second, self.again = self.first, self.block

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.again(self.block(self.first(x))))


@pytest.mark.parametrize("place", ["first", "second"])
def test_an_adapter_at_one_of_a_module_s_places_comes_back_there(place: str, tmp_path: Path) -> None:
    lora = apply_lora(Twice(), LoraConfig(r=2, target_modules=[place], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(Twice(), tmp_path)
    assert list(loaded.adapter_layers()) == [place]
    assert torch.equal(output(loaded), output(lora))


def test_a_copy_at_one_of_a_module_s_places_is_merged_there_alone() -> None:
    lora = apply_lora(Twice(), LoraConfig(r=2, target_modules=["block.0"], modules_to_save=["first"]))
    with torch.no_grad():
        lora.saved_modules()["first"].modules_to_save["default"].weight.add_(1)
    expected = output(lora)
    merged: Any = merge(lora, into="same").model
    torch.testing.assert_close(output(merged), expected)
    assert merged.first is not merged.second


def test_a_whole_module_that_stands_at_two_places_is_not_tied_to_itself() -> None:
    lora = apply_lora(Twice(), LoraConfig(r=2, target_modules=["second"], modules_to_save=["again"]))
    assert list(lora.saved_modules()) == ["again"]


def test_trained_biases_of_a_module_at_two_places_come_back() -> None:
    model = Twice()
    before = output(model)
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["first"], bias="all"))
    with torch.no_grad():
        model.block[0].bias.add_(1)
    expected = output(lora)
    with lora.disable_adapter():
        assert torch.equal(output(lora), before)
    assert torch.equal(output(lora), expected)
