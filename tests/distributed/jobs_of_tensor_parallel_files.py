"""What the ranks do in the tests of files of adapters on models that are shared out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jobs_of_tensor_parallel import BLOCK, LINEARS, adapted, by_torch
from tiny_llama import batch, llama
from torch import Tensor
from torch.distributed.tensor import DTensor

from qlora_kit import LoftQConfig, LoraModel
from qlora_kit.training.preparation.quantize import quantize_

#: That two and three processes can share evenly, heads and blocks of 32 too.
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 132,
}
KINDS = {"dense": None, "4 bits": 4, "2 bits": 2}


def model(bits: int | None, *, shared: bool) -> Any:
    made = by_torch(llama(**SIZES)) if shared else llama(**SIZES)
    return made if bits is None else quantize_(made, bits, blocksize=BLOCK)


def targets(bits: int | None) -> list[str]:
    return [*LINEARS, "embed_tokens", "lm_head"] if bits is None else LINEARS


def loftq() -> dict[str, Any]:
    return {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=2, method="loftq", blocksize=BLOCK)}


def lora(kind: str, *, shared: bool) -> LoraModel:
    if kind == "LoftQ":
        return adapted(model(None, shared=shared), **loftq()).eval()
    bits = KINDS[kind]
    return adapted(model(bits, shared=shared), target_modules=targets(bits)).eval()


@torch.no_grad()
def logits(of: Any) -> Tensor:
    found: Tensor = of(**batch()).logits
    return found


def saved_and_loaded(folder: Path, others: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The logits with adapters of every kind, saved by all ranks into ``folder``, and with those that one process has
    saved in ``others``."""
    return saved(folder), loaded(others, [*KINDS, "LoftQ"])


def saved(folder: Path) -> dict[str, Tensor]:
    """Adapters of every kind, saved by all ranks; and the logits with them."""
    found = {}
    for kind in (*KINDS, "LoftQ"):
        mine = lora(kind, shared=True)
        assert any(isinstance(p, DTensor) for p in mine.parameters() if p.requires_grad)
        mine.save_pretrained(folder / kind)
        found[kind] = logits(mine)
    dist.barrier()
    return found


def loaded(folder: Path, kinds: list[str]) -> dict[str, Tensor]:
    """The logits with the adapters of ``folder``, whoever wrote them."""
    found: dict[str, Any] = {}
    for kind in kinds:
        if kind == "LoftQ":
            mine = lora(kind, shared=True)
            mine.load_adapter(folder / kind, "again")  # the base is the one that it was started on
            mine.set_adapter("again")
        else:
            mine = LoraModel.from_pretrained(model(KINDS[kind], shared=True), folder / kind)
        found[kind] = logits(mine.eval())
    return found


def misfit(folder: Path) -> str:
    """What loading a file of other sizes says, and whether it changed anything."""
    mine = lora("dense", shared=True)
    before = logits(mine)
    try:
        mine.load_adapter(folder, "default")
    except Exception as error:
        return f"{type(error).__name__}: {error}" if torch.equal(before, logits(mine)) else "changed"
    return "nothing"
