"""Adapters that learn from the original: what they gain, whatever they are beside, and what stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from learners import changed, distance, labels_of, lively, rows, started, state
from small_models import WIDTH, bert, gpt2, mixtral, seeded, t5, tokens, vectors
from tiny_llama import VOCABULARY
from torch import Tensor, nn

from loftq import Distillation, distill, soft_labels
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora, merge
from qlora_kit.compat.peft import get_peft_model

STORAGES = ["nf4", "int8", "signed2", "trellis2", "bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
def test_it_comes_nearer_on_rows_that_it_never_saw(storage: str) -> None:
    labels, lora = labels_of(32), started(storage)
    lora.train()
    before, fresh = state(lora), labels_of(16, seed=1)
    away = distance(lora, fresh)
    found = distill(lora, labels, passes=3, learning_rate=3e-3)
    assert found.kept
    assert found.after < found.before
    assert (found.steps, found.rows) == (round(3 * 30 / 8), 30)
    assert distance(lora, fresh) < 0.98 * away
    names = changed(before, lora)
    assert names
    assert all("lora_A" in name or "lora_B" in name for name in names), "the base stays, bit for bit"
    assert all(module.training for module in lora.modules())
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in lora.named_parameters() if "lora_" in name}
    assert all(parameter.grad is None for parameter in lora.parameters())


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


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_others() -> None:
    labels = labels_of()
    found = []
    for seed in (0, 0, 1):
        lora = started()
        distill(lora, labels, passes=1.5, learning_rate=1e-3, batch_rows=3, seed=seed)
        found.append(state(lora))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


@pytest.mark.slow
def test_factors_in_half_precision_move_too() -> None:
    lora = started("nf4")
    for layer in lora.adapter_layers().values():
        for tensor in layer.adapter_tensors("default").values():
            tensor.data = tensor.data.bfloat16()
    before = state(lora)
    found = distill(lora, labels_of(24), learning_rate=3e-4)
    assert found.kept
    assert len(changed(before, lora)) == 2 * len(lora.adapter_layers())


@pytest.mark.slow
def test_the_active_adapter_alone_learns_and_nothing_beside_it() -> None:
    lora = started(modules_to_save=["lm_head"], bias="all")
    lora.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian"))
    before, labels = state(lora), labels_of()
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


class Scores(nn.Module):
    """One number of each row of vectors, as rewards and regressions are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": x.mean(), "logits": self.layers(x)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (bert, "all-linear"),
        (gpt2, "all-linear"),
        (t5, ["q", "o", "wi", "wo"]),
        (mixtral, ["q_proj", "o_proj"]),
        (Scores, ["layers.0", "layers.2", "layers.4"]),
    ],
)
def test_other_models_and_such_without_logits(make: Any, targets: Any) -> None:
    text = vectors(4, rows=24) if make is Scores else tokens(10)
    if make in (gpt2, t5, mixtral):  # of whose loss, and of T5's decoder, the same is to be learned
        text = [{**batch, "labels": batch["input_ids"]} for batch in text]
    labels = soft_labels(seeded(make), text)
    assert torch.is_tensor(labels.labels[0]) == (make in (bert, Scores))
    loftq = LoftQConfig(loftq_bits=2, method="loftq", calibration=None)
    lora = apply_lora(
        seeded(make), LoraConfig(r=2, target_modules=targets, init_lora_weights="loftq", loftq_config=loftq)
    )
    found = distill(lora, labels, learning_rate=1e-3)
    assert found.kept
    assert found.after < found.before


def two(lora: LoraModel) -> None:
    other = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_rslora=True, alpha_pattern={"q_proj": 7})
    lora.add_adapter("other", other)
    lora.set_adapter(["default", "other"])


def checkpointing(lora: LoraModel) -> None:
    lora.activation_checkpointing_enable()
    lora.enable_input_require_grads()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "then", "learning"),
    [
        ({}, two, {"default", "other"}),
        ({}, checkpointing, {"default"}),
        ({"inference_mode": True}, None, {"default"}),
        ({"merge_aware": "int8"}, None, {"default"}),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}, "lora_dropout": 0.5}, None, {"default"}),
    ],
)
def test_adapters_of_every_kind_learn(options: Any, then: Any, learning: set[str]) -> None:
    lora = started("nf4", **options).train()
    if then is not None:
        then(lora)
    before = state(lora)
    trained = [parameter.requires_grad for parameter in lora.parameters()]
    found = distill(lora, labels_of(32), learning_rate=2e-3)
    assert found.kept
    names = changed(before, lora)
    assert {name for name in learning if any(f".{name}" in key for key in names)} == learning
    assert all("lora_" in name for name in names)
    assert [parameter.requires_grad for parameter in lora.parameters()] == trained
    assert distance(lora, labels_of(32)) == pytest.approx(found.after), (
        "no dropout, no copy from before: it is measured as it computes"
    )


@pytest.mark.slow
def test_factors_that_two_layers_share_learn_once() -> None:
    """Those of a table of words and of the head that is tied to it."""
    words = ["embed_tokens", "lm_head"]

    def tied() -> Any:
        return lively(tied=True)

    labels = soft_labels(tied(), rows(48))
    model = tied()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.05)
    lora = apply_lora(model, LoraConfig(r=4, target_modules=[*words, "q_proj"], ensure_weight_tying=True))
    before = state(lora)
    found = distill(lora, labels, learning_rate=1e-4)
    assert found.kept
    names = {name for name in changed(before, lora) if "lora_embedding" in name or "transposed" in name}
    assert names, "the shared ones learn"
    embedding, head = (lora.adapter_layers()[path] for path in ("model.embed_tokens", "lm_head"))
    assert torch.equal(embedding.factors("default")[0], head.factors("default")[1].T)


def test_a_model_under_peft_s_names_learns_the_same() -> None:
    found = []
    for make in (apply_lora, get_peft_model):
        model = lively()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(1.5)  # type: ignore[union-attr, index, operator]
        torch.manual_seed(0)
        lora: Any = make(model, LoraConfig(r=4, target_modules=["down_proj"]))
        assert distill(lora, labels_of(24), learning_rate=1e-3).kept
        found.append([tensor for name, tensor in lora.state_dict().items() if "lora_" in name])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_rows_of_padding_alone_are_passed_over() -> None:
    mask = torch.ones(12, 12, dtype=torch.int64)
    mask[[0, 6]] = 0
    mask[1, :5] = mask[2, 7:] = 0
    for make in (lively, bert):
        ids = rows() % 60
        labels = soft_labels(make(), [{"input_ids": ids, "attention_mask": mask}])
        assert len(labels.rows) == 10
        assert labels.labels[0][0].shape[0] == 7 if make is lively else len(labels.labels[0]) == 7
        lora = apply_lora(make(), LoraConfig(r=2, target_modules="all-linear"))
        assert distance(lora, labels) == pytest.approx(0, abs=1e-9)


def test_few_rows_are_gone_through_as_often_as_many() -> None:
    found = distill(started("nf4"), labels_of(3), passes=4)
    assert (found.rows, found.steps) == (2, 4)


def test_labels_are_a_copy_of_what_made_them() -> None:
    ids = rows(2)
    labels = soft_labels(lively(), ids)
    ids.zero_()
    assert torch.equal(torch.cat([row["input_ids"] for row in labels.rows]), rows(2))


def test_labels_are_small_and_of_the_text(tmp_path: Any) -> None:
    labels = soft_labels(lively(), rows(), likeliest_words=5)
    assert len(labels.rows) == 12
    assert labels.nbytes == 12 * 12 * 5 * 8
    expected = lively()(input_ids=rows()).logits.argmax(-1)
    assert torch.equal(torch.stack([own.ids[:, 0].long() for own in labels.labels]), expected)  # type: ignore[union-attr]


def test_a_merged_model_of_it_computes_what_it_does() -> None:
    """What was learned is an adapter like any other."""
    lora = started("bfloat16")
    distill(lora, labels_of(24), learning_rate=1e-3)
    with torch.no_grad():
        expected = lora.eval()(input_ids=rows()).logits.float()
        found = merge(lora, into="float32").model.eval()(input_ids=rows()).logits.float()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_what_is_printed() -> None:
    said = str(Distillation(0.2, 0.1, True, 30, 120, 12.3))
    assert said == "distance from the original on held-out rows: 0.2 before and 0.1 after 30 steps on 120 rows (12 s)"
