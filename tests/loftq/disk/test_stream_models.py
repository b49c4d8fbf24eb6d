"""``loftq init`` on models with peculiarities, and what its report and its bytes say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibrated_runs import calibrated
from disk_models import ADAPTER_FOLDER, assert_same, config, in_memory, logits, streamed, tensors, write
from tiny_llama import llama
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from loftq import start_report
from loftq.disk.verify import verify
from loftq.starts.report import Report
from qlora_kit import LoraModel, apply_lora, codec_for
from qlora_kit.checkpoints.shards import ShardReader
from qlora_kit.errors import LeftOutWarning, TargetError


@pytest.mark.slow
def test_an_embedding_is_simulated(tmp_path: Path) -> None:
    lora = config(4, ["embed_tokens", "q_proj"])
    source = write(llama(), tmp_path / "source")
    streamed(source, tmp_path / "out", lora)
    in_memory(source, tmp_path / "memory", lora)
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    assert_same(tensors(tmp_path / "out" / ADAPTER_FOLDER), tensors(tmp_path / "memory" / ADAPTER_FOLDER))


@pytest.mark.slow
def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    source = write(llama(tied=True), tmp_path / "source")
    streamed(source, tmp_path / "out", config(2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(TargetError, match="tied"):
        streamed(source, tmp_path / "other", config(2, ["embed_tokens"]))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.slow
def test_what_the_model_computes_by_its_dtype_stays_dense(bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """T5 casts to the dtype of ``wo``'s weight. It stays, its adapter starts at zero, in memory as on disk."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 16, "vocab_size": 128}
    config_of = transformers.T5Config(**sizes, decoder_start_token_id=0)
    dense = transformers.T5ForConditionalGeneration(config_of).to(dtype).eval()
    source = write(dense, tmp_path / "source")
    report = streamed(source, tmp_path / "out", config(bits))
    assert not any(row.path.endswith(".wo") for row in report.layers)
    assert len(report.kept) == 4
    assert all(path.endswith(".wo") for path in report.kept)
    assert "dtype or shape of its weight is read by T5DenseActDense; the adapter starts at zero" in str(report)
    assert Report.load(tmp_path / "out") == report
    assert list(verify(tmp_path / "out", source))

    load = transformers.T5ForConditionalGeneration.from_pretrained
    lora = LoraModel.from_pretrained(load(tmp_path / "out"), tmp_path / "out" / ADAPTER_FOLDER, is_trainable=True)
    batch = {"input_ids": torch.arange(5, 17)[None], "labels": torch.arange(5, 13)[None]}
    wo = lora.adapter_layers()["decoder.block.0.layer.2.DenseReluDense.wo"]
    assert torch.equal(wo.base_layer.weight, dense.decoder.block[0].layer[2].DenseReluDense.wo.weight)
    assert not wo.factors("default")[1].any()
    with torch.no_grad():
        right = dense(**batch).logits.float()
        off = (lora.eval()(**batch).logits.float() - right).norm() / right.norm()
    assert off < {4: 0.25, 2: 0.6}[bits]  # seen: 0.1 and 0.4; where wo's codes gave the dtype, more than 1
    lora.train()(**batch).loss.backward()
    assert wo.factors("default")[1].grad_fn is None or wo.lora_B["default"].weight.grad.any()

    model = apply_lora(load(source, dtype="auto"), config(bits))
    assert start_report(model).kept == report.kept
    for path, layer in model.adapter_layers().items():
        for one, other in zip(layer.factors("default"), lora.adapter_layers()[path].factors("default"), strict=True):
            assert torch.equal(one, other), path


def test_targets_that_few_bits_cant_hold_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_ff": 96, "num_layers": 1, "num_heads": 4, "d_kv": 16, "vocab_size": 128}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    source = write(model, tmp_path / "source")
    match = r"wo: expected a module that few bits can hold, found none among the targets \(.*T5DenseActDense\)"
    with pytest.raises(TargetError, match=match):
        streamed(source, tmp_path / "out", config(2, ["wo"]))
    with pytest.raises(TargetError, match=match):
        apply_lora(model, config(2, ["wo"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_architecture_that_starts_its_own_layers_loads(tmp_path: Path) -> None:
    """RWKV draws linear layers by their weight's shape, and writes to two of a block in eval, which stay dense."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 16}
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes, intermediate_size=64)).eval()
    source = write(model, tmp_path / "source")
    report = streamed(source, tmp_path / "out", config(2))
    assert {path.split(".", 3)[3] for path in report.kept} == {"attention.output", "feed_forward.value"}
    loaded = transformers.RwkvForCausalLM.from_pretrained(tmp_path / "out")
    lora = LoraModel.from_pretrained(loaded, tmp_path / "out" / ADAPTER_FOLDER)
    assert torch.isfinite(logits(lora.eval())).all()


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


SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def deberta() -> transformers.PreTrainedModel:
    relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    settings = transformers.DebertaV2Config(**SMALL, **relative, num_attention_heads=4, max_position_embeddings=64)
    return transformers.DebertaV2ForMaskedLM(settings)


def llama4() -> transformers.PreTrainedModel:
    experts = {"intermediate_size_mlp": 96, "num_local_experts": 2, "interleave_moe_layer_step": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SMALL, **experts, **heads, pad_token_id=0))


@pytest.mark.parametrize(("make", "targets"), [(deberta, ["query_proj", "dense"]), (llama4, ["q_proj", "o_proj"])])
@pytest.mark.slow
def test_weights_that_are_read_past_their_modules_are_there_while_calibrating(
    make: Any, targets: list[str], tmp_path: Path
) -> None:
    """DeBERTa reads its table of distances past it, Llama 4 asks where its embedding is; both lie in files."""
    torch.manual_seed(0)
    source = write(make(), tmp_path / "source")
    lora = calibrated("aligned", targets=targets)
    report = streamed(source, tmp_path / "out", lora)
    kind: Any = {deberta: transformers.DebertaV2ForMaskedLM, llama4: transformers.Llama4ForCausalLM}[make]
    model = apply_lora(kind.from_pretrained(source, dtype="auto"), lora)
    errors = {row.path: row.output_error for row in start_report(model).layers}
    assert {row.path: row.output_error for row in report.layers} == errors
    stored = tensors(tmp_path / "out" / ADAPTER_FOLDER)
    for path, layer in model.adapter_layers().items():
        for name, factor in layer.adapter_tensors("default").items():
            assert torch.equal(factor, stored[f"base_model.model.{path}.{name}"]), path
