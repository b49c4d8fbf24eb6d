"""Bases beside the usual: resized embeddings, convolutions, codes stored as floats, mixed precisions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from disk_merges import assert_same, in_memory, llama, logits, on_disk, save_adapter, save_base, tensors
from safetensors.torch import save_file
from test_merge_ties import assert_close, is_tied, peft_adapter
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    ViTConfig,
    ViTForImageClassification,
)

from qlora_kit import LoraConfig, LoraModel, MergeError, apply_lora, merge

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("tied", "way"),
    [(False, "tables"), (True, "tables"), (True, "copies"), (True, "an adapted table")],
)
@pytest.mark.slow
def test_more_words(tied: bool, way: str, tmp_path: Path) -> None:
    """PEFT stores the tables of a base that was resized, or the copies of both that were trained."""
    base = save_base(llama(tied=tied), tmp_path / "base")
    (base / "tokenizer_config.json").write_text('{"words": "old"}')
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(101, mean_resizing=False)
    config = {"save_embedding_layers": True} if way != "copies" else {"modules_to_save": ["embed_tokens", "lm_head"]}
    targets = ["q_proj", "embed_tokens"] if way == "an adapted table" else ["q_proj"]
    adapted = peft_adapter(model, tmp_path / "adapter", targets, **config)
    (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"words": "new"}')
    on_disk(base, [tmp_path / "adapter"], tmp_path / "out", into="float32")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["vocab_size"] == 101
    assert is_tied(tmp_path / "out") == (tied and way == "tables")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"words": "new"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.get_input_embeddings().weight.shape == (101, 64)
    assert_close(logits(again), logits(adapted))


def test_more_words_in_one_of_two_tables(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(101, mean_resizing=False)
    peft_adapter(model, tmp_path / "adapter", ["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(MergeError, match=r"lm_head.weight: expected 101 rows, as an adapter has .* found 96 in"):
        on_disk(base, [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_tokenizer(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.mkdir()
    (words / "tokenizer.json").write_text("{}")
    (words / "chat_template.jinja").write_text("{{ messages }}")
    (words / "README.md").write_text("no tokenizer")
    on_disk(bases["bfloat16"], [adapter], tmp_path / "out", tokenizer=words)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja"} <= names
    assert "README.md" not in names


@pytest.mark.slow
def test_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4, target_modules=["projection", "q_proj"], modules_to_save=["classifier"], init_lora_weights=False
    )
    apply_lora(ViTForImageClassification.from_pretrained(tmp_path / "base"), config).save_pretrained(
        tmp_path / "adapter"
    )
    for into in ("bfloat16", "float32", "nf4"):
        report = on_disk(tmp_path / "base", [tmp_path / "adapter"], tmp_path / into, into=into)
        model = ViTForImageClassification.from_pretrained(tmp_path / "base")
        merged = merge(LoraModel.from_pretrained(model, tmp_path / "adapter"), into=into, force=True).model
        merged.save_pretrained(tmp_path / f"memory-{into}")
        assert_same(tensors(tmp_path / into), tensors(tmp_path / f"memory-{into}"))
        assert [row.codec for row in report.layers if "projection" in row.path] == ["conv"]
    found = tensors(tmp_path / "nf4")
    assert found["vit.embeddings.patch_embeddings.projection.weight"].shape == (32, 3, 4, 4)


@pytest.mark.parametrize("into", ["float32", "same"])
@pytest.mark.slow
def test_codes_that_are_stored_as_floats(into: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "base")
    assert tensors(tmp_path / "base")["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", ["up_proj", "q_proj"])
    on_disk(tmp_path / "base", [adapter], tmp_path / "out", into=into)
    in_memory(tmp_path / "base", [adapter], tmp_path / "memory", into=into)
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))


def test_several_dtypes_in_one_base(tmp_path: Path) -> None:
    """Norms and the head in float32 in a bfloat16 model: "same" keeps each, a dtype is for all."""
    model = llama().bfloat16()
    model.model.norm.float()
    model.model.layers[0].self_attn.q_proj.double()
    base = save_base_as_is(model, tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", ["q_proj"])
    on_disk(base, [adapter], tmp_path / "same", into="same")
    on_disk(base, [adapter], tmp_path / "half", into="float16")
    before, same, half = (tensors(folder) for folder in (base, tmp_path / "same", tmp_path / "half"))
    assert {name: t.dtype for name, t in same.items()} == {name: t.dtype for name, t in before.items()}
    assert {t.dtype for t in half.values()} == {torch.float16}


def save_base_as_is(model: object, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def test_names_of_an_older_release(tmp_path: Path) -> None:
    """BERT's norms were called gamma and beta once, and are loaded so still."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base, expected = tmp_path / "base", tmp_path / "expected"
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=64)).save_pretrained(base)
    adapted = peft_adapter(BertForMaskedLM.from_pretrained(base), tmp_path / "adapter", ["query", "word_embeddings"])
    on_disk(base, [tmp_path / "adapter"], expected, into="float32")
    file = base / "model.safetensors"
    old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    state = tensors(base)
    for new, ending in old.items():
        state = {name.replace(new, ending): tensor for name, tensor in state.items()}
    assert sum(name.endswith(".gamma") for name in state) == 4
    save_file(state, file, {"format": "pt"})
    report = on_disk(base, [tmp_path / "adapter"], tmp_path / "out", into="float32")
    assert report.untied == [["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"]]
    for folder in (expected, tmp_path / "out"):
        assert_close(logits(BertForMaskedLM.from_pretrained(folder)), logits(adapted))
