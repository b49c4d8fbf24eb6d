"""A real training step, watched: the most bytes that its tensors held at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_kit import LoraConfig, apply_lora, prepare_model_for_kbit_training, quantize_
from qlora_kit.kernels.scratch import release_scratch
from qlora_kit.layers.fused import thin
from qlora_kit.training import use_chunked_loss


class Watch(TorchDispatchMode):
    """``peak`` bytes of the storages that are alive, those of ``held`` among them."""

    def __init__(self, held: Iterator[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()
        for tensor in held:
            self.see(tensor)

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.alive:
            self.alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out


_attention = F.scaled_dot_product_attention


def _attention_of_a_card(query: Tensor, key: Tensor, *others: Any, **options: Any) -> Tensor:
    """In float32 with heads that share keys a GPU has the plain one alone, and a CPU a fused one."""
    plain = query.dtype == torch.float32 and query.shape[1] != key.shape[1]
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        return _attention(query, key, *others, **options)


@contextmanager
def as_on_a_card() -> Iterator[None]:
    """A CPU computes as a GPU does where it would hold more or less: in attention, and in thin products of half
    precision, which it takes in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", _attention_of_a_card)
        patch.setattr(thin, "casts_up", lambda device: False)
        yield


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, the scales that bitsandbytes keeps beside them, and weights as they will be merged."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            yield from (value for value in vars(part or object).values() if isinstance(value, Tensor))
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        if isinstance(scales, Tensor):
            yield scales
        if (kept := getattr(module, "_kept", None)) is not None:
            yield from tensors_of(kept.merged.module)
            yield from (factor.values for factor in kept.factors)


def measured_peak(
    folder: Path,
    model_class: str,
    *,
    bits: int,
    checkpointing: bool,
    rank: int,
    seq: int,
    batch: int,
    dtype: str = "bfloat16",
    chunked_loss: bool = False,
    merge_aware: str | None = None,
) -> int:
    """The peak of the second step of AdamW, whose states are there from its start."""
    model = getattr(transformers, model_class).from_pretrained(folder, dtype=getattr(torch, dtype))
    if bits < 16:
        prepare_model_for_kbit_training(quantize_(model, bits), use_gradient_checkpointing=checkpointing)
    elif checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=rank, target_modules="all-linear", merge_aware=merge_aware)
    lora = apply_lora(model, config).train()
    if chunked_loss:
        use_chunked_loss(lora)
    trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    words = torch.randint(16, model.config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(1))
    with as_on_a_card():
        step(lora, optimizer, words)
        release_scratch()  # which may be as large as another test's weights
        states = (value for state in optimizer.state.values() for value in state.values())
        with Watch((*tensors_of(lora), *states, words)) as watch:
            step(lora, optimizer, words)
    return watch.peak


def step(lora: nn.Module, optimizer: torch.optim.Optimizer, words: Tensor) -> None:
    lora(input_ids=words, labels=words, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
