"""``loftq init``: what it writes is what the in-memory path makes, bit for bit, and loads everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from streaming import ADAPTER_FOLDER, assert_same, config, in_memory, logits, streamed, tensors, write
from tiny_llama import llama
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from qlora_kit import LoraModel, codec_for
from qlora_kit.codecs.packed import PackedLinear
from qlora_kit.errors import StorageError, TargetError
from qlora_kit.shards import ShardReader

WAYS = [
    {"bits": 2},
    {"bits": 2, "double_quant": True},
    {"bits": 2, "quant_type": "nf2", "blocksize": 32},
    {"bits": 3, "quant_type": "affine3", "double_quant": True},
    {"bits": 3, "blocksize": "row"},
    {"bits": 4},
    {"bits": 4, "double_quant": True, "blocksize": 128},
    {"bits": 8},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_equals_the_in_memory_path_bit_for_bit(way: dict[str, Any], llama_dir: Path, tmp_path: Path) -> None:
    out, memory = tmp_path / "out", tmp_path / "memory"
    streamed(llama_dir, out, config(**way))
    expected = in_memory(llama_dir, memory, config(**way))
    assert_same(tensors(out), tensors(memory))
    assert_same(tensors(out / ADAPTER_FOLDER), tensors(memory / ADAPTER_FOLDER))
    loaded = LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), out / ADAPTER_FOLDER)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own use of it
@pytest.mark.parametrize("bits", [2, 4])
def test_peft_loads_what_was_written(bits: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    source, folder = write(llama(intermediate_size=128), tmp_path / "source"), tmp_path / "out"
    streamed(source, folder, config(bits))
    ours = logits(LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / ADAPTER_FOLDER))
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(base, folder / ADAPTER_FOLDER)
    theirs = logits(model.train())  # a stock evaluation forward would round the scales of 4-bit weights
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)  # products in another order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sources(dtype: torch.dtype, tmp_path: Path) -> None:
    source = write(llama().to(dtype), tmp_path / "source")
    for bits in (2, 4):
        out, memory = tmp_path / f"out{bits}", tmp_path / f"memory{bits}"
        streamed(source, out, config(bits))
        in_memory(source, memory, config(bits))
        assert_same(tensors(out), tensors(memory))
        assert_same(tensors(out / ADAPTER_FOLDER), tensors(memory / ADAPTER_FOLDER))


def test_biases_are_kept(tmp_path: Path) -> None:
    model = llama(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    source = write(model, tmp_path / "source")
    streamed(source, tmp_path / "out", config(2))
    expected = in_memory(source, tmp_path / "memory", config(2))
    folder = tmp_path / "out"
    loaded = LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / ADAPTER_FOLDER)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_transposed_weights(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64))
    source = write(model, tmp_path / "source")
    streamed(source, tmp_path / "out", config(bits))
    expected = in_memory(source, tmp_path / "memory", config(bits))
    folder = tmp_path / "out"
    loaded = LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / ADAPTER_FOLDER)
    assert torch.equal(logits(loaded), expected)


def test_an_embedding_is_simulated(tmp_path: Path) -> None:
    lora = config(4, ["embed_tokens", "q_proj"])
    source = write(llama(), tmp_path / "source")
    streamed(source, tmp_path / "out", lora)
    in_memory(source, tmp_path / "memory", lora)
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    assert_same(tensors(tmp_path / "out" / ADAPTER_FOLDER), tensors(tmp_path / "memory" / ADAPTER_FOLDER))


@pytest.mark.parametrize("bits", [2, 4])
def test_only_what_is_targeted_is_quantized(bits: int, llama_dir: Path, tmp_path: Path) -> None:
    report = streamed(llama_dir, tmp_path / "out", config(bits, ["q_proj", "down_proj"]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    quantized = {p for p, m in model.named_modules() if type(m).__name__ in ("PackedLinear", "Linear4bit")}
    assert quantized == {row.path for row in report.layers}
    assert {path.rpartition(".")[2] for path in quantized} == {"q_proj", "down_proj"}
    assert "model.layers.*.self_attn.k_proj.weight" in report.left_out


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    source = write(llama(tied=True), tmp_path / "source")
    streamed(source, tmp_path / "out", config(2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(TargetError, match="tied"):
        streamed(source, tmp_path / "other", config(2, ["embed_tokens"]))
    assert not (tmp_path / "other").exists()


def test_experts_are_named_where_they_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    source = write(MixtralForCausalLM(MixtralConfig(**sizes, **heads)), tmp_path / "source")
    report = streamed(source, tmp_path / "out", config(2))
    experts = {name: found for name, found in report.left_out.items() if "experts" in name}
    assert sum(size for _, size in experts.values()) == 2 * 4 * 3 * 64 * 96 * 4  # layers, experts, matrices, float32
    assert all(name in str(report) for name in experts)
    expected = in_memory(source, tmp_path / "memory", config(2))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(LoraModel.from_pretrained(loaded, tmp_path / "out" / ADAPTER_FOLDER)), expected)


def test_shards_in_and_out(tmp_path: Path) -> None:
    source = write(llama(), tmp_path / "source", max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    streamed(source, tmp_path / "one", config(2))
    streamed(source, tmp_path / "many", config(2), shard_bytes=20_000)
    streamed(source, tmp_path / "workers", config(2), shard_bytes=20_000, workers=3)
    assert (tmp_path / "one" / "model.safetensors").exists()
    shards = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_same(tensors(tmp_path / "one"), tensors(tmp_path / "many"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(tmp_path / "many").keys()
    for name in shards:
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "workers" / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


@pytest.mark.parametrize(("alpha", "rslora"), [(8, False), (4, True)])
def test_the_report_counts_the_scaling(alpha: int, rslora: bool, llama_dir: Path, tmp_path: Path) -> None:
    lora = config(3, alpha=alpha, rslora=rslora)
    report = streamed(llama_dir, tmp_path / "out", lora)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original, adapter = ShardReader(llama_dir), tensors(tmp_path / "out" / ADAPTER_FOLDER)
    scaling = alpha / 4 ** (0.5 if rslora else 1)
    for row in report.layers:
        full = original.tensor(f"{row.path}.weight").double()
        stored = codec_for(base.get_submodule(row.path)).read(base.get_submodule(row.path)).double()
        A, B = (adapter[f"base_model.model.{row.path}.lora_{side}.weight"].double() for side in "AB")
        left = full - stored - scaling * B @ A
        assert row.error == pytest.approx(float(left.norm() / full.norm()), rel=1e-5)
        assert row.quantization_error == pytest.approx(float((full - stored).norm() / full.norm()), rel=1e-5)
        assert row.error < row.zero_error


def test_two_bits_are_two_bits_on_disk(llama_dir: Path, tmp_path: Path) -> None:
    report = streamed(llama_dir, tmp_path / "out", config(2, double_quant=True, blocksize=64))
    stored = tensors(tmp_path / "out")
    path = report.layers[0].path
    own = {name: value for name, value in stored.items() if name.startswith(f"{path}.")}
    count = original_size = ShardReader(llama_dir).tensor(f"{path}.weight").numel()
    assert own[f"{path}.weight"].nbytes == count // 4
    scales = sum(value.nbytes for name, value in own.items() if "scales" in name)
    assert scales == original_size // 64 + 4 * -(-original_size // 64 // 256) + 4
    assert report.layers[0].bits == 8 * sum(value.nbytes for value in own.values()) / count


def test_other_files_come_along(llama_dir: Path, tmp_path: Path) -> None:
    source = write(llama(), tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenizer.json").write_text("{}")
    (source / "old.bin").write_bytes(b"weights of another format")
    streamed(source, tmp_path / "out", config(2))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert not (tmp_path / "out" / "old.bin").exists()


def test_what_can_t_be_a_source_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    streamed(llama_dir, tmp_path / "quantized", config(2))
    with pytest.raises(StorageError, match="found one that is quantized already"):
        streamed(tmp_path / "quantized", tmp_path / "out", config(2))
    (tmp_path / "bare").mkdir()
    with pytest.raises(StorageError, match="expected safetensors files"):
        streamed(tmp_path / "bare", tmp_path / "out", config(2))
    other = write(llama(hidden_size=32), tmp_path / "other")
    (other / "config.json").write_bytes((llama_dir / "config.json").read_bytes())
    with pytest.raises(StorageError, match="the shards belong to another model"):
        streamed(other, tmp_path / "out", config(2))
    assert not (tmp_path / "out").exists()


def test_modules_kept_in_float32_by_transformers_stay_dense(tmp_path: Path) -> None:
    """T5 keeps ``wo`` in float32, and transformers then builds a dense layer whatever the config says."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 16, "vocab_size": 128}
    source = write(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), tmp_path / "source")
    report = streamed(source, tmp_path / "four", config(4))
    assert not any(row.path.endswith(".wo") for row in report.layers)
    assert any(name.endswith("wo.weight") for name in report.left_out)
    transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "four")
    packed = streamed(source, tmp_path / "two", config(2))
    assert any(row.path.endswith(".wo") for row in packed.layers)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "two")
    assert isinstance(model.get_submodule("decoder.block.0.layer.2.DenseReluDense.wo"), PackedLinear)
