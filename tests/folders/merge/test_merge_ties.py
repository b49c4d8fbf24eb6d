"""Tied parameters, trained copies, tables and heads: the merged model computes what PEFT's adapted one does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from disk_merges import gpt2, llama, logits, on_disk, save_adapter, save_base, tensors
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qlora_kit import MergeError, StorageError

# float32 sums in another order.
RELATIVE = 1e-5
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def peft_adapter(model: nn.Module, folder: Path, targets: list[str], **config: Any) -> Any:
    """PEFT's model, with an adapter that has learned something, saved; ``modules_to_save`` are changed too."""
    torch.manual_seed(3)
    save = {"save_embedding_layers": config.pop("save_embedding_layers", False)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of tied modules
        made = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **config)
        )
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
                elif "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        made.save_pretrained(folder, **save)
    return made.eval()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return save_base(llama(tied=True), tmp_path / "base")


def is_tied(folder: Path) -> bool:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert (
        json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
        == tied
        == model.config.tie_word_embeddings
    )
    return tied


def test_what_doesn_t_change_stays_tied(tied: Path, tmp_path: Path) -> None:
    adapted = peft_adapter(AutoModelForCausalLM.from_pretrained(tied), tmp_path / "adapter", ["q_proj", "down_proj"])
    report = on_disk(tied, [tmp_path / "adapter"], tmp_path / "out", into="float32")
    assert HEAD not in tensors(tmp_path / "out")
    assert report.untied == []
    assert is_tied(tmp_path / "out")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(adapted))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "v_proj"]])
@pytest.mark.slow
def test_an_adapter_on_one_of_two_tied_unties_them(targets: list[str], tied: Path, tmp_path: Path) -> None:
    adapted = peft_adapter(AutoModelForCausalLM.from_pretrained(tied), tmp_path / "adapter", targets)
    report = on_disk(tied, [tmp_path / "adapter"], tmp_path / "out", into="float32")
    assert not is_tied(tmp_path / "out")
    assert report.untied == [[EMBEDDING, HEAD]]
    assert "no longer tied: model.embed_tokens.weight and lm_head.weight" in str(report)
    assert [row.path for row in report.layers if "layers" not in row.path] == sorted(
        {"embed_tokens": "model.embed_tokens"}.get(t, t) for t in targets if t != "v_proj"
    )
    before, after = tensors(tied), tensors(tmp_path / "out")
    if targets[0] != "lm_head":
        assert torch.equal(after[HEAD], before[EMBEDDING]) == (len(targets) == 1)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(adapted))


def test_a_head_that_is_quantized_when_untied(tied: Path, tmp_path: Path) -> None:
    peft_adapter(AutoModelForCausalLM.from_pretrained(tied), tmp_path / "adapter", ["lm_head"])
    on_disk(tied, [tmp_path / "adapter"], tmp_path / "out", into="nf4")
    assert not is_tied(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.lm_head).__name__ == "Linear4bit"
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear"
    assert torch.equal(model.model.embed_tokens.weight, tensors(tied)[EMBEDDING])


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "nf4"])
def test_a_copy_of_one_of_two_tied_unties_them(storage: str, tmp_path: Path) -> None:
    base = save_base(llama(tied=True), tmp_path / "base", storage)
    adapted = peft_adapter(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", ["q_proj"], modules_to_save=["embed_tokens"]
    )
    on_disk(base, [tmp_path / "adapter"], tmp_path / "out", into="float32")
    assert not is_tied(tmp_path / "out")
    after = tensors(tmp_path / "out")
    copies = adapted.base_model.model.model.embed_tokens
    assert torch.equal(after[EMBEDDING], copies.modules_to_save["default"].weight)
    assert torch.equal(after[HEAD], copies.original_module.weight)


def test_equal_copies_of_both_stay_tied(tied: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tied, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    table = torch.randn(96, 64)
    keys = {f"base_model.model.{name}": table.clone() for name in (EMBEDDING, HEAD)}
    save_file({**load_file(file), **keys}, file, {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["embed_tokens", "lm_head"]}))
    report = on_disk(tied, [adapter], tmp_path / "out", into="bfloat16")
    assert is_tied(tmp_path / "out")
    assert report.replaced == [EMBEDDING]
    assert torch.equal(tensors(tmp_path / "out")[EMBEDDING], table.bfloat16())


def test_a_stored_table_is_the_base_s_own(tied: Path, tmp_path: Path) -> None:
    """PEFT stores a table that was changed in the base along with the adapter; both tied names are that table."""
    model = AutoModelForCausalLM.from_pretrained(tied)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] += 1
    adapted = peft_adapter(model, tmp_path / "adapter", ["q_proj"], save_embedding_layers=True)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert f"base_model.model.{EMBEDDING}" in keys
    report = on_disk(tied, [tmp_path / "adapter"], tmp_path / "out", into="float32", weights=[1.0])
    assert is_tied(tmp_path / "out")
    assert report.replaced == [EMBEDDING]
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(adapted))


def test_two_that_are_stored_apart_are_merged_apart(tied: Path, tmp_path: Path) -> None:
    """A config may say that they are tied where the checkpoint has two different tensors; these count."""
    file = tied / "model.safetensors"
    save_file({**load_file(file), HEAD: torch.randn(96, 64)}, file, {"format": "pt"})
    adapted = peft_adapter(AutoModelForCausalLM.from_pretrained(tied), tmp_path / "adapter", ["embed_tokens"])
    on_disk(tied, [tmp_path / "adapter"], tmp_path / "out", into="float32")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(adapted))


def test_trained_biases_of_a_tied_model(tmp_path: Path) -> None:
    base = save_base(gpt2(), tmp_path / "base")
    adapted = peft_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", ["c_attn"], bias="all")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    report = on_disk(base, [tmp_path / "adapter"], tmp_path / "out", into="float32")
    assert len(report.replaced) == 2 * 6 + 1
    assert is_tied(tmp_path / "out")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(adapted))


def test_an_encoder_and_decoder_can_t_be_untied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 1, "vocab_size": 64}
    base = tmp_path / "base"
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(base)
    model = T5ForConditionalGeneration.from_pretrained(base)
    peft_adapter(model, tmp_path / "tied", ["lm_head"])
    with pytest.raises(MergeError, match=r"shared.weight: expected an adapter that leaves the tied .*lm_head.weight"):
        on_disk(base, [tmp_path / "tied"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    peft_adapter(T5ForConditionalGeneration.from_pretrained(base), tmp_path / "adapter", ["q", "wo"])
    on_disk(base, [tmp_path / "adapter"], tmp_path / "out", into="nf4")
    merged = T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    block = merged.decoder.block[0]
    assert type(block.layer[0].SelfAttention.q).__name__ == "Linear4bit"
    assert type(block.layer[2].DenseReluDense.wo).__name__ == "Linear", "T5 computes in the dtype of this weight"
    assert merged.lm_head.weight is merged.shared.weight


def test_a_classifier_trained_on_a_language_model(tied: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tied, num_labels=3)
    model.config.pad_token_id = 0
    adapted = peft_adapter(model, tmp_path / "adapter", ["q_proj"], task_type="SEQ_CLS")
    report = on_disk(tied, [tmp_path / "adapter"], tmp_path / "out", into="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert report.replaced == ["score.weight"]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_close(logits(again), logits(adapted))


def test_a_classifier_on_a_masked_language_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = tmp_path / "base"
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=64)).save_pretrained(base)
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=5)
    adapted = peft_adapter(model, tmp_path / "adapter", ["query"], task_type="TOKEN_CLS")
    on_disk(base, [tmp_path / "adapter"], tmp_path / "out", into="float32")
    assert not [name for name in tensors(tmp_path / "out") if name.startswith("cls.")], "the other head is left out"
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert_close(logits(again), logits(adapted))


def test_untying_keeps_what_the_same_flag_tied(tmp_path: Path) -> None:
    """BERT's decoder has its weight from the table of words and its bias from the head above, by one flag."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, base = BertForMaskedLM(BertConfig(**sizes, intermediate_size=64)), tmp_path / "base"
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    model.save_pretrained(base)
    adapted = peft_adapter(BertForMaskedLM.from_pretrained(base), tmp_path / "adapter", ["cls.predictions.decoder"])
    on_disk(base, [tmp_path / "adapter"], tmp_path / "out", into="float32")
    again = BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.cls.predictions.decoder.bias, model.cls.predictions.bias)
    assert_close(logits(again), logits(adapted))


def test_a_head_that_no_class_has_is_named(tied: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tied, num_labels=3)
    peft_adapter(model, tmp_path / "adapter", ["q_proj"], modules_to_save=["score"])
    with pytest.raises(StorageError, match=r"found 1 that don't: \['base_model.model.score.weight'\]"):
        on_disk(tied, [tmp_path / "adapter"], tmp_path / "out")
