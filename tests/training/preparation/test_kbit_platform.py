"""Prepared models under evaluation, copies, generation, compilation and activation checkpointing."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointing import is_checkpointing
from tiny_llama import STORAGES, adapted, batch, llama, load
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    PreTrainedModel,
)

from qlora_kit import check_gradients, prepare_model_for_kbit_training

# -- protection from the platform ----------------------------------------------------------------------------


def test_evaluation_does_not_change_4bit_weights(llama_dir: Path) -> None:
    """On CPUs with AVX512_BF16 an unprotected evaluation forward rewrites packed weights in place."""
    model = prepare_model_for_kbit_training(load(llama_dir, "4-bit", torch.bfloat16)).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scales = {name: p.quant_state.absmax.clone() for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    assert len(scales) == 14
    with torch.no_grad():
        model(**batch())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        if name in scales:
            assert torch.equal(parameter.quant_state.absmax, scales[name]), name


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_copies_right_after_training(llama_dir: Path, storage: str) -> None:
    """Evaluation, deepcopy, a pickle of the model and of its state all show the same trained model."""
    lora = adapted(prepare_model_for_kbit_training(load(llama_dir, storage, torch.bfloat16))).train()
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        lora(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lora.eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    with torch.no_grad():
        expected = lora(**inputs).logits
        assert torch.equal(lora(**inputs).logits, expected)
        assert torch.equal(copy.deepcopy(lora)(**inputs).logits, expected)
        assert torch.equal(pickled(lora)(**inputs).logits, expected)
        state = pickled(lora.state_dict())
        other = adapted(prepare_model_for_kbit_training(load(llama_dir, storage, torch.bfloat16))).eval()
        assert not torch.equal(other(**inputs).logits, expected)
        trained = {name: value for name, value in state.items() if "lora_" in name}
        other.load_state_dict(trained, strict=False)
        assert torch.equal(other(**inputs).logits, expected)


def pickled(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
def test_generate(llama_dir: Path, storage: str) -> None:
    lora = adapted(prepare_model_for_kbit_training(load(llama_dir, storage, torch.bfloat16))).eval()
    ids = batch()["input_ids"][:1]
    out = lora.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 4)
    with torch.no_grad():
        greedy = ids
        for _ in range(4):
            greedy = torch.cat([greedy, lora(input_ids=greedy).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, greedy)


# Dynamo itself makes an object of torch.autograd.Function when it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
def test_compiled_forward(tmp_path: Path, storage: str) -> None:
    """Traced with Dynamo and run eagerly, so that equality is bitwise; hooks must not be lost on the way."""
    llama(num_hidden_layers=1).save_pretrained(tmp_path)  # every layer is traced anew
    lora = adapted(prepare_model_for_kbit_training(load(tmp_path, storage, torch.bfloat16))).eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    with torch.no_grad():
        assert torch.equal(torch.compile(lora, backend="eager")(**inputs).logits, lora(**inputs).logits)


# -- activation checkpointing --------------------------------------------------------------------------------


def test_checkpointing_is_non_reentrant_without_input_gradients(llama_dir: Path) -> None:
    plain = adapted(prepare_model_for_kbit_training(load(llama_dir, "4-bit", torch.bfloat16), False)).train()
    model = prepare_model_for_kbit_training(load(llama_dir, "4-bit", torch.bfloat16))
    assert plain.memory_bill.activation_checkpointing == "off"
    assert model.memory_bill.activation_checkpointing == "non-reentrant"
    assert not is_checkpointing(plain)
    assert is_checkpointing(model)
    lora = adapted(model).train()
    seen: list[bool] = []
    lora.get_input_embeddings().register_forward_hook(lambda *a: seen.append(a[2].requires_grad))
    torch.manual_seed(0)
    for name, parameter in lora.named_parameters():  # adapters of equal value, away from the zero start
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
            plain.get_parameter(name).data.copy_(parameter.data)
    losses = [m(**batch()).loss for m in (plain, lora)]
    for loss in losses:
        loss.backward()
    assert seen == [False]
    assert torch.equal(*losses)
    for name, parameter in lora.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, plain.get_parameter(name).grad), name


def test_checkpointing_saves_memory(llama_dir: Path) -> None:
    kept = {}
    for on in (False, True):
        lora = adapted(prepare_model_for_kbit_training(load(llama_dir, "dense", torch.bfloat16), on)).train()
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            lora(**batch())
        kept[on] = total
    assert kept[True] < kept[False] / 2


def test_reentrant_by_request_keeps_input_gradients(llama_dir: Path) -> None:
    model = load(llama_dir, "dense", torch.bfloat16)
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert model.memory_bill.activation_checkpointing == "reentrant"
    check_gradients(adapted(model), **batch())


def test_the_older_interface() -> None:
    class Older(nn.Linear):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
            self.given = gradient_checkpointing_kwargs

    model = prepare_model_for_kbit_training(Older(4, 4), True, {"preserve_rng_state": False})
    assert model.given == {"use_reentrant": False, "preserve_rng_state": False}
    assert model.memory_bill.activation_checkpointing == "non-reentrant"


def test_a_model_that_refuses_checkpointing() -> None:
    class Refuses(PreTrainedModel):
        config_class = LlamaConfig
        supports_gradient_checkpointing = False

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.linear = nn.Linear(4, 4)

    model = prepare_model_for_kbit_training(Refuses(LlamaConfig()))
    assert model.memory_bill.activation_checkpointing == "not offered by the model"
