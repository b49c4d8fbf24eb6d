"""What the config says of tied tables after a merge in memory."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_llama import batch, llama
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from qlora_kit import LoraConfig, LoraModel, MergeError, apply_lora, merge
from qlora_kit.merging import in_memory

IDS = batch()["input_ids"]
SIZES = {"vocab_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 64}


def apart(model: nn.Module, head: str) -> nn.Module:
    """``model``, whose config says that tables are tied, with a table of its own for ``head``."""
    module = model.get_submodule(head)
    module.weight = nn.Parameter(module.weight.detach().clone())
    return model.eval()


def adapted(model: nn.Module, target: str) -> LoraModel:
    torch.manual_seed(1)
    return apply_lora(model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False)).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    decoder = {"decoder_input_ids": IDS} if isinstance(model, T5ForConditionalGeneration) else {}
    return model(input_ids=IDS, **decoder).logits


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("into", ["same", "bfloat16"])
def test_an_adapter_on_one_table_unties_the_config(tmp_path: Path, into: str, target: str) -> None:
    model = merge(adapted(apart(llama(tied=True), "lm_head"), target), into=into).model
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert not again.config.tie_word_embeddings
    assert torch.equal(logits(again), logits(model))


def test_a_trained_copy_of_the_head_unties_the_config() -> None:
    model = apart(llama(tied=True), "lm_head")
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        lora.lm_head.modules_to_save["default"].weight += 1
    assert not merge(lora).model.config.tie_word_embeddings


def test_equal_tables_stay_tied() -> None:
    """Two tensors of the same values are what a tied model may be loaded as."""
    assert merge(adapted(llama(tied=True), "q_proj")).model.config.tie_word_embeddings
    assert merge(adapted(apart(llama(tied=True), "lm_head"), "q_proj")).model.config.tie_word_embeddings


def test_a_part_of_the_config_says_so_too() -> None:
    text = {**SIZES, "model_type": "llama", "intermediate_size": 64, "tie_word_embeddings": True}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 16, "patch_size": 8}
    config = LlavaConfig(vision_config={"model_type": "clip_vision_model", **vision}, text_config=text)
    config.tie_word_embeddings = True
    model = apart(LlavaForConditionalGeneration(config), "lm_head")
    model = merge(adapted(model, "lm_head")).model
    assert not model.config.tie_word_embeddings
    assert not model.config.text_config.tie_word_embeddings


def bert() -> nn.Module:
    return apart(BertForMaskedLM(BertConfig(**SIZES, intermediate_size=64)), "cls.predictions.decoder")


def t5() -> nn.Module:
    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return apart(T5ForConditionalGeneration(T5Config(**sizes)), "lm_head")


@pytest.mark.parametrize(("make", "target"), [(bert, "word_embeddings"), (t5, "lm_head")])
def test_other_pairs_of_the_flag_are_loaded_as_they_are(tmp_path: Path, make: object, target: str) -> None:
    torch.manual_seed(0)
    model = make()  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 10
    model = merge(adapted(model, target)).model
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))


def test_after_an_error_it_says_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = adapted(apart(llama(tied=True), "lm_head"), "lm_head")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(in_memory, "attach_residual_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(lora)
    assert lora.model.config.tie_word_embeddings


@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_the_table_that_several_are_tied_to_is_changed_with_them_or_not_at_all(
    tmp_path: Path, ensured: bool, whole: bool
) -> None:
    """Of an encoder's, a decoder's and a head's that stay one, transformers stores one, and ties the rest anew."""
    sizes = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True)).eval()
    plain = logits(model)
    names = {"modules_to_save": ["shared"]} if whole else {"target_modules": ["q", "shared"]}
    config = LoraConfig(**{"r": 2, "target_modules": ["q"], **names}, ensure_weight_tying=ensured)
    with nullcontext() if ensured else pytest.warns(UserWarning, match="tied"):
        lora = apply_lora(model, config).eval()
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    if not ensured:
        with pytest.raises(MergeError, match=r"shared: .*parts it from .*ensure_weight_tying=True"):
            merge(lora)
        assert torch.equal(logits(lora.unload()), plain)
        return
    expected = logits(lora)
    merged = merge(lora).model
    merged.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    assert again.lm_head.weight is again.shared.weight
