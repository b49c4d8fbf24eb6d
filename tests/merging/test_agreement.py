"""How far a merged model's output is from the adapted one's: in float64, on padded batches and texts of every kind."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_llama
import torch
from reference import agreement as reference
from reference import branches
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from qlora_kit import LoraConfig, MergeError, StorageError, apply_lora, merge, prepare_model_for_kbit_training
from qlora_kit.errors import ConfigError
from qlora_kit.merging.agreement import divergence_terms, output_of, shown_in
from qlora_kit.training.preparation.quantize import quantize_

IDS = torch.randint(1, 128, (3, 7), generator=torch.Generator().manual_seed(4))


def batches() -> list[dict[str, Tensor]]:
    mask = torch.ones_like(IDS)
    mask[0, 4:] = mask[2, 6:] = 0
    return [{"input_ids": IDS, "attention_mask": mask}, {"input_ids": IDS[:1].flip(1)}]


def adapted(model: nn.Module, targets: Any, **options: Any) -> Any:
    return apply_lora(model.eval(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)).eval()


@torch.no_grad()
def logits(model: Any, given: list[dict[str, Tensor]]) -> list[np.ndarray]:
    return [branches.array(model(**batch).logits) for batch in given]


def llama(storage: str | None = "nf4") -> Any:
    model = tiny_llama.llama(num_hidden_layers=1, intermediate_size=128)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # logits with first choices
    return model if storage is None else quantize_(model, quant_type=storage)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"into": "nf3"}, {"into": "bfloat16"}, {"residual_rank": 1, "weights": [2.0]}])
def test_every_number_by_its_definition(options: dict[str, Any]) -> None:
    given = batches()
    masks = [batch["attention_mask"].numpy() if "attention_mask" in batch else None for batch in given]
    ids = [batch["input_ids"].numpy() for batch in given]
    lora = adapted(llama(), "all-linear").train()
    scaled = copy.deepcopy(lora).eval()
    for layer in scaled.adapter_layers().values():
        layer.scaling["default"] *= options.get("weights", [1.0])[0]
    before = logits(scaled, given)
    report = merge(lora, text=given, force=True, **options)
    assert report.model.training, "measuring leaves the mode alone"
    after = logits(report.model.eval(), given)
    found = report.agreement
    assert found is not None
    expected = reference.agreement(before, after, masks)
    assert found.tokens == expected["tokens"] == 3 * 7 - 3 - 1 + 7
    # Logits of order 10 in float32; those of a bfloat16 model are as they are.
    assert found.error == pytest.approx(expected["error"], rel=1e-4)
    assert found.kl == pytest.approx(expected["kl"], rel=1e-3, abs=1e-9)
    assert found.top1 == pytest.approx(expected["top1"])
    assert found.loss_before == pytest.approx(reference.next_token_loss(before, ids, masks), rel=1e-5)
    assert found.loss_after == pytest.approx(reference.next_token_loss(after, ids, masks), rel=1e-5)
    line = str(report).splitlines()[-1]
    assert line.startswith(f"on {found.tokens} tokens of text: relative error of the output {found.error:.2e}, KL ")
    assert line.endswith(f"loss {found.loss_before:.4f} adapted, {found.loss_after:.4f} merged")
    assert report.to_dict()["agreement"]["kl"] == found.kl


def test_a_small_divergence_keeps_its_digits() -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((50, 30))
    for size in (1e-5, 1e-3, 1.0, 60.0):
        y = x + size * draw.standard_normal(x.shape)
        p, q = torch.tensor(x).float().log_softmax(-1), torch.tensor(y).float().log_softmax(-1)
        terms = divergence_terms(p, q)
        wide, other = p.double(), q.double()
        expected = (wide.exp() * (wide - other) - wide.exp() + other.exp()).sum()
        assert (terms >= -1e-7 * terms.max()).all()
        assert float(terms.sum()) == pytest.approx(float(expected), rel=1e-3)
    never = torch.tensor([0.0, -torch.inf])
    assert divergence_terms(never, never).tolist() == [0.0, 0.0], "what neither can choose"
    told = torch.tensor([0.25, 0.75]).log()
    assert float(divergence_terms(never, told).sum()) == pytest.approx(float(-told[0])), "what one alone can choose"


class Giving(nn.Module):
    """Gives what it is told to."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, **batch: Any) -> Any:
        return self.output


LOSS, LOGITS, HIDDEN = torch.tensor(0.5), torch.randn(2, 5, 7), torch.randn(2, 5, 3)


@pytest.mark.parametrize(
    ("output", "expected", "predicts"),
    [
        ({"loss": LOSS, "hidden": HIDDEN, "logits": LOGITS}, LOGITS, True),
        ({"loss": LOSS, "logits": (LOGITS, HIDDEN)}, LOGITS, True),
        (SimpleNamespace(logits=LOGITS), LOGITS, True),
        (SimpleNamespace(logits=LOGITS[..., :1]), LOGITS[..., :1], False),
        ({"pooled": LOGITS, "last_hidden_state": HIDDEN}, HIDDEN, False),
        ({"loss": LOSS, "start": HIDDEN}, HIDDEN, False),
        ((LOSS, None, HIDDEN), HIDDEN, False),
        (LOGITS, LOGITS, False),
    ],
)
def test_what_counts_as_a_model_s_output(output: Any, expected: Tensor, predicts: bool) -> None:
    found, known = output_of(Giving(output), {"input_ids": IDS, "labels": IDS})
    assert torch.equal(found, expected)
    assert known is predicts


def test_a_model_without_an_output_is_refused() -> None:
    with pytest.raises(ConfigError, match="Giving: expected an output with rows of numbers, found dict without"):
        output_of(Giving({"loss": LOSS}), {})


def test_the_mask_of_a_decoder_s_text_is_the_one_that_says_what_is_padding() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.equal(shown_in({"attention_mask": mask}, LOGITS), mask.bool())
    batch = {"attention_mask": mask, "decoder_input_ids": mask}
    assert shown_in(batch, LOGITS).all()
    assert torch.equal(shown_in({**batch, "decoder_attention_mask": 1 - mask}, LOGITS), mask == 0)


def test_an_encoder_has_hidden_states_alone() -> None:
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, intermediate_size=64, hidden_dropout_prob=0.0))
    lora = adapted(quantize_(model, quant_type="nf4", target_modules=["query", "value"]), ["query"])
    given = batches()
    with torch.no_grad():
        before = [branches.array(lora(**batch).last_hidden_state) for batch in given]
    report = merge(lora, into="nf3", text=given, force=True)
    with torch.no_grad():
        after = [branches.array(report.model(**batch).last_hidden_state) for batch in given]
    masks = [batch["attention_mask"].numpy() if "attention_mask" in batch else None for batch in given]
    expected, found = reference.agreement(before, after, masks), report.agreement
    assert found is not None
    assert (found.tokens, found.kl, found.top1, found.loss_before, found.loss_after) == (24, None, None, None, None)
    assert found.error == pytest.approx(expected["error"], rel=1e-4)
    assert str(found) == f"on 24 tokens of text: relative error of the output {found.error:.2e}"


def test_an_encoder_decoder_has_no_next_token_loss() -> None:
    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))
    lora = adapted(quantize_(model, quant_type="nf4", target_modules=["q", "v"]), ["q"])
    report = merge(lora, text=IDS, force=True)
    found = report.agreement
    assert found is not None
    assert (found.tokens, found.loss_before) == (21, None), "it starts from its own text"
    assert found.kl is not None
    assert found.kl >= 0


@pytest.mark.slow
def test_texts_of_every_kind(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, **{chr(97 + i): i + 1 for i in range(26)}}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 500)
    lora = adapted(llama(None), ["q_proj"])
    lora.model.config._name_or_path = str(tmp_path)
    tokens = {}
    for name, text in {
        "ids": IDS,
        "batches": [{"input_ids": IDS}],
        "file": tmp_path / "text.txt",
        "builtin": "builtin",
    }.items():
        found = merge(copy.deepcopy(lora), text=text).agreement
        assert found is not None
        tokens[name] = found.tokens
        assert found.error < 1e-5, name  # a dense merge in float32
    assert (tokens["ids"], tokens["batches"]) == (21, 21)
    assert tokens["file"] > 1000
    assert tokens["builtin"] > 1000
    errors: tuple[type[Exception], ...] = (MergeError, ConfigError, StorageError)
    for text, match in (
        ("nowhere.txt", "expected a text file or 'builtin', found no such file"),
        ([], "expected at least one batch"),
        (torch.empty(0, 4, dtype=torch.long), "expected token ids of shape"),
        (3, "found int"),
    ):
        with pytest.raises(errors, match=match):
            merge(lora, text=text)
    assert list(lora.peft_config) == ["default"]


@pytest.mark.parametrize("into", ["bfloat16", "same"])
def test_a_prepared_model_is_measured_as_it_comes_out(into: str) -> None:
    """Preparing casts around what is held in float32; the dense model needs none of that."""
    model = prepare_model_for_kbit_training(quantize_(llama(None).bfloat16(), quant_type="nf4"))
    report = merge(adapted(model, ["q_proj", "up_proj"]), into=into, text=IDS, force=True)
    assert report.agreement is not None
    assert report.agreement.loss_after == pytest.approx(report.agreement.loss_before, rel=0.05)
    with torch.no_grad():
        report.model(IDS)
