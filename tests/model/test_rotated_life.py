"""Models in trellis types, a life long: quantized, adapted, trained in both forms, merged; started on disk, planned."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_llama import adapted, batch, llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import loftq.cli
import qlora_kit
import qlora_kit.cli
from loftq.starts.report import Report
from qlora_kit import LoraModel, merge, quantize_
from qlora_kit.codecs import codec_for
from qlora_kit.codecs.packed import PackedLinear
from qlora_kit.errors import CodecError
from qlora_kit.training.planner import plan_memory


def packed(model: nn.Module) -> dict[str, PackedLinear]:
    """By path, whether adapters are in the model or not."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    return {path[path.index("layers.") :].removesuffix(".base_layer"): module for path, module in found.items()}


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {path: module.weight.data.clone() for path, module in packed(model).items()}


@pytest.fixture
def lora() -> LoraModel:
    model = quantize_(llama(), 2, quant_type="trellis2", double_quant=True)
    lora = adapted(model)
    for parameter in lora.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return lora


def gradients(lora: LoraModel, form: str) -> tuple[float, dict[str, Tensor]]:
    lora.zero_grad()
    with qlora_kit.set_branch(form):
        loss = lora.train()(**batch()).loss
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in lora.named_parameters() if p.grad is not None}


def test_both_forms_of_the_branch_give_the_dense_models_gradients(lora: LoraModel) -> None:
    dense = copy.deepcopy(lora)
    for path, layer in dense.adapter_layers().items():
        base = layer.base_layer
        assert isinstance(base, PackedLinear), path
        layer.base_layer = codec_for(base).dense_like(base, torch.float32).requires_grad_(False)
    loss, expected = gradients(dense, "plain")
    for form in ("plain", "fused"):
        found_loss, found = gradients(lora, form)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert found.keys() == expected.keys()
        largest = max(grad.abs().max() for grad in expected.values())
        assert max((found[name] - expected[name]).abs().max() for name in expected) <= 1e-4 * largest


def test_checkpointing_changes_nothing_and_training_learns(lora: LoraModel) -> None:
    loss, expected = gradients(lora, "auto")
    lora.activation_checkpointing_enable()
    again, found = gradients(lora, "auto")
    assert again == loss
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    before, optimizer = codes(lora), torch.optim.Adam([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        lora(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert lora(**batch()).loss.item() < 0.9 * loss
    assert all(torch.equal(weight, before[path]) for path, weight in codes(lora).items())


@pytest.mark.parametrize("options", [{}, {"rounding": "error-feedback"}, {"rounding": "scale-search"}])
def test_a_delta_of_nothing_leaves_every_code(lora: LoraModel, options: dict[str, str]) -> None:
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    before = codes(lora)
    if options.get("rounding") == "error-feedback":
        options = {**options, "statistics": [batch()]}
    model = merge(lora, force=True, **options).model
    assert codes(model).keys() == before.keys()
    assert all(torch.equal(weight, before[path]) for path, weight in codes(model).items())


@pytest.mark.slow
def test_merges_with_error_feedback_bring_more_of_the_output(lora: LoraModel) -> None:
    ids = batch()["input_ids"]
    with torch.no_grad():
        wanted = lora.eval()(ids).logits
        off = {}
        for rounding in ("nearest", "error-feedback"):
            options = {"statistics": [batch()]} if rounding == "error-feedback" else {}
            merged = merge(copy.deepcopy(lora), rounding=rounding, force=True, **options).model
            assert {module.quant_type for module in packed(merged).values()} == {"trellis2"}
            off[rounding] = (merged.eval()(ids).logits - wanted).norm().item()
    assert off["error-feedback"] < off["nearest"]


@pytest.mark.slow
def test_started_on_disk_verified_and_loaded(llama_dir: Path, tmp_path: Path) -> None:
    command = f"init --model {llama_dir} --out {tmp_path}/out --bits 2 --quant-type trellis2 --rank 4 --method loftq"
    outcome = CliRunner().invoke(loftq.cli.app, command.split())
    assert outcome.exit_code == 0, outcome.output
    rows = Report.load(tmp_path / "out").layers
    assert {row.quant_type for row in rows} == {"trellis2"}
    assert all(row.error < row.quantization_error for row in rows)
    checked = CliRunner().invoke(loftq.cli.app, ["verify", str(tmp_path / "out"), "--against", str(llama_dir)])
    assert checked.exit_code == 0, checked.output
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {module.quant_type for module in packed(base).values()} == {"trellis2"}
    lora = LoraModel.from_pretrained(base, tmp_path / "out" / "loftq_init").eval()
    assert lora(**batch()).loss.isfinite()


@pytest.mark.slow
def test_a_plan_counts_what_the_model_then_has(llama_dir: Path) -> None:
    plan = plan_memory(llama_dir, bits=2, quant_type="trellis2", rank=4, seq=16, batch=1)
    model = quantize_(AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16), 2, quant_type="trellis2")
    parts = plan.to_dict()["parts"]
    held = sum(codec_for(module).nbytes(module) for module in packed(model).values())
    assert parts["k-bit weights"] + parts["k-bit scales"] == held


def test_names_near_one_are_offered() -> None:
    with pytest.raises(CodecError, match="trellis2"):
        quantize_(llama(), quant_type="treliss2")
