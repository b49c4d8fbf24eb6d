"""One adapter's branch and another's trained copy on the same module: each is what it would be alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlora_kit import AdapterError, LoraConfig, LoraModel, apply_lora, merge

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
    return model(X)


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
