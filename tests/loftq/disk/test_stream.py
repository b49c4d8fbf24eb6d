"""Streaming a checkpoint writes, bit for bit, what quantizing it in memory and saving it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from streaming import (
    ADAPTER,
    base_tensors,
    contents,
    in_memory,
    logits,
    reloaded,
    save_gpt2,
    save_llama,
    save_qwen2,
    task,
)
from torch import Tensor

from loftq.disk.stream import stream
from qlora_kit.checkpoints.quantized_tensors import read_weight
from qlora_kit.checkpoints.shards import ShardReader

WAYS: dict[str, dict[str, Any]] = {
    "2 bits": {"loftq_bits": 2},
    "2 bits, double": {"loftq_bits": 2, "double_quant": True},
    "3 bits": {"loftq_bits": 3},
    "4 bits": {"loftq_bits": 4},
    "4 bits, double": {"loftq_bits": 4, "double_quant": True},
    "8 bits": {"loftq_bits": 8},
    "affine3": {"loftq_bits": 3, "quant_type": "affine3"},
    "trellis2": {"loftq_bits": 2, "quant_type": "trellis2", "double_quant": True},
    "trellis3": {"loftq_bits": 3, "quant_type": "trellis3"},
    "rotated4": {"loftq_bits": 4, "quant_type": "rotated4"},
    "nf2": {"loftq_bits": 2, "quant_type": "nf2"},
    "4-bit rows": {"loftq_bits": 4, "blocksize": "row"},
    "an embedding": {"loftq_bits": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "an embedding alone": {"loftq_bits": 2, "target_modules": ["embed_tokens"]},
    "rslora": {"loftq_bits": 2, "use_rslora": True, "lora_alpha": 8},
}
ways = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_same_folders(found: Path, expected: Path) -> None:
    assert_same(base_tensors(found), base_tensors(expected))
    assert_same(load_file(found / ADAPTER), load_file(expected / ADAPTER))


@ways
@pytest.mark.slow
def test_base_and_adapter_are_those_made_in_memory_and_load_back(
    tmp_path: Path, llama_dir: Path, options: dict[str, Any]
) -> None:
    expected = in_memory(llama_dir, tmp_path / "memory", **options)
    stream(task(llama_dir, tmp_path / "out", **options))
    assert_same_folders(tmp_path / "out", tmp_path / "memory")
    assert torch.equal(logits(reloaded(tmp_path / "out")), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_sixteen_bit_sources_give_what_memory_gives(tmp_path: Path, dtype: torch.dtype, bits: int) -> None:
    source = save_llama(tmp_path / "source", dtype)
    expected = in_memory(source, tmp_path / "memory", loftq_bits=bits)
    stream(task(source, tmp_path / "out", loftq_bits=bits))
    assert_same_folders(tmp_path / "out", tmp_path / "memory")
    assert torch.equal(logits(reloaded(tmp_path / "out")), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("save", [save_gpt2, save_qwen2, lambda folder: save_llama(folder, tied=True)])
@pytest.mark.slow
def test_biases_conv1d_and_tied_heads_load_back(tmp_path: Path, save: Callable[[Path], Path], bits: int) -> None:
    source = save(tmp_path / "source")
    expected = in_memory(source, tmp_path / "memory", loftq_bits=bits)
    stream(task(source, tmp_path / "out", loftq_bits=bits))
    assert_same_folders(tmp_path / "out", tmp_path / "memory")
    biases = {name: value for name, value in base_tensors(source).items() if name.endswith("bias")}
    found = base_tensors(tmp_path / "out")
    assert_same({name: found[name] for name in biases}, biases)
    assert torch.equal(logits(reloaded(tmp_path / "out")), expected)


@pytest.mark.slow
def test_shards_on_either_side_change_nothing_but_the_files(tmp_path: Path, llama_dir: Path) -> None:
    sharded = save_llama(tmp_path / "sharded", shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    stream(task(llama_dir, tmp_path / "one", loftq_bits=2))
    report = stream(task(sharded, tmp_path / "many", loftq_bits=2, shard_bytes=20_000))
    assert_same_folders(tmp_path / "many", tmp_path / "one")
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    tensors = base_tensors(tmp_path / "many")
    assert index["weight_map"].keys() == tensors.keys()
    for file in files:
        assert load_file(tmp_path / "many" / file).keys() == {n for n, f in index["weight_map"].items() if f == file}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert not (tmp_path / "one/model.safetensors.index.json").exists()
    assert torch.equal(logits(reloaded(tmp_path / "many")), logits(reloaded(tmp_path / "one")))
    assert len(report.layers) == 14


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(tmp_path: Path, llama_dir: Path) -> None:
    for workers in (1, 3):
        stream(task(llama_dir, tmp_path / str(workers), workers=workers, loftq_bits=2, shard_bytes=50_000))
    assert contents(tmp_path / "3") == contents(tmp_path / "1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("lora", "scaling"),
    [({"lora_alpha": 8}, 2.0), ({"lora_alpha": 6, "use_rslora": True}, 3.0)],
    ids=["alpha=2r", "rslora"],
)
@pytest.mark.slow
def test_reported_errors_are_those_of_what_is_stored(
    tmp_path: Path, bits: int, dtype: torch.dtype, lora: dict[str, Any], scaling: float
) -> None:
    source = save_llama(tmp_path / "source", dtype)
    report = stream(task(source, tmp_path / "out", loftq_bits=bits, **lora))
    original, base = base_tensors(source), ShardReader(tmp_path / "out")
    adapter = load_file(tmp_path / "out" / ADAPTER)
    assert len(report.layers) == 14
    for row in report.layers:
        full = original[f"{row.path}.weight"].double()
        shape = (full.shape[0], full.shape[1])
        stored = read_weight(tmp_path / "out", base, f"{row.path}.", shape, row.quant_type, report.options).double()
        A, B = (adapter[f"base_model.model.{row.path}.lora_{side}.weight"].double() for side in "AB")
        left = full - stored
        # The report's sums are in float32.
        assert float(left.norm() / full.norm()) == pytest.approx(row.quantization_error, rel=1e-4)
        assert float((left - scaling * B @ A).norm() / full.norm()) == pytest.approx(row.error, rel=1e-4)
        assert row.error < row.zero_error
        assert row.rank == 4
        assert not row.note


def test_bits_are_counted_with_their_scales(tmp_path: Path, llama_dir: Path) -> None:
    """A float32 scale for 64 weights is half a bit more."""
    report = stream(task(llama_dir, tmp_path / "out", loftq_bits=4, target_modules=["q_proj"]))
    assert [row.bits for row in report.layers] == pytest.approx([4.5, 4.5], abs=0.1)  # and the table of 16 values


def test_what_is_not_quantized_is_copied_bit_for_bit(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", torch.bfloat16)
    (source / "tokenizer.json").write_text("{}")
    stream(task(source, tmp_path / "out", loftq_bits=2, target_modules=["q_proj"]))
    found, original = base_tensors(tmp_path / "out"), base_tensors(source)
    kept = {name: value for name, value in original.items() if "q_proj" not in name}
    assert_same({name: found[name] for name in kept}, kept)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert {**before, "quantization_config": after["quantization_config"]} == after


def test_progress_counts_every_weight_once(tmp_path: Path, llama_dir: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    made = task(llama_dir, tmp_path / "out", target_modules=["q_proj"])
    stream(made, progress=lambda unit, weights: seen.append((unit.name, unit.numel, weights)))
    names = [name for name, _, _ in seen]
    assert names == sorted(base_tensors(llama_dir))
    assert {weights for _, _, weights in seen} == {sum(count for _, count, _ in seen)}
