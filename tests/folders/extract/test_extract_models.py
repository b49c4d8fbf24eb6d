"""Extraction from models with peculiarities: heads, ties, biases, convolutions, experts, quantized bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from tuned_models import assert_reproduces, branches, differences, inputs, low_rank, noise, pair, tensors, tune_

from qlora_kit import LoraConfig, LoraModel, StorageError, TargetError, codec_for, quantize_
from qlora_kit.folders.extract.run import extract_folders
from qlora_kit.hf_quantizer import record_quantization_

EXACT = 1e-5


def loader(kind: Any, folder: Path, **options: Any) -> Any:
    return lambda: kind.from_pretrained(folder, **options)


def gpt2() -> GPT2LMHeadModel:
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0))


def bert_config() -> BertConfig:
    sizes = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(**sizes, intermediate_size=40, max_position_embeddings=32, num_labels=3)


# -- whole modules and biases ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("names", [["norm", "lm_head"], "changed"])
def test_changed_modules_may_be_stored_whole(names: Any, tmp_path: Path) -> None:
    model = llama()
    base, tuned = pair(model, tmp_path, low_rank(2, only="proj"), noise(0.1, only=("model.norm", "lm_head")))
    left = extract_folders(base, tuned, tmp_path / "left", 2)
    assert [(t.name, t.stored) for t in left.others] == [("lm_head.weight", "left"), ("model.norm.weight", "left")]
    report = extract_folders(base, tuned, tmp_path / "out", 2, whole=names)
    assert [(t.name, t.stored) for t in report.others] == [("lm_head.weight", "whole"), ("model.norm.weight", "whole")]
    assert left.captured + left.left == pytest.approx(1)
    assert (report.left, report.captured) == (0, pytest.approx(1))
    assert "stored whole" in str(report)
    assert_reproduces(loader(LlamaForCausalLM, base), tmp_path / "out", model, inputs())
    # peft compares plain ends of names: "norm" alone would take all of the layers' norms too.
    saved = LoraConfig.from_pretrained(tmp_path / "out").modules_to_save
    assert saved == ["lm_head", "model.norm"]


def test_every_tensor_of_gpt2_changed(tmp_path: Path) -> None:
    """Conv1D layers, biases in all of them, norms, a position table, and a token table that is tied to the head."""
    model = gpt2()
    parts = ("c_attn", "c_proj", "c_fc", "bias", "ln_", "wpe")
    base, tuned = pair(model, tmp_path, noise(0.05, only=parts))
    report = extract_folders(base, tuned, tmp_path / "out", 24, whole="changed")
    config = LoraConfig.from_pretrained(tmp_path / "out")
    assert (config.bias, config.fan_in_fan_out, config.task_type) == ("lora_only", True, "CAUSAL_LM")
    assert {t.stored for t in report.others if t.name.endswith(("c_fc.bias", "c_attn.bias"))} == {"bias"}
    assert {t.stored for t in report.others if ".ln_" in t.name or "wpe" in t.name} == {"whole"}
    assert report.captured == pytest.approx(1)
    exact, found = differences(base, tuned), branches(tmp_path / "out")
    assert len(found) == 8
    for path, delta in found.items():
        assert np.linalg.norm(delta.T - exact[f"{path}.weight"]) < EXACT * np.linalg.norm(delta)
    assert_reproduces(loader(GPT2LMHeadModel, base), tmp_path / "out", model, inputs())


def test_biases_of_modules_without_a_branch(tmp_path: Path) -> None:
    model = gpt2()
    base, tuned = pair(model, tmp_path, low_rank(2, only="c_attn"), noise(0.05, only=("mlp.c_fc.bias", "ln_1.bias")))
    report = extract_folders(base, tuned, tmp_path / "out", 2, whole="changed")
    assert LoraConfig.from_pretrained(tmp_path / "out").bias == "all"
    assert {t.stored for t in report.others} == {"bias"}
    assert report.captured == pytest.approx(1)
    assert_reproduces(loader(GPT2LMHeadModel, base), tmp_path / "out", model, inputs())


@pytest.mark.slow
def test_embeddings_and_a_resized_vocabulary(tmp_path: Path) -> None:
    model = llama()
    base, tuned = pair(model, tmp_path, low_rank(2))
    extract_folders(base, tuned, tmp_path / "tables", 2, target_modules=["embed_tokens", "lm_head", "q_proj"])
    exact, found = differences(base, tuned), branches(tmp_path / "tables")
    table = exact["model.embed_tokens.weight"]
    assert np.linalg.norm(found["model.embed_tokens"].T - table) < EXACT * np.linalg.norm(table)

    model.resize_token_embeddings(136)
    model.save_pretrained(tuned)
    with pytest.raises(StorageError, match=r"lm_head.weight: expected the base's shape \(128, 64\), found \(136, 64\)"):
        extract_folders(base, tuned, tmp_path / "none", 2)
    assert not (tmp_path / "none").exists()
    report = extract_folders(base, tuned, tmp_path / "out", 2, whole=["embed_tokens", "lm_head"])
    assert [(t.name, t.size, t.stored) for t in report.others] == [
        ("lm_head.weight", None, "whole"),
        ("model.embed_tokens.weight", None, "whole"),
    ]
    assert "not in the base in this shape" in str(report)

    def resized() -> nn.Module:
        again = LlamaForCausalLM.from_pretrained(base)
        again.resize_token_embeddings(136)
        return again

    assert_reproduces(resized, tmp_path / "out", model, inputs())


@pytest.mark.slow
def test_tied_weights_count_once(tmp_path: Path) -> None:
    model = llama(tied=True)
    base, tuned = pair(model, tmp_path, low_rank(2))
    report = extract_folders(base, tuned, tmp_path / "out", 2)
    assert [(t.name, t.stored) for t in report.others] == [("model.embed_tokens.weight", "left")]
    with pytest.raises(TargetError, match="tied"):
        extract_folders(base, tuned, tmp_path / "none", 2, target_modules=["embed_tokens"])
    for number, whole in enumerate(("changed", ["lm_head"], ["embed_tokens"])):
        found = extract_folders(base, tuned, tmp_path / f"whole{number}", 2, whole=whole)
        assert [(t.name, t.stored) for t in found.others] == [("model.embed_tokens.weight", "whole")]
        assert LoraConfig.from_pretrained(tmp_path / f"whole{number}").ensure_weight_tying
        assert_reproduces(loader(LlamaForCausalLM, base), tmp_path / f"whole{number}", model, inputs())
    # An old file may hold both names of the one tensor.
    state = load_file(tuned / "model.safetensors")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, tuned / "model.safetensors")
    assert extract_folders(base, tuned, tmp_path / "third", 2) == report
    untied = llama()
    untied.save_pretrained(tmp_path / "untied")
    with pytest.raises(
        StorageError, match=r"lm_head.weight: expected the same tied weights in both, found it tied to "
    ):
        extract_folders(base, tmp_path / "untied", tmp_path / "none", 2)


def test_t5_shares_its_table_thrice(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    base, tuned = pair(model, tmp_path, low_rank(2))
    report = extract_folders(base, tuned, tmp_path / "out", 2)
    assert sum("shared" in t.name or "embed_tokens" in t.name for t in report.others) == 1
    assert LoraConfig.from_pretrained(tmp_path / "out").task_type == "SEQ_2_SEQ_LM"
    again = LoraModel.from_pretrained(T5ForConditionalGeneration.from_pretrained(base), tmp_path / "out")
    assert set(again.adapter_layers()) == {row.path for row in report.modules}


# -- heads -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_without_its_head(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    model.model.save_pretrained(tmp_path / "base_backbone")
    tune_(model, low_rank(2, only="proj"))
    model.save_pretrained(tmp_path / "tuned")
    model.model.save_pretrained(tmp_path / "tuned_backbone")
    assert not any(name.startswith("model.") for name in tensors(tmp_path / "tuned_backbone"))
    whole = extract_folders(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 2)
    report = extract_folders(tmp_path / "base", tmp_path / "tuned_backbone", tmp_path / "other", 2)
    assert (report.modules, report.only_base) == (whole.modules, ("lm_head.weight",))
    assert "of the base's own class (a head), which the tuned model hasn't: lm_head.weight" in str(report)
    assert_reproduces(loader(LlamaForCausalLM, tmp_path / "base"), tmp_path / "other", model, inputs())
    with pytest.raises(StorageError, match=r"lm_head.weight: .*found it in .*tuned alone.*whole=\['lm_head'\]"):
        extract_folders(tmp_path / "base_backbone", tmp_path / "tuned", tmp_path / "none", 2)
    extract_folders(tmp_path / "base_backbone", tmp_path / "tuned", tmp_path / "headed", 2, whole="changed")
    assert LoraConfig.from_pretrained(tmp_path / "headed").modules_to_save == ["lm_head"]
    both = extract_folders(tmp_path / "base_backbone", tmp_path / "tuned_backbone", tmp_path / "neither", 2)
    assert {f"model.{row.path}" for row in both.modules} == {row.path for row in whole.modules}
    again = LoraModel.from_pretrained(LlamaModel.from_pretrained(tmp_path / "base_backbone"), tmp_path / "neither")
    torch.testing.assert_close(again(**inputs())[0], model.model(**inputs())[0], rtol=0, atol=EXACT)


@pytest.mark.slow
def test_a_classifier_tuned_from_a_masked_model(tmp_path: Path) -> None:
    """The base's own head is left behind, the new one comes along; names of BERT's first release are understood."""
    torch.manual_seed(0)
    BertForMaskedLM(bert_config()).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    state = load_file(tmp_path / "base" / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    }
    save_file(old, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    tune_(model, low_rank(2, only="encoder"), noise(0.1, only=("bias", "LayerNorm")))
    model.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "out"
    with pytest.raises(StorageError, match=r"store it whole \(whole=\['bert.pooler.dense'\]"):
        extract_folders(tmp_path / "base", tmp_path / "tuned", out, 2)
    report = extract_folders(tmp_path / "base", tmp_path / "tuned", out, 2, whole="changed")
    assert any("cls.predictions" in name for name in report.only_base)
    config = LoraConfig.from_pretrained(out)
    assert config.task_type == "SEQ_CLS"
    assert {"classifier", "pooler.dense"} <= {".".join(n.split(".")[-2:]) for n in config.modules_to_save or ()}
    assert report.captured == pytest.approx(1)

    def start() -> nn.Module:
        return BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)

    assert_reproduces(start, out, model, inputs())


def test_a_convolution(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2))
    base, tuned = pair(model, tmp_path, low_rank(2, only="projection"))
    report = extract_folders(base, tuned, tmp_path / "out", 2, target_modules=["projection"])
    assert [row.path for row in report.modules] == ["vit.embeddings.patch_embeddings.projection"]
    assert report.captured == pytest.approx(1)
    state = tensors(tmp_path / "out")
    assert sorted(tuple(t.shape) for t in state.values()) == [(2, 3, 4, 4), (16, 2, 1, 1)]
    images = {"pixel_values": torch.randn(2, 3, 8, 8)}
    assert_reproduces(loader(ViTForImageClassification, base), tmp_path / "out", model, images)


def test_parameters_of_a_module_that_holds_others(tmp_path: Path) -> None:
    """The class token is a parameter of the module around the convolution, which is then stored whole."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2))
    base, tuned = pair(model, tmp_path, low_rank(2, only="layer"), noise(0.1, only=("cls_token", "projection")))
    report = extract_folders(base, tuned, tmp_path / "out", 2, whole="changed")
    assert LoraConfig.from_pretrained(tmp_path / "out").modules_to_save == ["vit.embeddings"]
    assert report.captured == pytest.approx(1)
    images = {"pixel_values": torch.randn(2, 3, 8, 8)}
    assert_reproduces(loader(ViTForImageClassification, base), tmp_path / "out", model, images)


def test_a_pooler_that_the_tuned_class_lacks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = BertModel(bert_config())
    base.save_pretrained(tmp_path / "base")
    tuned = BertForTokenClassification.from_pretrained(tmp_path / "base")
    tune_(tuned, low_rank(2, only="encoder")).save_pretrained(tmp_path / "tuned")
    report = extract_folders(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 2, whole=["classifier"])
    assert report.only_base == ("pooler.dense.bias", "pooler.dense.weight")
    assert [(t.name, t.size, t.stored) for t in report.others] == [
        ("classifier.bias", None, "whole"),
        ("classifier.weight", None, "whole"),
    ]

    def start() -> nn.Module:
        return BertForTokenClassification.from_pretrained(tmp_path / "base")

    assert_reproduces(start, tmp_path / "out", tuned, inputs())


def test_running_statistics(tmp_path: Path) -> None:
    """Batch norms: buffers that changed in training, one of them a count, come along whole."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 2}
    model = ResNetForImageClassification(ResNetConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    tune_(model, low_rank(2, only="convolution")).train()(torch.randn(4, 3, 16, 16))
    model.eval().save_pretrained(tmp_path / "tuned")
    base, tuned, out = tmp_path / "base", tmp_path / "tuned", tmp_path / "out"
    report = extract_folders(base, tuned, out, 2, target_modules=["convolution"], whole="changed")
    assert {t.name.rpartition(".")[2] for t in report.others} == {"running_mean", "running_var", "num_batches_tracked"}
    assert (report.left, report.captured) == (0, pytest.approx(1))
    stored, after = tensors(out), tensors(tuned)
    for name in (tensor.name for tensor in report.others):
        assert torch.equal(stored[f"base_model.model.{name}"], after[name])


# -- what the model, as it is built, doesn't know by name ------------------------------------------------


def test_experts_are_named_where_they_differ(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    base, tuned = pair(model, tmp_path, low_rank(2, only="proj"))
    report = extract_folders(base, tuned, tmp_path / "out", 2)
    exact = differences(base, tuned)
    experts = {name for name in exact if "experts" in name}
    assert experts <= {tensor.name for tensor in report.others}
    whole = sum(np.linalg.norm(d) ** 2 for d in exact.values())
    assert report.left == pytest.approx(sum(np.linalg.norm(exact[n]) ** 2 for n in experts) / whole, rel=1e-5)
    # There is no module to store whole, which is said again.
    again = extract_folders(base, tuned, tmp_path / "again", 2, whole="changed")
    assert {tensor.name for tensor in again.others if tensor.stored == "left"} == experts
    assert again.left == pytest.approx(report.left)


# -- quantized bases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["4-bit", "8-bit", "packed"])
@pytest.mark.slow
def test_a_quantized_base(storage: str, tmp_path: Path) -> None:
    """The branch holds what tuning and quantizing changed together, and fits this base alone."""
    source, tuned = pair(llama(), tmp_path / "dense", low_rank(2, only="proj"))
    base = tmp_path / "base"
    if storage == "packed":
        model = LlamaForCausalLM.from_pretrained(source)
        quantize_(model, 3)
        record_quantization_(model)
        model.save_pretrained(base)
    else:
        quantized = BitsAndBytesConfig(
            load_in_4bit=storage == "4-bit",
            load_in_8bit=storage == "8-bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        )
        AutoModelForCausalLM.from_pretrained(source, quantization_config=quantized).save_pretrained(base)
    report = extract_folders(base, tuned, tmp_path / "out", 48)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    exact, found = tensors(tuned), branches(tmp_path / "out")
    for row in report.modules:
        module = loaded.get_submodule(row.path)
        left = exact[f"{row.path}.weight"].double() - codec_for(module).read(module).double()
        assert row.size == pytest.approx(float(left.norm()), rel=1e-5)
        assert row.error == pytest.approx(
            float((left - torch.from_numpy(found[row.path])).norm() / left.norm()), abs=1e-5
        )
    LoraModel.from_pretrained(loaded, tmp_path / "out")
    with pytest.raises(StorageError, match="expected the quantized base model that this adapter was started on"):
        LoraModel.from_pretrained(LlamaForCausalLM.from_pretrained(source), tmp_path / "out")
    with pytest.raises(StorageError, match="expected a tuned model in 16 or 32 bits, found one that is quantized"):
        extract_folders(source, base, tmp_path / "none", 2)
