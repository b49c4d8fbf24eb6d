"""A model's folder beside its tensors: its config, read in one place."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from tiny_llama import llama

from qlora_kit.checkpoints.model_folder import locate, read_settings, skeleton, task_of, task_type
from qlora_kit.errors import StorageError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected config.json beside the weights, found none that can be read .*; pass a model's folder"),
        ('{"model_type": "lla', "expected config.json beside the weights, found none that can be read"),
        ("[1, 2]", r"found none that can be read \(a list where an object was expected\); pass a model's folder"),
        (
            "[" * 100_000,
            r"found none that can be read \(lists or objects nested thousands deep\); pass a model's folder",
        ),
        ('{"a": ' * 100_000, r"found none that can be read \(lists or objects nested thousands deep\)"),
        ('{"model_type": "\\ud800"}', r"found none that can be read \('utf-8' codec can't encode"),
        ('{"hidden_size": ' + "9" * 5000 + "}", r"found none that can be read \(Exceeds the limit"),
    ],
)
def test_a_config_that_can_t_be_read(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    for read in (read_settings, skeleton):
        with pytest.raises(StorageError, match=message):
            read(tmp_path)


def test_what_config_json_says(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    assert read_settings(tmp_path)["model_type"] == "llama"
    assert next(skeleton(tmp_path).parameters()).is_meta


def test_a_folder_is_itself_and_another_name_is_said(tmp_path: Path) -> None:
    assert locate(tmp_path) == tmp_path
    with pytest.raises(
        StorageError, match=r"^base='nowhere': expected a folder or a repository on the Hub, found neither"
    ):
        locate("nowhere", "base")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(
        StorageError, match=r"expected a folder or a repository on the Hub, found a file; pass the fold"
    ):
        locate(file)


# PEFT wraps a model in the class of its task, which calls it with the words' ids and, of two halves, a decoder's.
TASKS = {
    "LlamaForCausalLM": "CAUSAL_LM",
    "GPT2LMHeadModel": "CAUSAL_LM",
    "MixtralForCausalLM": "CAUSAL_LM",
    "MambaForCausalLM": "CAUSAL_LM",
    "T5ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "BartForConditionalGeneration": "SEQ_2_SEQ_LM",
    "WhisperForConditionalGeneration": None,
    "LlavaForConditionalGeneration": None,
    "Qwen2VLForConditionalGeneration": None,
    "Gemma3ForConditionalGeneration": None,
    "BertModel": "FEATURE_EXTRACTION",
    "CLIPModel": None,
    "ViTModel": None,
    "BertForMaskedLM": None,
    "LlamaForSequenceClassification": "SEQ_CLS",
    "FNetForSequenceClassification": None,
    "Wav2Vec2ForSequenceClassification": None,
    "ViTForImageClassification": None,
    "BertForTokenClassification": "TOKEN_CLS",
    "BertForQuestionAnswering": "QUESTION_ANS",
}


@pytest.mark.parametrize(("name", "expected"), TASKS.items())
def test_a_task_is_named_only_where_peft_s_class_for_it_can_call_the_model(name: str, expected: str | None) -> None:
    kind = getattr(transformers, name)
    assert task_type(object.__new__(kind)) == expected
    assert name.endswith(("LMHeadModel", "Model")) or expected in (None, task_of(name))
