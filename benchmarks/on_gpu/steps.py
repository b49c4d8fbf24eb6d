"""Forward and backward of decoder layers: time, and memory above the models', beside the frozen base's and peft's.

The row of inputs asks for its gradient, as it does in every layer of a deep model but the first, so that the frozen
base has a backward pass too. "With weights" adds the bytes of a model's own parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel

from qlora_kit.training.preparation.kbit import memory_bill

from .clock import Run, interleaved, peak_bytes
from .models import Variant, variants, why_not
from .sizes import Sizes

MOST_TIME, MOST_MEMORY = 1.15, 1.10


def measured(sizes: Sizes, storage: str) -> Iterator[dict[str, Any]]:
    if (reason := why_not(storage)) is not None:
        yield {"skipped": reason}
        return
    for dropout in (0.0, 0.05):
        found = variants(sizes, storage, dropout)
        for checkpointed in (False, True):
            for model in {id(v.model): v.model for v in found}.values():
                switch_checkpointing_(model, checkpointed)
            for row in compared(sizes, found):
                yield {"storage": storage, "dropout": dropout, "checkpointing": checkpointed, **row}


def compared(sizes: Sizes, found: list[Variant]) -> Iterator[dict[str, Any]]:
    x, grad = (torch.randn(1, sizes.tokens, sizes.hidden, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
    runs: dict[str, Run] = {v.name: v.under(lambda model: step(model, x, grad)) for v in found}
    times = interleaved(runs, sizes.repeats, sizes.device)
    peaks = {name: peak_bytes(run, sizes.device) for name, run in runs.items()}
    weights = {v.name: memory_bill(v.model).total for v in found}
    full = {name: peaks[name] + weights[name] for name in runs}
    for name in runs:
        slower, larger = times[name] / times["base"], full[name] / full["base"]
        row = {
            "variant": name,
            "step ms": 1e3 * times[name],
            "time / base": slower,
            "step MiB": peaks[name] / 2**20,
            "with weights MiB": full[name] / 2**20,
            "memory / base": larger,
        }
        if "peft" in times:
            row["time / peft"] = times[name] / times["peft"]
        if name.startswith("ours"):
            row["aim"] = f"time <= {MOST_TIME}, memory <= {MOST_MEMORY}"
            row["met"] = slower <= MOST_TIME and larger <= MOST_MEMORY
        yield row


def step(model: Any, x: Tensor, grad: Tensor) -> None:
    """One forward and backward. Gradients are let go of at its end, so that each step has them to allocate."""
    x = x.detach().requires_grad_()
    decoder(model)(inputs_embeds=x, use_cache=False).last_hidden_state.backward(grad)
    for parameter in model.parameters():
        parameter.grad = None


def decoder(model: Any) -> Any:
    """The layers without the head, whatever stands around them; adapters are inside."""
    return next(module for module in model.modules() if isinstance(module, LlamaModel))


def switch_checkpointing_(model: Any, on: bool) -> None:
    """Under the name that the installed transformers has."""
    inner = decoder(model).train()
    name = "activation_checkpointing" if hasattr(inner, "activation_checkpointing_enable") else "gradient_checkpointing"
    if on:
        getattr(inner, f"{name}_enable")({"use_reentrant": False})
    else:
        getattr(inner, f"{name}_disable")()
