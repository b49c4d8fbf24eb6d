"""Starts of whole models in memory, by every method: the reports say what is so, on dense and on 4-bit bases."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.loftq import round_blocks
from small_models import (
    VOCABULARY,
    Batches,
    captured,
    gpt2,
    moments,
    stack,
    t5,
    text,
    tiny_llama,
    tokens,
    vectors,
)
from tiny_llama import batch, load
from tiny_lm import write_tiny_lm
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from loftq import LoftQResult, start_report
from loftq.starts import one_module
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora
from qlora_kit.codecs import codec_for, protect_storage_

CALIBRATED = ["qera-diag", "qera", "srr", "cloq", "aligned"]
METHODS = ["loftq", "pissa", *CALIBRATED]
# Errors are sums over some hundred float32 products, of inputs that two layers of float32 made.
RELATIVE = 1e-4
RANK = 2


def config(method: str, calibration: Any, *, target_modules: Any = "all-linear", r: int = RANK, **options: Any) -> Any:
    loftq = LoftQConfig(**{"method": method, "calibration": calibration, **options})
    return LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=target_modules, init_lora_weights="loftq", loftq_config=loftq
    )


def double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def weights_of(model: nn.Module, paths: list[str]) -> dict[str, np.ndarray]:
    return {path: double(codec_for(m := model.get_submodule(path)).read(m)) for path in paths}


def left_over(lora: LoraModel, path: str, full: np.ndarray, adapter: str = "default") -> np.ndarray:
    """W - Q - sBA, entry by entry."""
    layer = lora.adapter_layers()[path]
    A, B = (double(factor) for factor in layer.adapter_tensors(adapter).values())
    scaling = layer.scaling[adapter]
    return full - double(codec_for(layer.base_layer).read(layer.base_layer)) - scaling * np.einsum("or,ri->oi", B, A)


def size_of(matrix: np.ndarray, R: np.ndarray) -> float:
    """sqrt(E ||matrix x||^2), row by row."""
    R = np.diag(R) if R.ndim == 1 else R
    return float(np.sqrt(max(0.0, sum(row @ R @ row for row in matrix))))


def with_aims(aims: list[Any], factorize: Any, options: Any, weight: Tensor, *args: Any, **given: Any) -> LoftQResult:
    """``factorize``, whose weights and what came closest to them are noted."""
    result = factorize(options, weight, *args, **given)
    aims.append((double(weight), double(weight if result.goal is None else result.goal)))
    return result


def texts(padded: bool = False) -> Batches:
    """Enough tokens for every width here, 64 at most."""
    return [{**b, "use_cache": False} for b in tokens(8, rows=4, padded=padded)]


def pairs() -> Batches:
    return [{**b, "decoder_input_ids": b["input_ids"].flip(1)[:, :5]} for b in texts()]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batches], Any]] = {
    "llama": (tiny_llama, lambda: texts(padded=True), "all-linear"),
    "gpt2": (gpt2, texts, "all-linear"),
    # Not "wo", into which T5 casts to the dtype that its weight calls itself.
    "t5": (t5, pairs, ["q", "k", "v", "o", "wi"]),
    "sequential": (stack, lambda: vectors(20), ["0", "2", "4"]),
}


def shown(value: Tensor, b: dict[str, Any]) -> int:
    """How many inputs ``value`` holds that the batch's mask doesn't hide."""
    mask = b.get("attention_mask")
    return int(mask.sum()) if mask is not None and mask.shape == value.shape[:-1] else value[..., 0].numel()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_the_reported_errors_are_those_of_the_started_model(
    method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, draw, target_modules = CASES[name]
    model, batches = make(), draw()
    original = copy.deepcopy(model)
    aims: list[tuple[np.ndarray, np.ndarray]] = []
    monkeypatch.setattr(one_module, "factorize_as", partial(with_aims, aims, one_module.factorize_as))
    lora = apply_lora(model, config(method, batches, target_modules=target_modules))
    paths = list(lora.adapter_layers())
    full = weights_of(original, paths)
    # A layer of "aligned" sees the started model, in which all layers before it are what they became.
    seen = captured(lora.model if method == "aligned" else original, batches, paths)
    rows = start_report(lora).layers
    assert [row.path for row in rows] == paths
    for row in rows:
        W, E = full[row.path], left_over(lora, row.path, full[row.path])
        zero = W - round_blocks(W, 4, 64)
        assert row.error == pytest.approx(np.linalg.norm(E) / np.linalg.norm(W), rel=RELATIVE)
        assert row.zero_error == pytest.approx(np.linalg.norm(zero) / np.linalg.norm(W), rel=RELATIVE)
        if method not in CALIBRATED:
            assert (row.output_error, row.tokens) == (None, None)
            continue
        R = moments(seen[row.path], batches)
        R = R.diagonal() if method == "qera-diag" else R
        aim = next(aim for weight, aim in aims if np.array_equal(weight, W))
        assert np.array_equal(aim, W) or method == "aligned"
        assert row.output_error == pytest.approx(size_of(E + aim - W, R) / size_of(aim, R), rel=RELATIVE)
        assert row.zero_output_error == pytest.approx(size_of(zero, R) / size_of(W, R), rel=RELATIVE)
        calls = zip(batches, seen[row.path], strict=True)
        assert row.tokens == sum(shown(value, b) for b, values in calls for value in values)


@pytest.mark.slow
@pytest.mark.parametrize("method", CALIBRATED)
def test_an_embedding_is_weighed_by_its_tokens_frequencies(method: str) -> None:
    model, batches = tiny_llama(), text(padded=True)
    W = double(model.get_input_embeddings().weight).T
    lora = apply_lora(model, config(method, batches, target_modules=["embed_tokens", "q_proj"]))
    row = next(row for row in start_report(lora).layers if row.path.endswith("embed_tokens"))
    ids = torch.cat([b["input_ids"][b["attention_mask"] != 0] for b in batches])
    frequencies = np.bincount(ids.numpy(), minlength=VOCABULARY) / len(ids)
    E = left_over(lora, row.path, W)
    assert row.output_error == pytest.approx(size_of(E, frequencies) / size_of(W, frequencies), rel=RELATIVE)
    # Tokens that the text shows are met more closely than those that it doesn't.
    relative = np.linalg.norm(E, axis=0) / np.maximum(np.linalg.norm(W, axis=0), 1e-9)  # padding's row is 0
    assert relative[frequencies > 0.02].mean() < relative[1:][frequencies[1:] == 0].mean()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_a_start_is_repeatable_and_calls_back_the_training_mode(method: str) -> None:
    found = []
    for _ in range(2):
        model = tiny_llama().train()
        model.get_submodule("model.layers.1").eval()
        lora = apply_lora(model, config(method, texts(), loftq_bits=2))
        assert model.training
        found.append(lora.state_dict())
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_autocast_around_it_changes_no_start(method: str) -> None:
    """Sums and products of weights and moments are of float32, and the text's forward is the model's own."""
    options = config(method, texts(), loftq_bits=2)
    plain = apply_lora(tiny_llama(), options).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        within = apply_lora(tiny_llama(), options).state_dict()
    assert plain.keys() == within.keys()
    assert all(torch.equal(value, within[name]) for name, value in plain.items())


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.slow
def test_a_4_bit_base_starts_from_its_weights_under_the_inputs(method: str, llama_dir: Path) -> None:
    ids = [{**batch(), "use_cache": False} for _ in range(5)]
    for number, b in enumerate(ids):
        b["input_ids"] = b["labels"] = (b["input_ids"] * 7 + 3 * number) % 128
    full = LlamaForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    model = load(llama_dir, "4-bit", torch.float32)
    stored = {n: p.detach().clone() for n, p in model.named_parameters()}
    original = copy.deepcopy(model)
    protect_storage_(original)  # bitsandbytes' evaluation forward would repack its weights, or fail
    lora = apply_lora(model, config(method, ids, r=4, weights=str(llama_dir), damping=0.01))
    seen = captured(lora.model if method == "aligned" else original, ids, list(lora.adapter_layers()))
    weights = weights_of(full, list(lora.adapter_layers()))
    for row in start_report(lora).layers:
        base = lora.adapter_layers()[row.path].base_layer
        assert torch.equal(base.weight, stored[f"{row.path}.weight"])
        R = moments(seen[row.path], ids)
        R = np.diag(R.diagonal()) if method == "qera-diag" else R
        E, W = left_over(lora, row.path, weights[row.path]), weights[row.path]
        assert row.output_error == pytest.approx(size_of(E, R) / size_of(W, R), rel=RELATIVE)
        # The least possible of that rank, by the symmetric root of the moments, damped as asked for.
        values, vectors = np.linalg.eigh(R + 0.01 * R.diagonal().mean() * np.eye(len(R)))
        root = vectors * np.sqrt(values) @ vectors.T
        quantized = double(codec_for(base).read(base))
        least = np.linalg.norm(np.linalg.svd((W - quantized) @ root, compute_uv=False)[4:])
        assert np.linalg.norm(E @ root) == pytest.approx(least, rel=RELATIVE)
        assert row.output_error < row.zero_output_error


@pytest.mark.slow
def test_a_second_adapter_starts_beside_the_first_where_the_base_stays(llama_dir: Path) -> None:
    ids = torch.randint(128, (16, 12))
    model = load(llama_dir, "4-bit", torch.float32)
    lora = apply_lora(model, config("qera", ids, weights=str(llama_dir)), "one")
    first = {key: value.clone() for key, value in lora.state_dict().items()}
    lora.add_adapter("two", config("aligned", ids, r=4, weights=str(llama_dir)))
    assert {row.rank for row in start_report(lora, "two").layers} == {4}
    assert all(torch.equal(value, lora.state_dict()[key]) for key, value in first.items())
    full = weights_of(LlamaForCausalLM.from_pretrained(llama_dir, dtype=torch.float32), list(lora.adapter_layers()))
    for row in start_report(lora, "two").layers:
        E = left_over(lora, row.path, full[row.path], "two")
        assert row.error == pytest.approx(np.linalg.norm(E) / np.linalg.norm(full[row.path]), rel=RELATIVE)


def test_tied_weights_stay_tied_and_as_they_were() -> None:
    model = gpt2()
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    lora = apply_lora(model, config("aligned", texts()))
    assert "lm_head" not in lora.adapter_layers()
    assert model.lm_head.weight is table is model.get_input_embeddings().weight
    assert torch.equal(table, before)


@pytest.mark.slow
def test_text_and_tokens_calibrate_as_batches_do(tmp_path: Path) -> None:
    folder = write_tiny_lm(tmp_path / "lm")
    (tmp_path / "text.txt").write_text("".join(f"{number:07d}," for number in range(64)))
    found = []
    for source in (tmp_path / "text.txt", str(tmp_path / "text.txt"), "builtin"):
        model = LlamaForCausalLM.from_pretrained(folder)
        options = {"calibration_rows": 4, "calibration_tokens": 128}
        lora = apply_lora(model, config("qera", source, target_modules=["up_proj"], **options))
        assert {row.tokens for row in start_report(lora).layers} == {512}
        found.append(torch.cat([layer.factors("default")[0] for layer in lora.adapter_layers().values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_calibrated_adapter_is_saved_without_its_calibration(tmp_path: Path) -> None:
    ids = torch.randint(1, VOCABULARY, (6, 12))
    lora = apply_lora(tiny_llama(), config("qera", ids))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model has no name
        lora.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
