"""Which stored tensors are which of a model's, whatever the checkpoint calls them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.core_model_loading import revert_weight_conversion

from qlora_kit.checkpoints.stored_names import StoredNames, part_of, tied_names

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 8, "num_key_value_heads": 2}
PIXELS = {**SIZES, "image_size": 4, "patch_size": 2}
QUERY = "model.layers.0.self_attn.q_proj"


def llama(**settings: bool) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**TEXT, **settings))


def llava() -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config={**PIXELS, "model_type": "clip_vision_model"}
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def vit() -> ViTForImageClassification:
    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig(**PIXELS))


def bert() -> BertForMaskedLM:
    with torch.device("meta"):
        return BertForMaskedLM(BertConfig(**SIZES, vocab_size=8))


@pytest.mark.parametrize(("make", "renamed"), [(llama, False), (llava, True), (vit, True), (bert, False)])
def test_what_transformers_saves_is_found(make: Callable[[], PreTrainedModel], renamed: bool) -> None:
    model = make()
    state = model.state_dict()
    saved = revert_weight_conversion(model, dict(state))
    names = StoredNames(model, saved)
    assert not names.foreign
    assert not names.twice
    assert names.stored.keys() == set(state), "each name of the model has its stored one"
    assert len(set(names.stored.values())) == len(saved)
    assert any(name != stored for name, stored in names.stored.items()) == renamed
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            stored = names.weight_of(path)
            assert saved[stored].shape == module.weight.shape
            assert names.name_of(names.output_name(f"{path}.weight")) == f"{path}.weight"


@pytest.mark.parametrize("prefix", ["", "model.", "model.model."])
def test_with_and_without_the_backbone_s_prefix(prefix: str) -> None:
    stored = f"{prefix}layers.0.self_attn.q_proj.weight"
    names = StoredNames(llama(), [stored])
    assert names.stored == {f"{QUERY}.weight": stored}
    assert names.weight_of(QUERY) == names.weight_of(QUERY.removeprefix("model.")) == stored
    assert names.output_name(f"{QUERY}.weight") == f"{QUERY}.weight", "a prefix isn't kept"


def test_names_of_an_older_release() -> None:
    names = StoredNames(bert(), ["bert.embeddings.LayerNorm.gamma", "embeddings.LayerNorm.beta"])
    assert names.stored == {
        "bert.embeddings.LayerNorm.weight": "bert.embeddings.LayerNorm.gamma",
        "bert.embeddings.LayerNorm.bias": "embeddings.LayerNorm.beta",
    }


def test_the_model_s_own_name_is_the_best() -> None:
    own, short = f"{QUERY}.weight", f"{QUERY}.weight".removeprefix("model.")
    for order in ([own, short], [short, own]):
        names = StoredNames(llama(), order)
        assert names.stored == {own: own}
        assert names.twice == {short: own}
        assert not names.foreign


def test_a_shared_module_has_one_name_and_tied_parameters_have_two() -> None:
    model = llama(tie_word_embeddings=True)
    model.twin = model.model.layers[0].mlp
    names = StoredNames(model, [])
    assert names.first["twin.up_proj"] == "model.layers.0.mlp.up_proj"
    assert (
        names.known["twin.up_proj.weight"]
        == names.name_of("twin.up_proj.weight")
        == "model.layers.0.mlp.up_proj.weight"
    )
    assert names.path_of("twin.up_proj") == "model.layers.0.mlp.up_proj"
    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    assert names.ties() == [tables]
    assert tied_names(model)["lm_head.weight"] == tables[0]
    assert StoredNames(model, tables).stored == dict(zip(tables, tables, strict=True))


def test_parts_of_a_quantized_weight_are_gathered() -> None:
    stored = [f"{QUERY}.{part}" for part in ("weight", "weight.absmax", "weight.quant_map")]
    names = StoredNames(llama(), stored, quantized=True)
    parts = {"weight": stored[0], "weight.absmax": stored[1], "weight.quant_map": stored[2]}
    assert names.parts == {stored[0]: parts}
    assert not names.foreign
    assert StoredNames(llama(), stored).foreign == stored[1:], "only where a model is quantized"
    stray = [*stored, "model.layers.7.mlp.up_proj.scales", f"{QUERY}.weight_scale_inv"]
    assert StoredNames(llama(), stray, quantized=True).foreign == stray[3:]
    assert [part_of(name) for name in stray] == ["", "weight.absmax", "weight.quant_map", "scales", ""]


def test_what_a_model_has_no_name_for_is_left_over() -> None:
    names = StoredNames(llama(), ["model.layers.1.mlp.up_proj.weight", "model.rotary_emb.inv_freq", "lm_head.weight"])
    assert names.foreign == ["model.layers.1.mlp.up_proj.weight", "model.rotary_emb.inv_freq"]
    assert names.path_of("model.layers.1") is None
    assert names.name_of("model.layers.1.mlp.up_proj.weight") is None
    assert names.weight_of(QUERY) is None, "it isn't stored"
