"""The new head of a model: left out of "all-linear" whole, and trained and stored whole where the task brings it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from qlora_kit import LoraConfig, LoraModel, TargetError, apply_lora, make_plan
from qlora_kit.compat import peft as compat
from qlora_kit.injection.heads import head_of_task, new_head
from qlora_kit.naming import Tree

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
TEXT = {**SIZES, "num_attention_heads": 2}
PICTURES = {**SIZES, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
T5 = {
    "decoder_start_token_id": 0,
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
}
DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
WHISPER = {
    **{"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32},
    **{"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8},
    **{"max_source_positions": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "pad_token_id": 0}


def make(kind: str, config: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()


def classifier() -> Any:
    return make("LlamaForSequenceClassification", "LlamaConfig", {**TEXT, "pad_token_id": 0})


def roberta() -> Any:
    return make("RobertaForSequenceClassification", "RobertaConfig", {**TEXT, "max_position_embeddings": 34})


def distilbert() -> Any:
    return make("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL)


def tokens() -> Any:
    return make("BertForTokenClassification", "BertConfig", TEXT)


def answers() -> Any:
    return make("T5ForQuestionAnswering", "T5Config", T5)


HEADS = {
    "one linear": (classifier, ["score"]),
    "several layers in one module": (roberta, ["classifier"]),
    "two modules": (distilbert, ["pre_classifier", "classifier"]),
    "with a pooler": (
        lambda: make("DebertaV2ForSequenceClassification", "DebertaV2Config", TEXT),
        ["pooler", "classifier"],
    ),
    "without a module of the backbone's name": (
        lambda: make("WhisperForAudioClassification", "WhisperConfig", WHISPER),
        ["projector", "classifier"],
    ),
    "beside two halves": (answers, ["qa_outputs"]),
    "none: the output embeddings are inside": (lambda: make("BertForMaskedLM", "BertConfig", TEXT), []),
    "none: a language model": (lambda: make("GPT2LMHeadModel", "GPT2Config", GPT2), []),
    "none: a backbone": (lambda: make("BertModel", "BertConfig", TEXT), []),
    "none: no model of transformers": (lambda: nn.Sequential(nn.Linear(2, 2)), []),
}


@pytest.mark.parametrize(("build", "expected"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_it_is_what_stands_beside_the_backbone(build: Callable[[], Any], expected: list[str], wrapped: bool) -> None:
    model = torch.nn.DataParallel(build()) if wrapped else build()
    assert new_head(Tree(model)) == expected
    plan = make_plan(model, LoraConfig(r=1, target_modules="all-linear"))
    assert not [e.path for e in plan.entries if e.path.partition(".")[0] in expected]
    named = {part.pattern for part in plan.left_out if "beside the backbone" in part.reason}
    assert named == set(expected)


TRAINED = {
    "one linear": (classifier, "SEQ_CLS", ["score"]),
    "several layers": (roberta, "SEQ_CLS", ["classifier"]),
    "two modules": (distilbert, "SEQ_CLS", ["pre_classifier", "classifier"]),
    "of tokens": (tokens, "TOKEN_CLS", ["classifier"]),
    "of spans": (answers, "QUESTION_ANS", ["qa_outputs"]),
    "GPT-2's": (lambda: make("GPT2ForSequenceClassification", "GPT2Config", GPT2), "SEQ_CLS", ["score"]),
    "BART's, which PEFT's names miss": (
        lambda: make(
            "BartForSequenceClassification",
            "BartConfig",
            {
                **{"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32},
                **{"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
            },
        ),
        "SEQ_CLS",
        ["classification_head"],
    ),
}


def ids() -> torch.Tensor:
    return torch.tensor([[3, 4, 5, 6, 2], [7, 8, 9, 3, 2]])


def output(model: Any) -> torch.Tensor:
    found = model.eval()(input_ids=ids())
    return found.start_logits if hasattr(found, "start_logits") else found.logits


def stir_(lora: Any) -> None:
    """Give all that is trained other values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
@pytest.mark.parametrize(("build", "task", "names"), TRAINED.values(), ids=TRAINED)
@pytest.mark.slow
def test_the_head_of_a_task_is_trained_and_stored_for_both_libraries(
    build: Callable[[], Any], task: str, names: list[str], tmp_path: Path
) -> None:
    lora = apply_lora(build(), LoraConfig(r=2, target_modules="all-linear", task_type=task))
    assert lora.plan is not None
    assert list(lora.plan.modules_to_save) == list(lora.saved_modules()) == names
    whole = {n.removeprefix("model.") for n, p in lora.named_parameters() if p.requires_grad and "lora_" not in n}
    inside = [
        f"{name}.modules_to_save.default.{n}"
        for name in names
        for n, _ in build().get_submodule(name).named_parameters()
    ]
    assert whole == set(inside)
    stir_(lora)
    lora.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["task_type"], stored["modules_to_save"]) == (task, names)
    ours = LoraModel.from_pretrained(build(), tmp_path)
    assert ours.peft_config["default"].task_type == task
    assert torch.equal(output(ours), output(lora))
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(output(theirs), output(lora), rtol=1e-5, atol=1e-6)


def test_what_the_user_names_comes_before_it_and_other_tasks_bring_none() -> None:
    asked = {"r": 1, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    lora = apply_lora(classifier(), LoraConfig(**asked, task_type="SEQ_CLS"))
    assert lora.peft_config["default"].modules_to_save == ["embed_tokens", "score"]
    for task in (None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"):
        plan = make_plan(classifier(), LoraConfig(**asked, task_type=task))
        assert plan.modules_to_save == ("model.embed_tokens",)


def test_naming_the_head_as_a_target_asks_for_no_more_than_training_it() -> None:
    config = {"r": 1, "task_type": "SEQ_CLS"}
    plan = make_plan(roberta(), LoraConfig(**config, target_modules=["query", "classifier", "out_proj"]))
    assert [entry.path for entry in plan.entries] == ["roberta.encoder.layer.0.attention.self.query"]
    assert plan.modules_to_save == ("classifier",)
    with pytest.raises(TargetError, match=r"besides the head, found \['classifier'\].*SEQ_CLS"):
        make_plan(roberta(), LoraConfig(**config, target_modules=["classifier"]))
    with pytest.raises(TargetError, match="'clasifier' matches no module"):
        make_plan(roberta(), LoraConfig(**config, target_modules=["query", "clasifier"]))


def test_each_adapter_has_a_head_of_its_own() -> None:
    config = LoraConfig(r=1, target_modules="all-linear", task_type="SEQ_CLS")
    lora = apply_lora(roberta(), config)
    assert lora.add_adapter("second", config).modules_to_save == ("classifier",)
    assert lora.saved_modules()["classifier"].adapter_names() == ["default", "second"]
    lora.add_adapter("third", LoraConfig(r=1, target_modules=["query"]))
    assert lora.saved_modules()["classifier"].adapter_names() == ["default", "second"]


def test_a_stored_adapter_has_the_head_that_is_in_its_file_or_none(tmp_path: Path) -> None:
    apply_lora(classifier(), LoraConfig(r=1, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": "SEQ_CLS"}))
    for load in (LoraModel, compat.PeftModel, compat.PeftModelForSequenceClassification):
        lora = load.from_pretrained(classifier(), tmp_path)
        assert lora.saved_modules() == {}
        assert lora.peft_config["default"].task_type == "SEQ_CLS"
        lora.load_adapter(tmp_path, "again")
        assert lora.saved_modules() == {}


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
def test_peft_s_file_of_a_head_that_it_finds_by_the_end_of_a_name(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=1, target_modules=["q_lin"], task_type="SEQ_CLS", init_lora_weights=False)
    theirs = peft.get_peft_model(distilbert(), config)
    stir_(theirs)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    ours = LoraModel.from_pretrained(distilbert(), tmp_path)
    assert list(ours.saved_modules()) == ["pre_classifier", "classifier"]
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_compat_classes_keep_the_same_rule(task: str | None) -> None:
    config = compat.LoraConfig(r=1, target_modules=["q_lin"], task_type=task)
    model = compat.PeftModelForSequenceClassification(distilbert(), config)
    assert list(model.saved_modules()) == ["pre_classifier", "classifier"]
    assert model.modules_to_save == {"pre_classifier", "classifier"}


def test_combined_and_residual_adapters_bring_none_of_their_own() -> None:
    headless = LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False)
    lora = apply_lora(classifier(), headless)
    lora.add_adapter("second", headless)
    for name in ("default", "second"):
        lora.peft_config[name].task_type = "SEQ_CLS"  # as from a file without a head
    lora.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="cat")
    assert lora.saved_modules() == {}


def test_a_norm_and_a_name_that_the_backbone_has_too_stay_frozen() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pooler, self.dense = nn.Linear(2, 2), nn.Linear(2, 2)

    model: Any = nn.Module()
    model.base_model_prefix = "base"
    model.base, model.norm = Backbone(), nn.LayerNorm(2)
    model.pooler, model.classifier = nn.Linear(2, 2), nn.Linear(2, 2)
    assert new_head(Tree(model)) == ["norm", "pooler", "classifier"]
    assert head_of_task(Tree(model), "SEQ_CLS") == ["classifier"]
    plan = make_plan(model, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert [entry.path for entry in plan.entries] == ["base.pooler", "base.dense"]
    assert [part.pattern for part in plan.left_out] == ["pooler"]
