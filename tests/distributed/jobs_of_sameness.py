"""What two processes do that have different models, or of which one can't write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_models import adapted, base, batch, optimizer
from jobs_of_sharded_files import message_of, step

from qlora_kit import LoraConfig, apply_lora, quantize_
from qlora_kit.distributed import prepare, save_checkpoint


def odd_ones(folder: str) -> dict[str, Any]:
    """What each rank is told, and what is made the same."""
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for what, settings in {
        "alpha": {"lora_alpha": 16},
        "rank": {"r": 2},
        "target": {"target_modules": ["q_proj"]},
    }.items():
        own = {"r": 4, "target_modules": "all-linear", **(settings if rank else {})}
        lora = apply_lora(base("float32"), LoraConfig(**own))
        found[what] = {engine: message_of(lambda e=engine, m=lora: prepare(m, e)) for engine in ("ddp", "fsdp2")}

    model = base("float32")
    _draw_(model.model.norm, rank)
    found["drawn"] = _first_and_own(apply_lora(model, LoraConfig(r=4, target_modules=["q_proj"])))
    model = base("float32")
    _draw_(model.model.layers[1].mlp.up_proj, rank)
    coded = apply_lora(quantize_(model, 4), LoraConfig(r=4, target_modules=["q_proj"]))
    found["codes"] = message_of(lambda: prepare(coded, "ddp"))

    run = prepare(adapted("nf4"), "fsdp2", optimizer=optimizer)
    step(run, 0)
    if rank == 0:
        (Path(folder) / "file").write_text("")
    dist.barrier()
    found["unwritten"] = message_of(lambda: save_checkpoint(Path(folder) / "file" / "step-1", run.lora, run.optimizer))
    save_checkpoint(Path(folder) / "step-1", run.lora, run.optimizer)  # nobody is out of step
    return found


def _draw_(module: Any, rank: int) -> None:
    with torch.no_grad():
        module.weight.normal_(generator=torch.Generator().manual_seed(rank))


def _first_and_own(lora: Any) -> float:
    """How far logits of what FSDP2 has put together are from those of the first rank's model."""
    with torch.no_grad():
        logits = lora(input_ids=batch(0)).logits
        dist.broadcast(logits, 0)
        prepare(lora, "fsdp2")
        return float((lora(input_ids=batch(0)).logits - logits).abs().max())
