"""Runs of the folder commands on a tiny model, of which ``data/journals`` keeps some that were cut off.

``data/make_journals.py`` writes those with the code of a release; later releases go on with them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loftq.bits.budget import Budget
from loftq.disk.stream import stream
from loftq.disk.task import Task
from qlora_kit import LoftQConfig, LoraConfig, apply_lora
from qlora_kit.checkpoints.journal import Journal
from qlora_kit.folders import merge_folders

JOURNALS = Path(__file__).parent / "data" / "journals"
BASE, ADAPTER = JOURNALS / "base", JOURNALS / "adapter"
TOKENS = torch.arange(96).reshape(6, 16) * 7 % 32


class CutError(Exception):
    """Stands for whatever ends a process."""


def save_sources() -> None:
    """The model that all runs start from, and the adapter that is merged into it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, tie_word_embeddings=False)).bfloat16()
    model.save_pretrained(BASE)
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    with torch.no_grad():
        for layer in lora.adapter_layers().values():
            for factor in layer.adapter_tensors("default").values():
                factor.normal_(std=0.1)
    lora.save_pretrained(ADAPTER)


def merged(out: Path) -> Any:
    return merge_folders(BASE, [ADAPTER], out, into="nf4", shard_bytes=8000, force=True)


def started(out: Path, budget: Budget | None = None, **loftq: Any) -> Any:
    lora = LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(**{"loftq_iter": 2, **loftq}),
    )
    return stream(Task(BASE, out, lora, shard_bytes=8000, budget=budget))


def started_on_text(out: Path) -> Any:
    """Looks at the inputs, one block after the other, and chooses bits first."""
    return started(out, Budget(3), method="aligned", calibration=TOKENS)


#: Each run, and after how many finished units the stored one was cut off.
RUNS: dict[str, tuple[Callable[[Path], Any], int]] = {
    "merge": (merged, 15),
    "init": (lambda out: started(out, loftq_bits=4), 15),
    "init-on-text": (started_on_text, 2),
}


def cut(run: Callable[[Path], Any], count: int, out: Path) -> None:
    """Carry out ``run`` until ``count`` units are in its journal."""
    add = Journal.add

    def noted(journal: Journal, line: Any, *, done: bool = True) -> None:
        add(journal, line, done=done)
        if len(journal.done) == count:
            raise CutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", noted)
        with pytest.raises(CutError):
            run(out)
