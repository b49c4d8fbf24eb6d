"""``megatron_config`` and ``megatron_core``: not needed, checked where they are given, passed over where they are
stored and can't be."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora_kit import LoraConfig, LoraModel, apply_lora
from qlora_kit.adapter_files.folder import WEIGHTS_NAME
from qlora_kit.config.lora import CONFIG_NAME
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.layers.sharded.megatron.linear import MegatronLinear


@dataclass
class TransformerConfig:
    """Of a library that is a fork of megatron-core, called ``pretend.core``."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int = 4
    num_query_groups: int = 4
    ffn_hidden_size: int = 64
    kv_channels: int = 8
    gated_linear_unit: bool = False
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        assert self.hidden_size // self.num_attention_heads  # divides without asking, as megatron-core does


class _Group:
    def __init__(self, size: int = 1) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


class ColumnParallelLinear(nn.Module):
    """The fork's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config, self.tp_group = config, _Group()
        self.input_size = self.output_size = config.hidden_size
        self.weight, self.bias = nn.Parameter(torch.eye(config.hidden_size)), None
        self.sequence_parallel = self.gather_output = self.is_expert = False

    def forward(self, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
        return F.linear(x, self.weight if weight is None else weight), None


ColumnParallelLinear.__module__ = "pretend.core.tensor_parallel.layers"


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.config = TransformerConfig(layers, 8)
        self.linear = ColumnParallelLinear(self.config)

    def forward(self, x: Tensor, *, hands_over: bool = False) -> Any:
        return self.linear(x, weight=self.linear.weight)[0] if hands_over else self.linear(x)[0]


@pytest.fixture
def fork(monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("pretend", "pretend.core", "pretend.core.transformer", "pretend.core.transformer.transformer_config"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["pretend.core.transformer.transformer_config"].TransformerConfig = TransformerConfig  # type: ignore[attr-defined]
    return "pretend.core"


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False, **fields)


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("megatron", "megatron.core", "megatron.core.transformer.transformer_config"):
        monkeypatch.setitem(sys.modules, name, None)
    model = nn.Sequential(nn.Linear(4, 4))
    apply_lora(
        nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"], megatron_config={})
    )  # says nothing
    with pytest.raises(ConfigError, match=r"megatron_config.*'megatron\.core'.*pip install 'qlora-kit\[megatron\]'"):
        apply_lora(model, LoraConfig(r=2, target_modules=["0"], megatron_config={"num_layers": 2}))
    assert type(model[0]) is nn.Linear
    apply_lora(model, LoraConfig(r=2, target_modules=["0"]))  # the default name alone asks for nothing


def _stored(folder: Path, arguments: dict[str, Any], core: str = "megatron.core") -> dict[str, Tensor]:
    """An adapter of a plain model, whose file has a ``megatron_config``; its tensors."""
    lora = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    lora.save_pretrained(folder)
    fields = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**fields, "megatron_config": arguments, "megatron_core": core}))
    return load_file(folder / WEIGHTS_NAME)


@pytest.mark.parametrize("loaded_by", ["from_pretrained", "load_adapter"])
def test_a_stored_adapter_needs_no_library_that_its_layers_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded_by: str
) -> None:
    for name in ("megatron", "megatron.core", "megatron.core.transformer.transformer_config"):
        monkeypatch.setitem(sys.modules, name, None)
    told = {"num_layers": 2, "hidden_size": 8}
    tensors = _stored(tmp_path / "a", told)
    model: Any = nn.Sequential(nn.Linear(4, 4))
    said = pytest.warns(UserWarning, match=r"stored.*passed over.*megatron_config.*'megatron\.core'")
    if loaded_by == "from_pretrained":
        with said:
            lora = LoraModel.from_pretrained(model, tmp_path / "a")
        name = "default"
    else:
        lora, name = apply_lora(model, LoraConfig(r=2, target_modules=["0"])), "b"
        with said:
            lora.load_adapter(tmp_path / "a", name)
    assert lora.peft_config[name].megatron_config == told
    lora.save_pretrained(tmp_path / "again", selected_adapters=[name])
    where = tmp_path / "again" / ("" if name == "default" else name)
    again = load_file(where / WEIGHTS_NAME)
    assert again.keys() == tensors.keys()
    for key, tensor in again.items():
        torch.testing.assert_close(tensor, tensors[key], rtol=0, atol=0)
    assert json.loads((where / CONFIG_NAME).read_text())["megatron_config"] == told


def test_a_stored_adapter_of_the_model_is_loaded_without_a_word_and_of_another_with_one(
    fork: str, tmp_path: Path
) -> None:
    arguments = {"num_layers": 2, "hidden_size": 8}
    lora = apply_lora(Model(), config(megatron_core=fork, megatron_config=arguments))
    lora.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(Model(), tmp_path)
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(again(x), lora.eval()(x))
    with pytest.warns(UserWarning, match="passed over.*whose num_layers is 3, found 2"):
        deeper = LoraModel.from_pretrained(Model(layers=3), tmp_path)
    torch.testing.assert_close(deeper(x), lora(x))


def test_a_fork_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'not_there\.core'.*install not_there\.core"):
        apply_lora(Model(), config(megatron_core="not_there.core", megatron_config={"num_layers": 2}))


def test_the_types_of_a_fork_are_known_by_its_name(fork: str) -> None:
    lora = apply_lora(Model(), config(megatron_core=fork))
    assert isinstance(lora.model.linear, MegatronLinear)
    x = torch.randn(3, 2, 8)
    A, B = lora.model.linear.factors("default")
    torch.testing.assert_close(lora(x), x + x @ (lora.model.linear.scaling["default"] * B @ A).T)


def test_a_layer_that_is_handed_its_own_weight_counts_its_branch_once(fork: str) -> None:
    lora = apply_lora(Model(), config(megatron_core=fork))
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(lora(x, hands_over=True), lora(x))


def test_arguments_of_the_model_are_taken(fork: str) -> None:
    told = {"num_layers": 2, "hidden_size": 8, "sequence_parallel": True}
    lora = apply_lora(Model(), config(megatron_core=fork, megatron_config=told))
    assert lora.peft_config["default"].megatron_config == told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_layers": 3, "hidden_size": 8}, r"whose num_layers is 2, found 3"),
        ({"num_layers": 2, "hidden_sise": 8}, r"nearest to 'hidden_sise': \['hidden_size'"),
        ({"num_layers": 2, "hidden_size": 8, "num_attention_heads": 0}, r"found others \(.*by zero"),
        ({"num_layers": 2}, r"expected arguments of pretend\.core's TransformerConfig, found others \(.*hidden_size"),
    ],
)
def test_other_arguments_are_refused(fork: str, arguments: dict[str, Any], said: str) -> None:
    model = Model()
    before = model.linear
    with pytest.raises(ConfigError, match=said):
        apply_lora(model, config(megatron_core=fork, megatron_config=arguments))
    assert model.linear is before


def test_layers_whose_sums_are_others_work_are_refused(fork: str) -> None:
    for attribute, said in (
        ("is_expert", "expert_tensor_parallel_size=1"),
        ("disable_grad_reduce", "build it without"),
    ):
        model = Model()
        model.linear.tp_group = _Group(2)
        setattr(model.linear, attribute, True)
        with pytest.raises(AdapterError, match=said):
            apply_lora(model, config(megatron_core=fork))
