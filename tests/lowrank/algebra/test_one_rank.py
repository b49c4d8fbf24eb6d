"""What readers with one scale for all modules compute: vLLM takes alpha / r of the configuration, llama.cpp divides
alpha by the rank of each tensor. Adapters that are computed from others are the same there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from golden_nets import base_net
from lowrank.algebra.pairs import assert_close, deltas, ours
from safetensors.torch import load_file

from qlora_kit import LoraConfig, LoraModel
from qlora_kit.folders import combine_folders, compress_folder
from qlora_kit.naming import pattern_value

SOURCES = ({"r": 1, "lora_alpha": 5}, {"r": 3, "use_rslora": True}, {"target_modules": ["fc"], "r": 4})
WEIGHTS = [0.5, -1.5, 2.0]


def assert_one_scale(folder: Path) -> int:
    """Every module's own scale is the one that either kind of reader takes; the rank of all."""
    config, state = LoraConfig.from_pretrained(folder), load_file(folder / "adapter_model.safetensors")
    ranks = set()
    for key, factor in state.items():
        if "lora_A" in key or "lora_embedding_A" in key:
            path = key.removeprefix("base_model.model.").partition(".lora_")[0]
            rank = pattern_value(path, config.rank_pattern, config.r)
            own = config.scaling_of(rank, pattern_value(path, config.alpha_pattern, config.lora_alpha))
            ranks.add(factor.shape[0])
            of_config = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
            assert own == of_config == config.lora_alpha / factor.shape[0]
    (rank,) = ranks
    return rank


@pytest.mark.parametrize("kind", ["exact", "cat", "svd"])
def test_factors_of_several_ranks_are_filled_up(kind: str, tmp_path: Path) -> None:
    lora = ours(*SOURCES)
    lora.save_pretrained(tmp_path)
    report = lora.add_weighted_adapter(["a0", "a1", "a2"], WEIGHTS, "new", kind)
    own = lora.add_weighted_adapter(["a0", "a1", "a2"], WEIGHTS, "own", kind, own_ranks=True)
    largest = max(line.rank for line in report.layers)
    assert f"filled up with zeros to rank {largest}" in str(report)
    assert (own.layers, own.filled_to, report.filled_to) == (report.layers, None, largest)
    assert {line.path: line.rank for line in own.layers} == {p: a.r["own"] for p, a in lora.adapter_layers().items()}
    assert_close(
        deltas(lora, "own"), deltas(lora, "new"), 1e-6
    )  # a product of more columns may be summed in another order
    lora.save_pretrained(tmp_path, selected_adapters=["new"])
    combine_folders([tmp_path / name for name in ("a0", "a1", "a2")], WEIGHTS, tmp_path / "files", kind)
    for folder in (tmp_path / "new", tmp_path / "files"):
        assert assert_one_scale(folder) == largest


def test_compressing_by_energy(tmp_path: Path) -> None:
    lora = ours({"r": 6, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"fc": 1, "head": 2}})
    lora.save_pretrained(tmp_path)
    report = compress_folder(tmp_path / "a0", tmp_path / "out", energy=0.9)
    own = compress_folder(tmp_path / "a0", tmp_path / "own", energy=0.9, own_ranks=True)
    assert len({line.rank for line in report.layers}) > 1
    assert own.layers == report.layers
    assert assert_one_scale(tmp_path / "out") == report.filled_to
    filled, plain = (LoraModel.from_pretrained(base_net(), tmp_path / name, "new") for name in ("out", "own"))
    assert_close(deltas(filled, "new"), deltas(plain, "new"), 0)
    assert {path: layer.r["new"] for path, layer in plain.adapter_layers().items()} == {
        line.path: line.rank for line in report.layers
    }
