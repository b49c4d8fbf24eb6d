"""Adapters may be called what torch's modules, the model's own or the parts of an adapter's file are called."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora_kit import AdapterError, LoraConfig, LoraModel, apply_lora
from qlora_kit.layers.named import NamedModules, NamedParameters

NAMES = (
    *("train", "eval", "keys", "values", "items", "pop", "get", "update", "clear", "copy", "type", "to", "forward"),
    *("parameters", "modules", "children", "state_dict", "append", "fromkeys", "dump_patches"),
    *("score", "lora_A", "weight", "base_layer", "modules_to_save", "original_module", "default"),
)
IDS = torch.arange(12).view(2, 6)


class Net(nn.Module):
    """A module of each family, and one to be trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.mix = nn.Conv1d(6, 6, 1)
        self.body = nn.Linear(8, 8)
        self.score = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(torch.tanh(self.body(self.mix(self.table(ids)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def config(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"target_modules": ["table", "mix", "body"], "modules_to_save": ["score"]}
    return LoraConfig(r=2, init_lora_weights=False, **{**settings, **changes})


def adapted(name: str) -> LoraModel:
    torch.manual_seed(1)
    lora = apply_lora(net(), config(), name)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return lora.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_life_of_an_adapter(name: str, tmp_path: Path) -> None:
    plain, lora = net(), adapted(name)
    expected = adapted("a")(IDS).detach()
    torch.testing.assert_close(lora(IDS), expected, rtol=0, atol=0)
    lora.train().zero_grad()
    lora(IDS).sum().backward()
    assert all(parameter.grad is not None for parameter in lora.parameters() if parameter.requires_grad)
    lora.eval()
    assert any(key.endswith(f"body.lora_A.{name}.weight") for key in lora.state_dict())
    for twin in (copy.deepcopy(lora), pickle.loads(pickle.dumps(lora)), copy.deepcopy(lora).double().float()):
        torch.testing.assert_close(twin(IDS), expected, rtol=0, atol=0)

    lora.save_pretrained(tmp_path)
    adapted("a").save_pretrained(tmp_path / "other", selected_adapters=["a"])
    folder = tmp_path if name == "default" else tmp_path / name
    found, usual = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "other" / "a"))
    assert found.keys() == usual.keys()
    beside = apply_lora(net(), config(), "beside").eval()
    beside.load_adapter(folder, name)
    beside.set_adapter(name)
    torch.testing.assert_close(beside(IDS), expected, rtol=0, atol=0)
    beside.load_state_dict(beside.state_dict())
    beside.merge_adapter()
    torch.testing.assert_close(beside(IDS), expected, rtol=1e-5, atol=1e-6)
    beside.unmerge_adapter()
    with beside.disable_adapter():
        torch.testing.assert_close(beside(IDS), plain(IDS), rtol=0, atol=0)
    beside.delete_adapter(name)
    assert name not in beside.peft_config
    for layer in beside.adapter_layers().values():
        for container in (*layer.factor_names, "lora_dropout"):
            assert [*getattr(layer, container).keys()] == ["beside"]
    assert [*beside.saved_modules()["score"].modules_to_save.keys()] == ["beside"]
    again = LoraModel.from_pretrained(net(), folder, name)
    torch.testing.assert_close(again.merge_and_unload()(IDS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["training", "_modules", "_keys", "_orig_mod"])
def test_names_that_torch_assigns_to_are_refused_before_anything_changes(name: str, tmp_path: Path) -> None:
    plain = net()
    before = dict(plain.named_modules())
    with pytest.raises(AdapterError, match=f"adapter name '{name}'.*choose another name"):
        apply_lora(plain, config(), name)
    adapted("a").save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="choose another name"):
        LoraModel.from_pretrained(plain, tmp_path / "a", name)
    assert dict(plain.named_modules()) == before


@pytest.mark.parametrize("name", ["train", "keys"])
def test_peft_reads_the_files(name: str, tmp_path: Path) -> None:
    lora = adapted(name)
    lora.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path / name))
    torch.testing.assert_close(theirs(IDS), lora(IDS), rtol=1e-5, atol=1e-6)


def test_attributes_stay_what_they_are() -> None:
    modules, parameters = NamedModules(), NamedParameters()
    for name in ("train", "keys", "type"):
        modules[name], parameters[name] = nn.Linear(1, 1), torch.ones(1)
    assert list(modules.keys()) == list(parameters.keys()) == ["train", "keys", "type"]
    assert modules.training is parameters.training is True
    assert modules.eval()["train"].training is False
    assert isinstance(parameters["keys"], nn.Parameter)
    assert [name for name, _ in parameters.named_parameters()] == [*parameters]
    del modules["train"], parameters["train"]
    assert "train" not in modules
    assert "train" not in parameters
    assert callable(modules.train)
    with pytest.raises(KeyError):
        parameters["train"]


def test_a_replica_of_data_parallel_finds_its_tensors() -> None:
    """``replicate`` empties the copy's table and sets plain tensors, which needs several devices to be seen at work."""
    parameters = NamedParameters()
    parameters["keys"] = torch.ones(1)
    replica = parameters._replicate_for_data_parallel()
    replica.__setattr__("keys", torch.zeros(1))
    assert (replica["keys"].item(), parameters["keys"].item()) == (0, 1)
