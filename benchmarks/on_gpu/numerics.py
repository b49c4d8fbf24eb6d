"""Whether small models compute the right thing, before anything is timed.

Logits and gradients in half precision on the device, against float32 on the CPU with the same codes. An error is the
distance over the size of the exact value; bounds are a few roundings of the dtype through two layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import qlora_kit

from .models import FORMS, ours, why_not
from .sizes import Sizes
from .steps import switch_checkpointing_

BOUNDS = {torch.bfloat16: 0.05, torch.float16: 0.008}
SMALL = {"hidden": 256, "intermediate": 384, "heads": 4, "layers": 2, "tokens": 96}


def measured(sizes: Sizes, _: str) -> Iterator[dict[str, Any]]:
    if sizes.device == "cuda":
        sizes = replace(sizes, **SMALL)
    for storage in ("nf4", "2 bits", None):
        if storage is not None and (reason := why_not(storage)) is not None:
            yield {"storage": storage, "skipped": reason}
            continue
        yield from of_storage(sizes, storage)


def of_storage(sizes: Sizes, storage: str | None) -> Iterator[dict[str, Any]]:
    for dtype, bound in BOUNDS.items():
        model = ours(replace(sizes, dtype=dtype), storage)
        twin = in_float32(model)
        x = torch.randn(2, sizes.tokens, sizes.hidden, device=sizes.device, dtype=dtype)
        exact = results(twin, x.cpu().float(), "plain", False)
        for form in FORMS:
            for checkpointed in (False, True):
                found = results(model, x, form, checkpointed)
                errors = [distance(one, two) for one, two in zip(found, exact, strict=True)]
                yield {
                    "storage": storage or "dense",
                    "dtype": str(dtype)[6:],
                    "form": form,
                    "checkpointing": checkpointed,
                    "logits": errors[0],
                    "input's gradient": errors[1],
                    "adapters' gradients": errors[2],
                    "aim": f"<= {bound}",
                    "met": max(errors) <= bound,  # NaN isn't
                    "checked": True,
                }


def in_float32(model: Any) -> Any:
    """A copy on the CPU with the same codes, which multiplies in float32 too."""
    twin = copy.deepcopy(model).to("cpu").float()
    for module in twin.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    return twin


def results(model: Any, x: Tensor, form: str, checkpointed: bool) -> list[Tensor]:
    """Logits, and the gradients of their squares' mean by the input and by all that trains."""
    switch_checkpointing_(model, checkpointed)
    model.zero_grad()
    x = x.detach().requires_grad_()
    with qlora_kit.set_branch(form):
        logits = model(inputs_embeds=x, use_cache=False).logits
        (logits.float().square().mean() * 256).backward()
    grads = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    assert x.grad is not None
    return [logits.detach().double().cpu(), x.grad.double().cpu(), torch.cat(grads)]


def distance(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()
