"""What ends ``distill`` early, or before it begins: what is said, and that nothing has changed then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from learners import changed, labels_of, lively, rows, started, state
from tiny_llama import VOCABULARY
from torch import Tensor, nn

from loftq import SoftLabels, distill, soft_labels
from loftq.distillation import training
from qlora_kit import AdapterError, ConfigError, LoraConfig, apply_lora
from qlora_kit.compat.meta import to_meta_


def test_no_gain_leaves_what_was_and_says_so() -> None:
    lora = started("nf4")
    before = state(lora)
    found = distill(lora, labels_of(), learning_rate=30.0)
    assert not found.kept
    assert "no gain" in str(found)
    assert changed(before, lora) == set()


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["between steps", "on the way back", "at the end"])
def test_whatever_ends_it_leaves_what_was(
    error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = started().train()
    before, calls = state(lora), list[object]()

    def stop(*_: object) -> None:
        calls.append(_)
        if len(calls) == {"between steps": 2, "on the way back": 12, "at the end": 4}[where]:
            raise error

    def measured(*_: object) -> float:
        stop()
        stop()
        return 1.0

    if where == "on the way back":
        next(iter(lora.adapter_layers().values())).factors("default")[1].register_hook(stop)
    if where == "at the end":
        monkeypatch.setattr(training, "distance", measured)
    progress = stop if where == "between steps" else None
    with pytest.raises(error):
        distill(lora, labels_of(), learning_rate=1e-2, progress=progress)
    assert changed(before, lora) == set()
    assert all(module.training for module in lora.modules())
    assert all(parameter.grad is None for parameter in lora.parameters())


def test_what_can_t_be_learned_from_is_refused() -> None:
    lora, labels = started(), labels_of()
    with pytest.raises(ConfigError, match="labels: expected two rows or more, one to hold out, found 1"):
        distill(lora, labels_of(1))
    for name in ("passes", "learning_rate", "batch_rows"):
        with pytest.raises(ConfigError, match=name):
            distill(lora, labels, **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seed: expected an integer of at least 0, found None"):
        distill(lora, labels, seed=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="labels: expected what soft_labels returns, found Tensor; pass labels="):
        distill(lora, rows())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rows"):
        soft_labels(lively(), rows=0)
    broken = lively()
    broken.lm_head.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, operator]
    with pytest.raises(ConfigError, match="soft_labels: expected finite outputs of LlamaForCausalLM"):
        soft_labels(broken, rows())
    lora.merge_adapter()
    with pytest.raises(AdapterError, match="found it merged; unmerge it first"):
        distill(lora, labels)


def test_labels_of_another_model_are_refused_before_anything_is_learned() -> None:
    lora, labels = started(), labels_of()
    before, steps = state(lora), list[int]()
    other = soft_labels(lively(vocab_size=2 * VOCABULARY), rows(), likeliest_words=2)
    assert other.words > VOCABULARY
    said = rf"12 tokens of {other.words} words or more in row \d+ where it gives 12 tokens of {VOCABULARY} words"
    with pytest.raises(ConfigError, match=f"labels: expected outputs of the same shape as this model's, .*{said}"):
        distill(lora, other, progress=lambda done, _: steps.append(done))
    shorter = replace(labels, rows=[{"input_ids": row["input_ids"][:, :5]} for row in labels.rows])
    numbers = SoftLabels(labels.rows, [torch.ones(12, 4) for _ in labels.rows])
    for wrong in (shorter, numbers):
        with pytest.raises(ConfigError, match="labels: expected outputs of the same shape as this model's"):
            distill(lora, wrong, progress=lambda done, _: steps.append(done))
    with pytest.raises(ConfigError, match="SoftLabels: expected a label for each row, found 3 for 12 rows"):
        replace(labels, labels=labels.labels[:3])
    assert changed(before, lora) == set()
    assert steps == []


def test_text_of_padding_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="soft_labels: expected text, found padding alone"):
        soft_labels(lively(), [{"input_ids": rows(), "attention_mask": torch.zeros_like(rows())}])


def test_what_has_no_adapters_is_refused() -> None:
    import peft  # type: ignore[import-untyped]

    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(r=1, target_modules=["0"]))
    for model in (lively(), theirs):
        with pytest.raises(AdapterError, match=rf"expected a model with adapters .* found {type(model).__name__}"):
            distill(model, labels_of())  # type: ignore[arg-type]


def test_factors_that_can_t_learn_are_refused() -> None:
    lora = started("nf4")
    to_meta_(lora, "default")
    with pytest.raises(AdapterError, match="expected factors with values, found some on the meta device"):
        distill(lora, labels_of())
    with torch.inference_mode():
        lora = apply_lora(lively(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"found some that were made inside torch\.inference_mode"):
        distill(lora, labels_of())


def test_a_model_that_gives_no_numbers_isn_t_said_to_gain_nothing() -> None:
    lora = started("nf4")
    lora.get_base_model().model.norm.weight.data[0] = float("nan")  # type: ignore[union-attr, index, operator]
    before = state(lora)
    with pytest.raises(ConfigError, match="distill: expected finite outputs of LoraModel, found NaN or infinity"):
        distill(lora, labels_of())
    assert {name for name in changed(before, lora) if "lora_" in name} == set()


def test_a_model_in_pieces_is_refused_whichever_part_of_it_was_sharded() -> None:
    lora = apply_lora(lively(), LoraConfig(r=2, target_modules=["q_proj"]))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(lora.get_base_model(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(AdapterError, match="distill: expected a model with whole weights, found one that FSDP2"):
            distill(lora, labels_of())
    finally:
        dist.destroy_process_group()


def test_without_an_adapter_at_work_it_is_refused() -> None:
    lora, labels = started("nf4"), labels_of()
    with lora.disable_adapter(), pytest.raises(AdapterError, match="expected an active adapter to learn, found none"):
        distill(lora, labels)


def test_gradients_that_never_are_finite_are_said() -> None:
    lora, labels = started("nf4"), labels_of()

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * float("inf")

    before = state(lora)
    hook = lora.get_base_model().model.norm.register_forward_hook(lambda _, __, out: Overflow.apply(out))  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="distill: expected finite gradients"):
        distill(lora, labels, passes=4, batch_rows=1)
    hook.remove()
    assert changed(before, lora) == set()
