"""What the ranks do in the tests of a Llama that is shared out by torch or by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_nets import apart, mesh, steps, trained, whole
from tiny_llama import batch, llama
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaForCausalLM

from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora
from qlora_kit.training.preparation.quantize import quantize_

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"intermediate_size": 128}  # so that blocks of 32 lie within the parts of two processes
BLOCK = 32


def by_torch(model: nn.Module) -> nn.Module:
    """As torch's own examples share a Llama out."""
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for n in range(len(model.model.layers)):  # type: ignore[union-attr, arg-type]
        block = f"model.layers.{n}."
        plan |= {f"{block}self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {f"{block}mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        plan |= {f"{block}self_attn.o_proj": RowwiseParallel(), f"{block}mlp.down_proj": RowwiseParallel()}
    return parallelize_module(model, mesh(), plan)


def base(way: str, folder: Path | None = None, *, bits: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama in this process ("alone", or "exact": of weights in ``dtype``, computed in float32), or shared out by
    "torch" or "transformers", which reads it from ``folder``."""
    if way == "transformers":
        model: Any = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=dtype)
    else:
        model = llama(**SIZES).to(dtype)
        model = model.float() if way == "exact" else model
        model = by_torch(model) if way == "torch" else model
    return model if bits is None else quantize_(model, bits, blocksize=BLOCK)


def adapted(model: Any, **settings: Any) -> LoraModel:
    torch.manual_seed(5)
    return apply_lora(model, LoraConfig(**{"r": 4, "target_modules": LINEARS, "init_lora_weights": False, **settings}))


def loss(model: nn.Module) -> Tensor:
    found: Tensor = model(**batch()).loss
    return found


#: What is trained: kinds of base and of start, and what is done around the forward.
CASES: dict[str, dict[str, Any]] = {
    "float32": {"targets": [*LINEARS, "embed_tokens", "lm_head"]},
    "bfloat16": {"dtype": torch.bfloat16},
    "NF4": {"bits": 4},
    "2 bits": {"bits": 2},
    "LoftQ at 4 bits": {"loftq": 4},
    "LoftQ at 2 bits": {"loftq": 2},
    "dropout, checkpointed": {"dropout": 0.2, "checkpointed": True},
    "NF4 under autocast": {"bits": 4, "autocast": True},
}


#: Those that round to half precision on the way.
HALF = ["bfloat16", "NF4 under autocast"]


def trained_as(case: str, way: str, folder: Path | None, count: int) -> tuple[LoraModel, Any]:
    asked = CASES[case]
    model = base(way, folder, bits=asked.get("bits"), dtype=asked.get("dtype", torch.float32))
    settings: dict[str, Any] = {
        "lora_dropout": asked.get("dropout", 0.0),
        "target_modules": asked.get("targets", LINEARS),
    }
    if (bits := asked.get("loftq")) is not None:
        settings |= {
            "init_lora_weights": "loftq",
            "loftq_config": LoftQConfig(loftq_bits=bits, method="loftq", blocksize=BLOCK),
        }
    lora = adapted(model, **settings).train()
    if asked.get("checkpointed"):
        lora.gradient_checkpointing_enable()

    def step(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(asked.get("autocast")) and way != "exact"):
            return loss(model)

    return lora, steps(lora, step, count, lr=0.02)


def training(folder: Path, cases: dict[str, list[str]], count: int) -> dict[str, Any]:
    """Of each of ``cases`` and ways: how far training is from one process; and how far that and one process are from
    float32 in the first step, where half precision rounds."""
    found: dict[str, Any] = {}
    if dist.get_rank() == 0:
        llama(**SIZES).save_pretrained(folder)
    dist.barrier()
    for case, ways in cases.items():
        alone, expected = trained_as(case, "alone", None, count)
        exact = trained_as(case, "exact", None, 1)[1] if case in HALF else expected[:1]
        for way in ways:
            lora, mine = trained_as(case, way, folder, count)
            parameters = trained(lora)
            found[f"{case}, by {way}"] = {
                **apart(expected, mine),
                "parameters": {type(p).__name__ for p in parameters.values()},
                "after": max(
                    float((whole(p) - other.detach()).abs().max())
                    for p, other in zip(parameters.values(), trained(alone).values(), strict=True)
                ),
                "loss": [expected[0][0], expected[-1][0]],
                "from exact": (apart(exact, mine[:1])["gradients"], apart(exact, expected[:1])["gradients"]),
            }
    return found
