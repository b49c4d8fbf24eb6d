"""A two-layer Llama, dense or loaded in 4 or 8 bits, a batch for it, and adapters on all its linears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from qlora_kit import LoraConfig, LoraModel, apply_lora

HIDDEN, INTERMEDIATE, VOCABULARY = 64, 96, 128
HALF = [torch.bfloat16, torch.float16]
STORAGES = ["dense", "4-bit", "8-bit"]


def llama(tied: bool = False, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    tokens = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **tokens, "tie_word_embeddings": tied, **settings}))


def load(folder: Path, storage: str, dtype: torch.dtype, **options: Any) -> LlamaForCausalLM:
    config = {
        "dense": None,
        "4-bit": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        ),
        "8-bit": BitsAndBytesConfig(load_in_8bit=True),
    }[storage]
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, **options)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def adapted(model: nn.Module) -> LoraModel:
    return apply_lora(model, LoraConfig(r=4, target_modules="all-linear"))
