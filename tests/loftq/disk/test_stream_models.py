"""``loftq init`` on models with peculiarities, and what its report and its bytes say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from disk_models import ADAPTER_FOLDER, assert_same, config, in_memory, logits, streamed, tensors, write
from tiny_llama import llama
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from qlora_kit import LoraModel, codec_for
from qlora_kit.checkpoints.shards import ShardReader
from qlora_kit.codecs.packed import PackedLinear
from qlora_kit.errors import LeftOutWarning, TargetError


def test_an_embedding_is_simulated(tmp_path: Path) -> None:
    lora = config(4, ["embed_tokens", "q_proj"])
    source = write(llama(), tmp_path / "source")
    streamed(source, tmp_path / "out", lora)
    in_memory(source, tmp_path / "memory", lora)
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    assert_same(tensors(tmp_path / "out" / ADAPTER_FOLDER), tensors(tmp_path / "memory" / ADAPTER_FOLDER))


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
    share = sum(size for _, size in experts.values()) / sum(t.nbytes for t in tensors(source).values())
    assert f"{max(size for _, size in experts.values()) / report.source_bytes:.1%} of the model" in str(report)
    assert sum(size for _, size in experts.values()) / report.source_bytes == share > 0.7
    with pytest.warns(LeftOutWarning, match=rf"{share:.0%} of the model's parameters.*experts\.gate_up_proj"):
        expected = in_memory(source, tmp_path / "memory", config(2))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(LoraModel.from_pretrained(loaded, tmp_path / "out" / ADAPTER_FOLDER)), expected)


@pytest.mark.parametrize(("alpha", "rslora"), [(8, False), (4, True)])
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own use of it
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.slow
def test_peft_loads_what_was_written(bits: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    source, folder = write(llama(intermediate_size=128), tmp_path / "source"), tmp_path / "out"
    streamed(source, folder, config(bits))
    ours = logits(LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / ADAPTER_FOLDER))
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(base, folder / ADAPTER_FOLDER)
    theirs = logits(model.train())  # a stock evaluation forward would round the scales of 4-bit weights
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)  # products in another order
