"""Words that were added to a vocabulary: their rows go into the adapter's file, and come back out of it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import VOCABULARY, llama
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from qlora_kit import LoraConfig, LoraModel, StorageError, apply_lora, merge
from qlora_kit.adapter_files.tensors import adapter_state
from qlora_kit.compat.peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict
from qlora_kit.errors import AdapterError
from qlora_kit.folders.combine import combine_folders, compress_folder
from qlora_kit.folders.extract.run import extract_folders
from qlora_kit.folders.merge.run import merge_folders

WORDS = VOCABULARY + 4
PADDED = 192
IDS = torch.tensor([[1, VOCABULARY, 5, VOCABULARY + 3, 7]])
PREFIX = "base_model.model."
TABLES = {f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"}
# float32 sums in another order.
RELATIVE = 1e-5
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "branch on the table": {"target_modules": ["q_proj", "embed_tokens"]},
    "branches on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "branches on both as one": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved as one": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
}
BOTH = [(tied, case) for tied in (False, True) for case in CONFIGS if tied or "as one" not in case]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= RELATIVE * expected.abs().max())


def base(folder: Path, tied: bool = False) -> Path:
    llama(tied=tied).save_pretrained(folder / "base")
    return folder / "base"


def resized(folder: Path, rows: int = WORDS, seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def quiet(made: Any, *args: Any, **kwargs: Any) -> Any:
    """Both libraries warn of tied weights that the adapter parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made(*args, **kwargs)


def adapted(model: nn.Module, **config: Any) -> LoraModel:
    torch.manual_seed(2)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **config}
    return quiet(apply_lora, model, LoraConfig(**config))


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(("tied", "case"), BOTH)
@pytest.mark.slow
def test_an_adapter_on_a_larger_vocabulary_comes_back_everywhere(tied: bool, case: str, tmp_path: Path) -> None:
    """Onto another resized base, whose new rows are others; from the folder alone; in PEFT; merged on disk."""
    source = base(tmp_path, tied)
    lora = adapted(resized(source, PADDED), task_type="CAUSAL_LM", **CONFIGS[case])
    expected = logits(lora)
    lora.save_pretrained(tmp_path / "adapter")
    again = quiet(LoraModel.from_pretrained, resized(source, PADDED, seed=9), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(quiet(AutoPeftModelForCausalLM.from_pretrained, tmp_path / "adapter")), expected)
    theirs = quiet(peft.PeftModel.from_pretrained, resized(source, PADDED, seed=9), tmp_path / "adapter")
    assert close(logits(theirs), expected)
    merge_folders(source, [tmp_path / "adapter"], tmp_path / "merged", into="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == PADDED
    assert close(logits(merged), expected)
    in_memory = merge(again, into="float32").model
    in_memory.save_pretrained(tmp_path / "memory")
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "memory")), expected)


@pytest.mark.parametrize(("tied", "case"), BOTH)
@pytest.mark.slow
def test_what_peft_stored_comes_back(tied: bool, case: str, tmp_path: Path) -> None:
    source = base(tmp_path, tied)
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **CONFIGS[case])
    theirs = quiet(peft.get_peft_model, resized(source), config)
    expected = logits(theirs)
    quiet(theirs.save_pretrained, tmp_path / "adapter", save_embedding_layers=True)
    if case in ("plain", "both saved as one", "head saved"):
        loaded = quiet(AutoPeftModelForCausalLM.from_pretrained, tmp_path / "adapter")
        assert close(logits(loaded), expected)
        merge_folders(source, [tmp_path / "adapter"], tmp_path / "merged", into="float32")
        assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    onto = resized(source)  # the same rows: PEFT leaves out the table that has no branch beside one that has
    assert close(logits(quiet(LoraModel.from_pretrained, onto, tmp_path / "adapter")), expected)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_tables_are_stored_as_peft_stores(tied: bool, tmp_path: Path) -> None:
    source = base(tmp_path, tied)
    for rows, tables in ((VOCABULARY, set()), (WORDS, TABLES)):
        adapted(resized(source, rows)).save_pretrained(tmp_path / "ours")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        theirs = quiet(peft.get_peft_model, resized(source, rows), config)
        quiet(theirs.save_pretrained, tmp_path / "theirs")
        assert set(stored(tmp_path / "ours")) == set(stored(tmp_path / "theirs"))
        assert {key for key in stored(tmp_path / "ours") if "lora_" not in key} == tables


def test_more_or_fewer_may_be_asked_for(tmp_path: Path) -> None:
    lora = adapted(resized(base(tmp_path)))
    plain = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    for model, save, tables in ((lora, False, set()), (plain, True, TABLES), (plain, "auto", set())):
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=save)
        assert {key for key in stored(tmp_path / "adapter") if "lora_" not in key} == tables
        assert {key for key in adapter_state(model, save_embedding_layers=save) if "lora_" not in key} == tables
        assert {k for k in get_peft_model_state_dict(model, save_embedding_layers=save) if "lora_" not in k} == tables
    with pytest.raises(AdapterError, match=r"save_embedding_layers: expected 'auto', True or False, found 'all'"):
        lora.save_pretrained(tmp_path / "none", save_embedding_layers="all")
    assert not (tmp_path / "none").exists()


def test_tables_are_taken_from_a_gathered_state_where_it_has_them(tmp_path: Path) -> None:
    lora = adapted(resized(base(tmp_path)))
    whole = lora.state_dict()
    trained = {name: tensor for name, tensor in whole.items() if "lora_" in name}
    doubled = {name: tensor * 2 for name, tensor in whole.items()}
    table = lora.model.lm_head.weight
    for state, factor in ((whole, 1), (trained, 1), (doubled, 2)):
        assert torch.equal(adapter_state(lora, state_dict=state)[f"{PREFIX}lm_head.weight"], factor * table)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_base_without_a_name(when: str, tmp_path: Path) -> None:
    model = llama()
    if when == "before":
        model.resize_token_embeddings(WORDS, mean_resizing=False)
    lora = adapted(model)
    if when == "after":
        lora.resize_token_embeddings(WORDS, mean_resizing=False)
    lora.save_pretrained(tmp_path)
    assert set(stored(tmp_path)) >= TABLES
    adapted(llama()).save_pretrained(tmp_path)
    assert not set(stored(tmp_path)) & TABLES


def test_a_base_that_is_nowhere_is_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lora = adapted(llama(), base_model_name_or_path="someone/a-model")
    with caplog.at_level(logging.WARNING):
        lora.save_pretrained(tmp_path)
    assert "someone/a-model: expected a config.json of the base model" in caplog.text
    assert "save_embedding_layers=True" in caplog.text


def test_the_base_s_config_is_looked_for_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = base(tmp_path), []

    def cached(name: str, file: str, revision: str | None = None) -> str:
        asked.append((name, file, revision))
        return str(source / file)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    for rows, tables in ((VOCABULARY, set()), (WORDS, TABLES)):
        lora = adapted(resized(source, rows), base_model_name_or_path="someone/a-model", revision="v1")
        lora.save_pretrained(tmp_path / "adapter")
        assert {key for key in stored(tmp_path / "adapter") if "lora_" not in key} == tables
    assert set(asked) == {("someone/a-model", "config.json", "v1")}


def test_a_base_of_another_size_is_told_what_to_do_and_stays(tmp_path: Path) -> None:
    lora = adapted(resized(base(tmp_path)))
    lora.save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = IDS % VOCABULARY
    before = model(input_ids=ids).logits
    for load in (LoraModel.from_pretrained, PeftModel.from_pretrained):
        with pytest.raises(StorageError, match=rf"resize_token_embeddings\({WORDS}\)"):
            load(model, tmp_path / "adapter")
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_second_adapter_brings_them_too(tmp_path: Path) -> None:
    lora = adapted(resized(base(tmp_path)))
    expected = logits(lora)
    lora.save_pretrained(tmp_path / "adapter")
    other = adapted(resized(tmp_path / "base", seed=9), target_modules=["o_proj"])
    other.load_adapter(tmp_path / "adapter", "second")
    other.set_adapter("second")
    assert torch.equal(logits(other), expected)


def test_a_second_adapter_of_another_size_is_refused_and_leaves_all_as_it_was(tmp_path: Path) -> None:
    adapted(resized(base(tmp_path))).save_pretrained(tmp_path / "adapter")
    lora = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), target_modules=["o_proj"])
    before = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    with pytest.raises(StorageError, match="resize_token_embeddings"):
        lora.load_adapter(tmp_path / "adapter", "second")
    assert list(lora.peft_config) == ["default"]
    torch.testing.assert_close(lora.state_dict(), before, rtol=0, atol=0)


def test_a_table_in_four_bit_models(tmp_path: Path) -> None:
    four = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    source = base(tmp_path)
    lora = adapted(resized(source, **four), target_modules="all-linear")
    expected = logits(lora)
    lora.save_pretrained(tmp_path / "adapter")
    assert set(stored(tmp_path / "adapter")) >= TABLES
    again = LoraModel.from_pretrained(resized(source, seed=9, **four), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)


@pytest.mark.slow
def test_training_is_resumed_with_the_rows_it_had(tmp_path: Path) -> None:
    source = base(tmp_path, tied=True)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4

    def trainer(model: LoraModel) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=1,
            max_steps=2,
            save_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        return Trainer(model, arguments, train_dataset=rows)

    lora = adapted(resized(source))
    trainer(lora).train()
    resumed = adapted(resized(source, seed=9))
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert torch.equal(logits(resumed), logits(lora))


def test_combined_and_compressed_adapters_keep_the_tables(tmp_path: Path) -> None:
    source = base(tmp_path)
    folders = [tmp_path / name for name in ("one", "two")]
    for number, folder in enumerate(folders):
        torch.manual_seed(number)
        adapted(resized(source), target_modules=["q_proj"] if number else ["q_proj", "embed_tokens"]).save_pretrained(
            folder
        )
    combine_folders(folders, [1.0, 1.0], tmp_path / "sum", "cat")
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sum"))
    both = LoraModel.from_pretrained(resized(source), folders[0], "one")
    both.load_adapter(folders[1], "two")
    both.set_adapter(["one", "two"])
    assert close(logits(both), expected)
    compress_folder(tmp_path / "sum", tmp_path / "small", rank=2)
    keys = {"base_model.model.model.embed_tokens.base_layer.weight", "base_model.model.lm_head.weight"}
    assert {key for key in stored(tmp_path / "small") if "lora_" not in key} == keys
    other = resized(source, seed=9)
    adapted(other, target_modules=["k_proj"]).save_pretrained(tmp_path / "other")
    with pytest.raises(StorageError, match="expected the base's own table in every adapter"):
        combine_folders([folders[0], tmp_path / "other"], [1.0, 1.0], tmp_path / "none")


@pytest.mark.parametrize("tied", [False, True])
def test_extracted_from_a_model_with_more_words(tied: bool, tmp_path: Path) -> None:
    source = base(tmp_path, tied)
    tuned = resized(source)
    with torch.no_grad():
        projection = tuned.model.layers[0].self_attn.q_proj.weight
        projection += 0.1 * torch.outer(torch.randn(len(projection)), torch.randn(projection.shape[1]))
    tuned.save_pretrained(tmp_path / "tuned")
    extract_folders(source, tmp_path / "tuned", tmp_path / "adapter", 2, whole="changed")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert close(logits(loaded), logits(tuned))


def test_a_tokenizer_says_how_many_where_the_file_does_not(tmp_path: Path) -> None:
    words = {f"w{number}": number for number in range(WORDS)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    lora = adapted(resized(base(tmp_path)), task_type="CAUSAL_LM")
    lora.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.get_input_embeddings().weight.shape[0] == WORDS
