"""What tests of calibrated runs share: rows of tokens, a text with its tokenizer, and starts that look at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from disk_models import config
from torch import Tensor

from qlora_kit import LoraConfig

METHODS = ("qera-diag", "qera", "pissa", "srr", "cloq", "aligned")


def rows(count: int = 10, length: int = 20, vocabulary: int = 128) -> Tensor:
    """Token ids (count, length): more tokens than the tiny models' layers have inputs, in two batches."""
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(5))


def calibrated(method: str, bits: int = 2, **options: Any) -> LoraConfig:
    return config(bits, **{"method": method, "calibration": rows(), "loftq_iter": 2, **options})


def add_tokenizer(folder: Path, vocabulary: int = 128) -> Path:
    """A tokenizer of words beside the model; words that it doesn't know are its first."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def write_text(file: Path, words: int = 400, seed: int = 0) -> Path:
    """Words that the tokenizer knows, drawn by ``seed``."""
    numbers = torch.randint(1, 128, (words,), generator=torch.Generator().manual_seed(seed))
    file.write_text(" ".join(f"w{int(number)}" for number in numbers), encoding="utf-8")
    return file
