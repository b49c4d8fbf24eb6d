"""The residual adapter: the best branch for what is stored, in the account, in files, and under another merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llama
import torch
from merge_nets import PATHS, adapted, delta_of, output, stored_weight
from reference import branches
from reference import merging as reference
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_kit import LoraConfig, LoraModel, MergeError, StorageError, apply_lora, merge
from qlora_kit.hf_quantizer import record_quantization_
from qlora_kit.training.preparation.quantize import quantize_

# float32 sums of some 6,000 entries; relative to a small delta half a digit less.
FLOAT32 = 3e-5


def branch(model: LoraModel, path: str) -> tuple[np.ndarray, np.ndarray]:
    layer = model.adapter_layers()[path]
    assert layer.scaling["residual"] == 1
    A, B = layer.factors("residual")
    return branches.array(A), branches.array(B)


def moments(seed: int = 0, width: int = 64) -> Tensor:
    """Of correlated inputs."""
    x = torch.randn(400, width, generator=torch.Generator().manual_seed(seed))
    x = x @ torch.randn(width, width, generator=torch.Generator().manual_seed(seed + 1)) / width**0.5
    return x.T @ x / len(x)


def assert_best(error: np.ndarray, A: np.ndarray, B: np.ndarray) -> None:
    """B A is the closest of its rank to ``error``, and no step away from it is closer."""
    left = np.linalg.norm(error - B @ A)
    assert left == pytest.approx(reference.least_left(error, len(A)), rel=1e-5, abs=1e-5)
    draw = np.random.default_rng(0)
    for size in (1e-3, 1e-1):
        for _ in range(5):
            moved = [f + size * np.abs(f).mean() * draw.standard_normal(f.shape) for f in (B, A)]
            assert np.linalg.norm(error - moved[0] @ moved[1]) >= left * (1 - 1e-6)


@pytest.mark.parametrize(
    ("storage", "into", "size", "names"),
    [
        ("nf4", "same", 1.0, ("a", "b")),  # a delta too rich for the branch alone
        ("nf4-double", "same", 0.02, ("a", "b")),  # one so small that the weight had better stay
        ("int8", "nf4", 0.3, ("a",)),
        ("float32", "nf3", 0.3, ("a",)),
        ("packed-signed2-double", "same", 0.02, ("a", "b")),
        ("packed-nf3", "nf2", 0.3, ("a",)),
        ("packed-trellis2-double", "same", 0.02, ("a", "b")),
        ("packed-nf3", "trellis2", 0.3, ("a",)),
    ],
)
@pytest.mark.slow
def test_the_branch_is_the_best_beside_what_is_stored(
    storage: str, into: str, size: float, names: tuple[str, ...]
) -> None:
    lora = adapted(storage, names, size)
    before = {path: stored_weight(lora.adapter_layers()[path].base_layer) for path in PATHS}
    deltas = {path: delta_of(lora, path, names) for path in PATHS}
    report = merge(lora, into=into, residual_rank=4)
    assert report.model is lora
    assert (lora.active_adapters, list(lora.peft_config)) == (["residual"], ["residual"])
    assert not any(parameter.requires_grad for parameter in lora.parameters() if parameter.dim() == 2)
    for layer in report.layers:
        base, delta = before[layer.path], deltas[layer.path]
        A, B = branch(lora, layer.path)
        stored = stored_weight(lora.adapter_layers()[layer.path].base_layer)
        assert_best(base + delta - stored, A, B)
        assert layer.rank == len(A) == 4
        for name, value in reference.fidelity(base, delta, stored + B @ A).items():
            assert getattr(layer, name) == pytest.approx(value, rel=FLOAT32, abs=FLOAT32), name
        # The better of two: the weight as it is with the delta cut, and the weight rounded anew with a branch.
        cut = reference.least_left(delta, 4)
        left = np.linalg.norm(base + delta - stored - B @ A)
        if into == "same":
            assert left <= cut * (1 + 1e-5)
        kept = np.array_equal(stored, base)
        if "trellis" in storage:  # codes nearly stay, and scales are fitted to what is left
            kept = np.linalg.norm(stored - base) < 0.15 * np.linalg.norm(delta)
        assert kept == (size == 0.02), "the weight stays where the delta is small"
        if not kept and "double" not in into + storage and into not in ("nf2", "trellis2"):
            rounding = reference.rounding_norm(base + delta, storage if into == "same" else into)
            assert left < rounding


def test_the_better_candidate_is_the_better_for_the_inputs() -> None:
    """With second moments the branch is the best under them: svd((W - Q) F) F^-1 with F F^T = R."""
    statistics = {"0": moments(), "2": moments(2, 96), "4": moments(4).diagonal().clone()}
    lora = adapted("nf4", ("a", "b"), 0.02)
    deltas = {path: delta_of(lora, path, ("a", "b")) for path in PATHS}
    merge(lora, residual_rank=4, statistics=statistics)
    for path in PATHS:
        R = branches.array(statistics[path])
        R = np.diag(R) if R.ndim == 1 else R
        F = np.linalg.cholesky(R + 0.01 * np.trace(R) / len(R) * np.eye(len(R)))  # the library's damping
        A, B = branch(lora, path)
        assert_best(deltas[path] @ F, A @ F, B)


@pytest.mark.parametrize("rank", [33, 1000])
def test_a_rank_beyond_the_layer_loses_nothing(rank: int) -> None:
    lora = adapted("nf4", size=0.3)
    apart = output(lora)
    report = merge(lora, into="nf3", residual_rank=rank)
    assert [layer.rank for layer in report.layers] == [min(rank, size) for size in (64, 64, 32)]
    assert report.layers[-1].error < 1e-6
    if rank == 1000:
        torch.testing.assert_close(output(report.model), apart, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_the_dtype_of_the_factors(dtype: torch.dtype | None) -> None:
    lora = adapted("nf4", size=0.02)
    base, delta = stored_weight(lora.adapter_layers()["0"].base_layer), delta_of(lora, "0", ("a",))
    report = merge(lora, residual_rank=4, residual_dtype=dtype)
    layer = lora.adapter_layers()["0"]
    assert {tensor.dtype for tensor in layer.adapter_tensors("residual").values()} == {dtype or torch.float32}
    A, B = branch(lora, "0")
    expected = reference.fidelity(base, delta, base + B @ A)
    assert report.layers[0].delta_error == pytest.approx(expected["delta_error"], rel=1e-3, abs=FLOAT32)
    assert (report.layers[0].delta_error > 1e-4) == (dtype is not None), "rounded factors are in the account"


def test_more_adapters_and_merges_on_the_result() -> None:
    lora = adapted("nf4", ("a", "b"), 0.02)
    apart = output(lora)
    merge(lora, residual_rank=8)
    torch.testing.assert_close(output(lora), apart, rtol=0, atol=1e-5)
    lora.add_adapter("c", LoraConfig(r=2, target_modules=["0", "4"], init_lora_weights=False))
    lora.set_adapter(["residual", "c"])
    apart = output(lora)
    assert not torch.equal(apart, output(adapted("nf4", ("a", "b"), 0.02)))
    again = merge(lora, residual_rank=10)
    assert (again.adapters, list(lora.peft_config)) == (["residual", "c"], ["residual"])
    torch.testing.assert_close(output(lora), apart, rtol=0, atol=1e-5)
    dense = merge(lora, into="float32")
    torch.testing.assert_close(output(dense.model), apart, rtol=0, atol=1e-5)
    assert not isinstance(dense.model, LoraModel)


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "into"), [("nf4", "same"), (None, "nf3"), ("int8", "same")])
def test_saved_and_loaded_with_its_base(tmp_path: Path, storage: str | None, into: str) -> None:
    model = tiny_llama.llama(num_hidden_layers=1, intermediate_size=128).eval()
    if storage is not None:
        quantize_(model, quant_type=storage)
    lora = apply_lora(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    ids = torch.randint(1, 128, (2, 9))
    report = merge(lora, into=into, residual_rank=4, text=ids)
    assert report.agreement is not None
    assert str(report).splitlines()[-2].endswith(", a residual adapter of rank 4 attached")
    merged: Any = report.model
    with torch.no_grad():
        expected = merged(ids).logits
    merged.save_pretrained(tmp_path / "adapter")
    base = merged.unload()
    record_quantization_(base)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = LoraModel.from_pretrained(again, tmp_path / "adapter" / "residual").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    other = tiny_llama.llama(num_hidden_layers=1, intermediate_size=128)
    with pytest.raises(StorageError, match=r"expected the quantized base model that this adapter was started on"):
        LoraModel.from_pretrained(other, tmp_path / "adapter" / "residual")


def test_what_a_residual_cannot_go_with() -> None:
    lora = adapted("nf4")
    for rank in (-1, True, 2.0, "8"):
        with pytest.raises(MergeError, match=r"residual_rank=.*expected a whole number of at least 0"):
            merge(lora, residual_rank=rank)  # type: ignore[arg-type]
    with pytest.raises(MergeError, match=r"into='bfloat16': expected residual_rank=0, .*found 2"):
        merge(lora, into="bfloat16", residual_rank=2)
    dense = apply_lora(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    with pytest.raises(MergeError, match=r"residual_rank=2: expected adapted modules of few bits, found none"):
        merge(dense, residual_rank=2)
    assert list(dense.peft_config) == ["default"]
