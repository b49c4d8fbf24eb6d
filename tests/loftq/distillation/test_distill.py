"""Adapters that learn from the original: what they gain, what stays as it was, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import bert, gpt2
from tiny_llama import VOCABULARY, llama
from torch import Tensor, nn

from loftq import Distillation, distill, soft_labels
from qlora_kit import AdapterError, ConfigError, LoftQConfig, LoraConfig, LoraModel, apply_lora, merge
from qlora_kit.codecs import find_codec

STORAGES = ["nf4", "int8", "signed2", "trellis2", "bfloat16"]


def rows(count: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(seed))


def lively(**settings: Any) -> nn.Module:
    """A model that foretells more than that all tokens are alike."""
    model = llama(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def started(storage: str = "signed2", **options: Any) -> LoraModel:
    model = lively()
    if storage == "bfloat16":
        config = LoraConfig(r=4, target_modules="all-linear", **options)
        lora = apply_lora(model.bfloat16(), config)
        with torch.no_grad():
            for layer in lora.adapter_layers().values():
                layer.base_layer.weight.mul_(1.1)
        return lora
    bits = int(storage[-1])
    loftq = LoftQConfig(loftq_bits=bits, quant_type=storage, method="loftq", calibration=None)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=loftq, **options)
    lora = apply_lora(model, config)
    if storage == "int8":  # which leaves next to nothing to learn
        torch.manual_seed(0)
        for layer in lora.adapter_layers().values():
            layer.factors("default")[1].data.add_(0.05 * torch.randn(layer.factors("default")[1].shape))
    return lora


def state(lora: LoraModel) -> dict[str, Tensor]:
    found = {name: tensor.detach().clone() for name, tensor in lora.state_dict().items()}
    for path, layer in lora.adapter_layers().items():
        codec = find_codec(layer.base_layer)
        assert codec is not None
        found[f"{path} read"] = codec.read(layer.base_layer).clone()
    return found


def changed(before: dict[str, Tensor], lora: LoraModel) -> set[str]:
    return {name for name, tensor in state(lora).items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("storage", STORAGES)
def test_it_comes_nearer_on_rows_that_it_never_saw(storage: str) -> None:
    labels, lora = soft_labels(lively(), rows(48)), started(storage)
    lora.train()
    before, fresh = state(lora), soft_labels(lively(), rows(8, seed=1))
    away = distance(lora, fresh)
    found = distill(lora, labels, passes=4, learning_rate=3e-3)
    assert found.kept
    assert found.after < found.before
    assert (found.steps, found.rows) == (round(4 * 45 / 8), 45)
    assert distance(lora, fresh) < 0.97 * away
    names = changed(before, lora)
    assert names
    assert all("lora_A" in name or "lora_B" in name for name in names), "the base stays, bit for bit"
    assert all(module.training for module in lora.modules())
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in lora.named_parameters() if "lora_" in name}
    assert all(parameter.grad is None for parameter in lora.parameters())


def distance(lora: LoraModel, labels: Any) -> float:
    """Of ``lora`` from labels, without learning anything."""
    found = distill(lora, labels, passes=1e-9, learning_rate=1e-30)
    return found.before


def test_a_step_is_adamw_s_on_the_plain_divergence() -> None:
    """In one step Adam's direction is the sign of the gradient wherever that is well above its epsilon."""
    original, ids = lively(), rows(1).repeat(3, 1)
    lora = started("nf4")
    mine = copy.deepcopy(lora)
    assert distill(lora, soft_labels(original, ids, likeliest_words=VOCABULARY), passes=0.1, learning_rate=1e-4).kept
    shown = ids[:2]  # the third is held out
    with torch.no_grad():
        p = original(input_ids=shown).logits.log_softmax(-1)
    (p.exp() * (p - mine.eval()(input_ids=shown).logits.log_softmax(-1))).sum().backward()
    for (name, new), old in zip(lora.named_parameters(), mine.parameters(), strict=True):
        if "lora_" in name:
            assert old.grad is not None
            told = old.grad.abs() > 1e-4 * old.grad.abs().max()
            assert told.float().mean() > 0.8
            moved = new.detach().double() - old.detach().double()
            torch.testing.assert_close(moved[told], -1e-4 * old.grad[told].sign().double(), rtol=1e-2, atol=0.0)


def test_the_same_seed_gives_the_same_bits_and_another_others() -> None:
    labels = soft_labels(lively(), rows(48))
    found = []
    for seed in (0, 0, 1):
        lora = started()
        assert distill(lora, labels, passes=1.5, learning_rate=1e-3, batch_rows=3, seed=seed).kept
        found.append(state(lora))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_no_gain_leaves_what_was_and_says_so() -> None:
    lora = started("nf4")
    before = state(lora)
    found = distill(lora, soft_labels(lively(), rows()), learning_rate=30.0)
    assert not found.kept
    assert "no gain" in str(found)
    assert changed(before, lora) == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whatever_ends_it_leaves_what_was(error: type[BaseException]) -> None:
    lora = started().train()
    before = state(lora)

    def stop(done: int, number: int) -> None:
        assert number == 3
        if done == 2:
            raise error

    with pytest.raises(error):
        distill(lora, soft_labels(lively(), rows()), learning_rate=1e-2, progress=stop)
    assert changed(before, lora) == set()
    assert all(module.training for module in lora.modules())
    assert all(parameter.grad is None for parameter in lora.parameters())


def test_factors_in_half_precision_move_too() -> None:
    lora = started("nf4")
    for layer in lora.adapter_layers().values():
        for tensor in layer.adapter_tensors("default").values():
            tensor.data = tensor.data.bfloat16()
    before = state(lora)
    found = distill(lora, soft_labels(lively(), rows(48)), learning_rate=3e-4)
    assert found.kept
    assert len(changed(before, lora)) == 2 * len(lora.adapter_layers())


def test_the_active_adapter_alone_learns_and_nothing_beside_it() -> None:
    lora = started(modules_to_save=["lm_head"], bias="all")
    lora.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian"))
    before, labels = state(lora), soft_labels(lively(), rows(24))
    distill(lora, labels, learning_rate=1e-3)
    names = changed(before, lora)
    assert names
    assert all(".default" in name and "lora_" in name for name in names)
    lora.set_adapter("other")
    before = state(lora)
    distill(lora, labels, learning_rate=1e-3)
    assert all(".other" in name for name in changed(before, lora))


def test_padding_says_nothing() -> None:
    ids = rows(6)
    mask = torch.ones_like(ids)
    padded = torch.cat([ids, torch.zeros(6, 3, dtype=torch.int64)], 1)
    hidden = torch.cat([mask, torch.zeros(6, 3, dtype=torch.int64)], 1)
    plain = soft_labels(lively(), [{"input_ids": ids, "attention_mask": mask}])
    other = soft_labels(lively(), [{"input_ids": padded, "attention_mask": hidden}])
    assert plain.nbytes == other.nbytes
    found = [distance(started(), labels) for labels in (plain, other)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_other_models_and_such_without_logits(make: Any) -> None:
    labels = soft_labels(make(), torch.randint(1, 60, (40, 9), generator=torch.Generator().manual_seed(0)))
    loftq = LoftQConfig(loftq_bits=2, method="loftq", calibration=None)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="loftq", loftq_config=loftq)
    lora = apply_lora(make(), config)
    found = distill(lora, labels, learning_rate=3e-3)
    assert found.kept
    assert found.after < found.before


def test_labels_are_small_and_of_the_text(tmp_path: Any) -> None:
    labels = soft_labels(lively(), rows(), likeliest_words=5)
    assert len(labels.rows) == 12
    assert labels.nbytes == 12 * 12 * 5 * 8
    expected = lively()(input_ids=rows()).logits.argmax(-1)
    assert torch.equal(torch.stack([own.ids[:, 0].long() for own in labels.labels]), expected)  # type: ignore[union-attr]


def test_what_can_t_be_learned_from_is_refused() -> None:
    lora, labels = started(), soft_labels(lively(), rows())
    with pytest.raises(ConfigError, match="labels: expected two rows or more, one to hold out, found 1"):
        distill(lora, soft_labels(lively(), rows(1)))
    other = soft_labels(lively(vocab_size=2 * VOCABULARY), rows())
    with pytest.raises(ConfigError, match="labels: expected those of a model with outputs of the same shape"):
        distill(lora, other)
    with pytest.raises(ConfigError, match="labels: expected those of a model with outputs of the same shape"):
        distill(lora, replace(labels, rows=[{"input_ids": row["input_ids"][:, :5]} for row in labels.rows]))
    for name in ("passes", "learning_rate", "batch_rows"):
        with pytest.raises(ConfigError, match=name):
            distill(lora, labels, **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rows"):
        soft_labels(lively(), rows=0)
    broken = lively()
    broken.lm_head.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, operator]
    with pytest.raises(ConfigError, match="soft_labels: expected finite outputs of LlamaForCausalLM"):
        soft_labels(broken, rows())
    lora.merge_adapter()
    with pytest.raises(AdapterError, match="found it merged; unmerge it first"):
        distill(lora, labels)


def test_without_an_adapter_at_work_it_is_refused() -> None:
    lora, labels = started("nf4"), soft_labels(lively(), rows())
    with lora.disable_adapter(), pytest.raises(AdapterError, match="expected an active adapter to learn, found none"):
        distill(lora, labels)


def test_gradients_that_never_are_finite_are_said() -> None:
    lora, labels = started("nf4"), soft_labels(lively(), rows())

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
        distill(lora, labels, passes=40)
    hook.remove()
    assert changed(before, lora) == set()


def test_a_merged_model_of_it_computes_what_it_does() -> None:
    """What was learned is an adapter like any other."""
    lora = started("bfloat16")
    distill(lora, soft_labels(lively(), rows(24)), learning_rate=1e-3)
    with torch.no_grad():
        expected = lora.eval()(input_ids=rows()).logits.float()
        found = merge(lora, into="float32").model.eval()(input_ids=rows()).logits.float()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_what_is_printed() -> None:
    said = str(Distillation(0.2, 0.1, True, 30, 120, 12.3))
    assert said == "distance from the original on held-out rows: 0.2 before and 0.1 after 30 steps on 120 rows (12 s)"
