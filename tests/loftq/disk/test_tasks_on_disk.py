"""The adapter that a streamed run writes is an ordinary one for its task: peft loads it, head and all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from disk_models import ADAPTER_FOLDER, config, streamed, tensors, write
from safetensors.torch import load_file, save_file

from loftq.disk.verify import verify
from qlora_kit import LoraModel
from qlora_kit.errors import StorageError

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
WHISPER = {
    **{"vocab_size": 64, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64},
    **{"decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8},
    **{"max_source_positions": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
}


def make(kind: str, config_kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config_kind)(**settings)).eval()


def roberta() -> Any:
    settings = {**SIZES, "max_position_embeddings": 34, "pad_token_id": 1}
    return make("RobertaForSequenceClassification", "RobertaConfig", settings)


def stored_config(out: Path) -> dict[str, Any]:
    return json.loads((out / ADAPTER_FOLDER / "adapter_config.json").read_text())


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
@pytest.mark.slow
def test_a_classifier_s_head_is_copied_into_its_adapter(tmp_path: Path) -> None:
    source, out = write(roberta(), tmp_path / "source"), tmp_path / "out"
    streamed(source, out, config(2))
    stored = stored_config(out)
    assert (stored["task_type"], stored["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    original = {name: value for name, value in tensors(source).items() if name.startswith("classifier.")}
    copies = load_file(out / ADAPTER_FOLDER / "adapter_model.safetensors")
    held = {name.removeprefix("base_model.model."): value for name, value in copies.items() if "lora_" not in name}
    assert original.keys() == held.keys()
    assert all(torch.equal(held[name], original[name]) for name in held)

    def load() -> Any:
        return type(roberta()).from_pretrained(out)

    ids = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    ours = LoraModel.from_pretrained(load(), out / ADAPTER_FOLDER)
    assert list(ours.saved_modules()) == ["classifier"]
    theirs = peft.PeftModel.from_pretrained(load(), out / ADAPTER_FOLDER).eval()
    torch.testing.assert_close(theirs(**ids).logits, ours(**ids).logits, rtol=1e-4, atol=1e-5)
    assert len(list(verify(out, source))) > 2


def test_a_head_that_is_not_stored_is_a_missing_weight(tmp_path: Path) -> None:
    source = write(roberta(), tmp_path / "source")
    left = {name: value for name, value in tensors(source).items() if not name.startswith("classifier.")}
    save_file(left, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(StorageError, match=r"all weights of a RobertaForSequenceClassification, found 4 missing"):
        streamed(source, tmp_path / "out", config(2))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_asked_for_is_copied_too(tmp_path: Path) -> None:
    source, lora = write(roberta(), tmp_path / "source"), config(2)
    lora.modules_to_save = ["LayerNorm"]
    streamed(source, tmp_path / "out", lora)
    assert stored_config(tmp_path / "out")["modules_to_save"] == ["LayerNorm", "classifier"]
    ours = LoraModel.from_pretrained(
        type(roberta()).from_pretrained(tmp_path / "out"), tmp_path / "out" / ADAPTER_FOLDER
    )
    assert len(ours.saved_modules()) == 4


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
@pytest.mark.slow
def test_a_model_of_sounds_has_no_task_of_peft_s(tmp_path: Path) -> None:
    model = make("WhisperForConditionalGeneration", "WhisperConfig", WHISPER)
    streamed(write(model, tmp_path / "source"), tmp_path / "out", config(2))
    assert stored_config(tmp_path / "out")["task_type"] is None
    inputs = {"input_features": torch.randn(1, 8, 20), "labels": torch.arange(4)[None]}
    base = type(model).from_pretrained(tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out" / ADAPTER_FOLDER).eval()
    assert theirs(**inputs).loss.isfinite()
