"""The gradient check finds adapters that training doesn't reach, and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama import adapted, batch, llama, load
from torch import Tensor, nn

from qlora_kit import AdapterError, LoraConfig, apply_lora, check_gradients, prepare_model_for_kbit_training


def test_check_runs_its_own_backward_and_leaves_no_trace() -> None:
    lora = apply_lora(llama(), LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5)).eval()
    random = torch.get_rng_state()
    report = check_gradients(lora, **batch())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in lora.parameters())
    assert not any(module.training for module in lora.modules())
    assert list(report.norms) == [f"model.layers.{i}.self_attn.q_proj (default)" for i in range(2)]
    assert "gradients reach all 2 trainable adapters" in str(report)
    assert report.to_dict() == {"norms": report.norms}


def test_check_without_labels_and_after_a_backward() -> None:
    lora = adapted(llama())
    check_gradients(lora, input_ids=batch()["input_ids"])
    lora(**batch()).loss.backward()
    given = {name: p.grad.clone() for name, p in lora.named_parameters() if p.requires_grad}
    norms = check_gradients(lora).norms
    path = "model.layers.0.mlp.up_proj"
    expected = sum(g.square().sum() for name, g in given.items() if name.startswith(f"model.{path}.")).sqrt()
    assert norms[f"{path} (default)"] == pytest.approx(expected.item(), rel=1e-5)  # float32 sums in another order


def test_check_names_what_is_wrong() -> None:
    with pytest.raises(AdapterError, match="expected a model with adapters, found LlamaForCausalLM without any"):
        check_gradients(llama())
    lora = adapted(llama())
    with pytest.raises(AdapterError, match=r"14 of 14 .*q_proj \(default\).*no backward pass was run"):
        check_gradients(lora)
    lora(**batch()).logits.mul(0).sum().backward()
    with pytest.raises(AdapterError, match=r"all labels -100"):
        check_gradients(lora)
    lora.zero_grad()
    lora.merge_adapter()
    with pytest.raises(AdapterError, match=r"call unmerge_adapter\(\)"):
        check_gradients(lora)
    lora.unmerge_adapter()
    lora.requires_grad_(False)
    with pytest.raises(AdapterError, match="found 14 frozen ones"):
        check_gradients(lora)


def test_check_finds_an_unused_module_and_an_overflow() -> None:
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    lora = apply_lora(TwoTowers(), LoraConfig(r=2, target_modules=["used", "unused"]))
    with pytest.raises(
        AdapterError, match=r"1 of 2 trainable adapters: unused \(default\)\. .*took no part in the loss"
    ):
        check_gradients(lora, x=torch.randn(2, 4))
    with pytest.raises(AdapterError, match="a value overflowed"):
        check_gradients(lora, x=torch.full((2, 4), float("inf")))


def test_check_finds_reentrant_checkpointing_without_input_gradients(llama_dir: Path) -> None:
    model = load(llama_dir, "dense", torch.float32)
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(AdapterError, match=r"use_reentrant=False"),
    ):
        check_gradients(adapted(model), **batch())
