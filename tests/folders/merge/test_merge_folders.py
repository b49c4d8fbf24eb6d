"""A merge from folder to folder writes, bit for bit, what a merge in memory and ``save_pretrained`` write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk_merges import STORAGES, assert_same, gpt2, in_memory, llama, logits, on_disk, save_adapter, save_base, tensors
from reference import branches
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qlora_kit import LoraConfig, LoraModel
from qlora_kit.checkpoints.shards import ShardReader
from qlora_kit.cli.commands import app
from qlora_kit.folders.merge.run import merge_folders

# Every storage into a dtype, and those of few bits into themselves; every kind of target, from dense and k-bit bases.
PAIRS = [(storage, "bfloat16") for storage in STORAGES] + [(storage, "same") for storage in STORAGES[1:]]
PAIRS += [("bfloat16", "float16"), ("bfloat16", "nf4"), ("bfloat16", "nf3"), ("nf4", "fp4"), ("int8", "int8")]
PAIRS += [("signed2-double", "nf4"), ("bfloat16", "trellis3"), ("trellis2-double", "rotated4")]


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("storage", "into"), PAIRS)
@pytest.mark.slow
def test_bits_of_the_merge_in_memory(
    storage: str, into: str, bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    report = on_disk(bases[storage], [adapter], tmp_path / "disk", into=into)
    expected = in_memory(bases[storage], [adapter], tmp_path / "memory", into=into)
    assert_same(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    assert [row.path for row in report.layers] == sorted(row.path for row in report.layers)
    assert len(report.layers) == 14
    assert report.verified == 8
    found, wanted = settings(tmp_path / "disk"), settings(tmp_path / "memory")
    kinds = [s.get("quantization_config", {}).pop("groups", []) for s in (found, wanted)]
    if into != "same":
        assert found.get("quantization_config") == wanted.get("quantization_config")
    first, second = (sorted(module for group in kind for module in group["modules"]) for kind in kinds)
    assert first == second
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    assert again.dtype == expected.dtype
    assert torch.isfinite(logits(again)).all()


@pytest.mark.slow
@pytest.mark.parametrize("into", ["float32", "nf4"])
def test_conv1d_and_biases(into: str, gpt2_dir: Path, tmp_path: Path) -> None:
    adapter = save_adapter(gpt2_dir, tmp_path / "adapter", bias="all")
    on_disk(gpt2_dir, [adapter], tmp_path / "disk", into=into)
    in_memory(gpt2_dir, [adapter], tmp_path / "memory", into=into)
    assert_same(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))


@pytest.mark.parametrize("storage", ["nf4", "nf3"])
@pytest.mark.slow
def test_a_dequantized_conv1d_is_stored_as_its_model_loads_it(storage: str, tmp_path: Path) -> None:
    base = save_base(gpt2(), tmp_path / "base", storage)
    adapter = save_adapter(base, tmp_path / "adapter")
    on_disk(base, [adapter], tmp_path / "disk", into="float32")
    merged = in_memory(base, [adapter], tmp_path / "memory", into="float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    assert type(again.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    weight = merged.transformer.h[0].attn.c_attn.weight
    assert torch.equal(again.transformer.h[0].attn.c_attn.weight, weight)


def test_several_adapters_and_weights_against_float64(
    bases: dict[str, Path], adapter: Path, second: Path, tmp_path: Path
) -> None:
    weights = [0.5, -1.5]
    report = on_disk(bases["float32"], [adapter, second], tmp_path / "out", weights=weights, into="float32")
    before, after = (tensors(folder) for folder in (bases["float32"], tmp_path / "out"))
    files = [load_file(folder / "adapter_model.safetensors") for folder in (adapter, second)]
    scalings = [8 / 4, 8 / 4**0.5]
    assert len(report.layers) == 15
    rows = {row.path: row for row in report.layers}
    for name, base in before.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        parts = [
            (branches.array(f[f"{stem}.lora_A.weight"]), branches.array(f[f"{stem}.lora_B.weight"]), s * w)
            for f, s, w in zip(files, scalings, weights, strict=True)
            if f"{stem}.lora_A.weight" in f
        ]
        ideal = branches.array(base) + branches.delta(parts)
        # A float32 sum of 64 products and its rounding.
        np.testing.assert_allclose(branches.array(after[name]), ideal, rtol=0, atol=2e-6)
        if parts:
            ratio = np.linalg.norm(np.asarray(branches.delta(parts))) / np.linalg.norm(branches.array(base))
            assert rows[name.removesuffix(".weight")].delta_ratio == pytest.approx(ratio, rel=1e-5)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.slow
def test_embeddings_and_the_head(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(bases["bfloat16"], tmp_path / "adapter", ["embed_tokens", "lm_head", "v_proj"])
    for into in ("bfloat16", "nf4"):
        on_disk(bases["bfloat16"], [adapter], tmp_path / into, into=into)
        in_memory(bases["bfloat16"], [adapter], tmp_path / f"memory-{into}", into=into)
        assert_same(tensors(tmp_path / into), tensors(tmp_path / f"memory-{into}"))
        assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path / into))).all()
    head = tensors(tmp_path / "nf4")["model.embed_tokens.weight"]
    assert head.dtype == torch.bfloat16, "embeddings stay dense"


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "into"), [("bfloat16", "same"), ("nf4", "bfloat16")])
def test_trained_copies(storage: str, into: str, bases: dict[str, Path], tmp_path: Path) -> None:
    saved = ["lm_head", "embed_tokens"]
    adapter = save_adapter(bases[storage], tmp_path / "adapter", modules_to_save=saved)
    report = on_disk(bases[storage], [adapter], tmp_path / "disk", into=into)
    in_memory(bases[storage], [adapter], tmp_path / "memory", into=into)
    assert_same(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    assert report.replaced == ["lm_head.weight", "model.embed_tokens.weight"]
    assert "taken whole from the adapters: lm_head.weight" in str(report)


@pytest.mark.parametrize(("storage", "into"), [("nf4", "same"), ("bfloat16", "nf3")])
@pytest.mark.slow
def test_searched_scales(storage: str, into: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(bases[storage], tmp_path / "adapter", ["q_proj"])
    nearest = on_disk(bases[storage], [adapter], tmp_path / "nearest", into=into)
    searched = on_disk(bases[storage], [adapter], tmp_path / "disk", into=into, rounding="scale-search")
    in_memory(bases[storage], [adapter], tmp_path / "memory", into=into, rounding="scale-search")
    assert_same(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    assert all(s.error < n.error for s, n in zip(searched.layers, nearest.layers, strict=True))


def test_options_of_few_bits(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    options = {"into": "nf3", "blocksize": "row", "double_quant": True}
    on_disk(bases["bfloat16"], [adapter], tmp_path / "disk", **options)
    in_memory(bases["bfloat16"], [adapter], tmp_path / "memory", **options)
    assert_same(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "disk"))).all()


def test_shards_and_what_is_copied(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base(llama(), base, "bfloat16", max_shard_size="60KB")
    assert (base / "model.safetensors.index.json").exists()
    (base / "tokenizer_config.json").write_text('{"a": 1}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (base / "pytorch_model.bin").write_text("weights in another format")
    out = tmp_path / "out"
    report = on_disk(base, [adapter], out, shard_bytes=50_000)
    in_memory(base, [adapter], tmp_path / "memory", into="bfloat16")
    assert_same(tensors(out), tensors(tmp_path / "memory"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(out).values())
    assert max((out / shard).stat().st_size for shard in shards) < 50_000 + 2 * 96 * 64 * 2 + 20_000
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "additional_chat_templates" / "tool.jinja").exists()
    assert (out / "tokenizer_config.json").exists()
    assert not (out / "pytorch_model.bin").exists()
    assert json.loads((out / "merge_report.json").read_text()) == report.to_dict()
    assert len(ShardReader(out)) == 21
    assert settings(out)["dtype"] == "bfloat16"


@pytest.mark.slow
def test_names_with_and_without_the_prefix(gpt2_dir: Path, tmp_path: Path) -> None:
    """GPT-2's own checkpoint has no "transformer." before its names, nor has one of the model without its head."""
    adapter = save_adapter(gpt2_dir, tmp_path / "adapter")
    on_disk(gpt2_dir, [adapter], tmp_path / "expected", into="float32")
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(gpt2_dir)
    model.transformer.save_pretrained(base)
    on_disk(base, [adapter], tmp_path / "headless", into="float32")
    assert settings(tmp_path / "headless")["architectures"] == ["GPT2Model"]
    whole = tensors(tmp_path / "expected")
    assert_same(tensors(tmp_path / "headless"), {n.removeprefix("transformer."): t for n, t in whole.items()})
    (base / "config.json").write_text((gpt2_dir / "config.json").read_text())
    on_disk(base, [adapter], tmp_path / "prefix", into="float32")
    assert_same(tensors(tmp_path / "prefix"), whole)


@pytest.mark.slow
def test_the_base_of_an_adapter_made_by_loftq(bases: dict[str, Path], tmp_path: Path) -> None:
    from loftq.disk.stream import stream
    from loftq.disk.task import Task
    from qlora_kit import LoftQConfig

    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=2, method="loftq"),
    )
    out = tmp_path / "quantized"
    stream(Task(bases["float32"], out, config))
    on_disk(out, [out / "loftq_init"], tmp_path / "disk", into="float32")
    in_memory(out, [out / "loftq_init"], tmp_path / "memory", into="float32")
    assert_same(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    lora = LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), out / "loftq_init")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    # float32 sums in another order
    assert (logits(again) - logits(lora)).abs().max() <= 1e-5 * logits(lora).abs().max()


@pytest.mark.slow
def test_the_command(bases: dict[str, Path], adapter: Path, second: Path, tmp_path: Path) -> None:
    options = ["--base", str(bases["bfloat16"]), "--adapter", str(adapter), "--adapter", str(second)]
    options += ["--weight", "1", "--weight", "0.5", "--into", "nf4", "--double-quant", "--shard-size", "1", "--force"]
    result = CliRunner().invoke(app, ["merge", *options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "15 layers merged into nf4" in result.output
    merge_folders(
        bases["bfloat16"],
        [adapter, second],
        tmp_path / "expected",
        weights=[1, 0.5],
        into="nf4",
        double_quant=True,
        force=True,
    )
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "expected"))
    refused = CliRunner().invoke(app, ["merge", *options, "--out", str(tmp_path / "out"), "--into", "float32"])
    assert refused.exit_code == 1
    assert "--into nf4 then, --into float32 now" in refused.output.replace("\n", "")
