"""What of the base is trained by the caller's own choice stays so, whatever happens to adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_llama import llama
from torch import nn

from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))


def config(**fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["0"], "init_lora_weights": False, **fields})  # type: ignore[arg-type]


def disable(lora: LoraModel, folder: Path) -> None:
    with lora.disable_adapter():
        assert {name for name, p in lora.named_parameters() if p.requires_grad} == {"model.1.weight"}


def load(lora: LoraModel, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the norm stays behind
        lora.save_pretrained(folder)
    lora.load_adapter(folder, "other")


def come_and_go(lora: LoraModel, folder: Path) -> None:
    lora.add_adapter("other", config())
    lora.set_adapter("other")
    lora.delete_adapter("other")
    lora.set_adapter("default")


def merge_and_back(lora: LoraModel, folder: Path) -> None:
    lora.merge_adapter()
    lora.unmerge_adapter()


EVENTS: dict[str, Callable[[LoraModel, Path], None]] = {
    "disable": disable,
    "set": lambda lora, folder: lora.set_adapter("default"),
    "add": lambda lora, folder: lora.add_adapter("other", config(modules_to_save=["2"])) and None,  # type: ignore[func-returns-value]
    "load": load,
    "combine": lambda lora, folder: lora.add_weighted_adapter(["default"], [1.0], "sum") and None,  # type: ignore[func-returns-value]
    "delete": come_and_go,
    "merge": merge_and_back,
}


@pytest.mark.parametrize("event", EVENTS)
def test_a_norm_trained_by_choice_goes_on_being_trained(event: str, tmp_path: Path) -> None:
    lora = apply_lora(net(), config())
    lora.model[1].weight.requires_grad_(True)
    before = {name for name, p in lora.named_parameters() if p.requires_grad}
    EVENTS[event](lora, tmp_path)
    now = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert now == before == {"model.1.weight", "model.0.lora_A.default.weight", "model.0.lora_B.default.weight"}


def test_a_factor_frozen_by_choice_stays_frozen_while_others_come(tmp_path: Path) -> None:
    lora = apply_lora(net(), config())
    lora.model[0].lora_A["default"].weight.requires_grad_(False)
    EVENTS["add"](lora, tmp_path)
    lora.save_pretrained(tmp_path, selected_adapters=["default"])
    lora.load_adapter(tmp_path, "third")
    assert [name for name, p in lora.named_parameters() if p.requires_grad] == ["model.0.lora_B.default.weight"]
    lora.set_adapter("default")
    assert lora.model[0].lora_A["default"].weight.requires_grad


def test_the_first_adapter_freezes_the_base_and_its_leaving_frees_it() -> None:
    model = net()
    model[2].weight.requires_grad_(False)
    lora = apply_lora(model, config())
    assert [name for name, p in lora.named_parameters() if p.requires_grad and "lora_" not in name] == []
    lora.delete_adapter("default")
    lora.add_adapter("again", config())
    assert [name for name, p in lora.named_parameters() if p.requires_grad] == []
    back = lora.unload()
    assert [name for name, p in back.named_parameters() if not p.requires_grad] == ["2.weight"]


def test_biases_are_trained_while_their_adapter_is_and_only_then() -> None:
    lora = apply_lora(net(), config(bias="all"))
    biases = {"model.0.base_layer.bias", "model.1.bias", "model.2.bias"}

    def trained() -> set[str]:
        return {name for name, p in lora.named_parameters() if p.requires_grad and name.endswith("bias")}

    assert trained() == biases
    lora.add_adapter("other", config())
    lora.set_adapter("other")
    assert trained() == set()
    lora.set_adapter("default")
    assert trained() == biases
    with lora.disable_adapter():
        assert trained() == set()
    lora.delete_adapter("default")
    assert trained() == set()


def test_a_base_that_a_start_makes_is_frozen() -> None:
    lora = apply_lora(net(), config())
    second = LoraConfig(
        r=2, target_modules=["2"], init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=2, method="loftq")
    )
    lora.add_adapter("second", second)
    assert [name for name, p in lora.named_parameters() if p.requires_grad] == [
        "model.0.lora_A.default.weight",
        "model.0.lora_B.default.weight",
    ]


def test_saving_says_what_no_adapters_file_holds(tmp_path: Path) -> None:
    lora = apply_lora(net(), config(bias="lora_only", modules_to_save=["2"]))
    lora.save_pretrained(tmp_path)  # biases and copies are held
    lora.model[1].weight.requires_grad_(True)
    lora.model[0].base_layer.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"2 parameters of the base model are trained, 0\.base_layer\.weight for one"):
        lora.save_pretrained(tmp_path)


def test_a_table_of_words_that_goes_along_is_held(tmp_path: Path) -> None:
    lora = apply_lora(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.model.get_input_embeddings().weight.requires_grad_(True)
    lora.save_pretrained(tmp_path / "held", save_embedding_layers=True)
    with pytest.warns(UserWarning, match=r"1 parameters of the base model are trained, model\.embed_tokens\.weight"):
        lora.save_pretrained(tmp_path / "left", save_embedding_layers=False)
