"""Decoder layers in few bits: frozen, under peft's adapters, and under ours in each form of the branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_kit

from .sizes import Sizes

#: What they are called, and the type that ``quantize_`` is given; NF4 is bitsandbytes', "signed2" our packed module.
STORAGES = {"nf4": "nf4", "2 bits": "signed2"}
FORMS = ("plain", "fused")


@dataclass(frozen=True)
class Variant:
    """A model and the form of its branches, which peft's and frozen models don't have."""

    name: str
    model: Any
    form: str = "plain"

    def under(self, run: Callable[[Any], object]) -> Callable[[], object]:
        """``run`` with this model, in this form."""

        def runs() -> object:
            with qlora_kit.set_branch(self.form):
                return run(self.model)

        return runs


def why_not(storage: str) -> str | None:
    """Why ``storage`` can't be had here."""
    missing = storage == "nf4" and find_spec("bitsandbytes") is None
    return "bitsandbytes isn't installed: put its wheel into wheels/" if missing else None


def base(sizes: Sizes, storage: str | None) -> Any:
    """Always the same weights; None leaves them dense."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=max(2 * sizes.tokens, 256),
    )
    torch.manual_seed(0)
    with torch.device(sizes.device):
        model = LlamaForCausalLM(config)
    model = model.to(sizes.dtype).requires_grad_(False)
    return model if storage is None else qlora_kit.quantize_(model, quant_type=STORAGES[storage])


def ours(sizes: Sizes, storage: str | None, dropout: float = 0.0) -> Any:
    config = qlora_kit.LoraConfig(
        r=sizes.rank, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout
    )
    return qlora_kit.apply_lora(base(sizes, storage), config)


def pefts(sizes: Sizes, storage: str | None, dropout: float = 0.0) -> Any:
    """As peft adapts what transformers loaded in 4 bits."""
    import peft

    model = base(sizes, storage)
    model.is_loaded_in_4bit = storage == "nf4"  # by which peft chooses its layers
    config = peft.LoraConfig(r=sizes.rank, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
    return peft.get_peft_model(model, config)


def peer(sizes: Sizes, storage: str | None, dropout: float = 0.0) -> Any:
    """``pefts``, or None where peft can't: of a peer that is a result too, and said."""
    try:
        return pefts(sizes, storage, dropout)
    except Exception as error:
        print(f"peft on {storage}: {type(error).__name__}: {error}", flush=True)
        return None


def variants(sizes: Sizes, storage: str, dropout: float = 0.0) -> list[Variant]:
    adapted = ours(sizes, storage, dropout)
    found = [Variant("base", base(sizes, storage)), Variant("peft", peer(sizes, storage, dropout))]
    found += [Variant(f"ours, {form}", adapted, form) for form in FORMS]
    return [variant for variant in found if variant.model is not None]
