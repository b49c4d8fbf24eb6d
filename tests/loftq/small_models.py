"""Small models of many shapes with batches for them, and their modules' inputs, captured without hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tiny_llama import llama
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

VOCABULARY, WIDTH = 64, 16
Batches = list[dict[str, Any]]


def tokens(count: int = 3, rows: int = 2, length: int = 9, seed: int = 0, padded: bool = False) -> Batches:
    """Batches of token ids; the mask hides the end of every second row if ``padded``."""
    draw = torch.Generator().manual_seed(seed)
    batches: Batches = []
    for number in range(count):
        ids = torch.randint(1, VOCABULARY, (rows, length), generator=draw)
        mask = torch.ones_like(ids)
        if padded:
            mask[1::2, length - 2 - number :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def vectors(count: int = 3, rows: int = 5, seed: int = 0) -> Batches:
    draw = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(rows, WIDTH, generator=draw)} for _ in range(count)]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def tiny_llama() -> nn.Module:
    return llama(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24).eval()


def gpt2(**settings: Any) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(**{**sizes, **ends, **settings})))


def t5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return seeded(lambda: T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)))


def bert() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2}
    return seeded(lambda: BertModel(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)))


def mixtral() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return seeded(lambda: MixtralForCausalLM(MixtralConfig(**sizes, **heads, max_position_embeddings=32)))


class Stack(nn.Sequential):
    """Layers on (rows, WIDTH), not in a ModuleList."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def stack() -> nn.Module:
    return seeded(lambda: Stack(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 12), nn.Tanh(), Conv1D(8, 12)))


class Experts(nn.Module):
    """Each row goes to the linear layer that its first entries choose; the last one gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, :3].argmax(dim=1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                out[rows] = torch.tanh(expert(x[rows]))
        return out


class Routed(nn.Module):
    """Two layers of experts in a ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Looped(nn.Module):
    """A shared block that is gone through three times, between layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())])
        self.last = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + self.blocks[0](x)
        return self.last(x)


class Nested(nn.Module):
    """Lists of lists, whose outer members have no forward, and a block whose parts are called without it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())])
            for _ in range(2)
        )
        self.tail = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4))])

    def forward(self, x: Tensor) -> Tensor:
        for one, two in self.layers:
            x = x + two(torch.relu(one(x)))
        return self.tail[0][1](torch.relu(self.tail[0][0](x)))


def text(padded: bool = False) -> Batches:
    """Tokens for models that would build a cache."""
    return [{**batch, "use_cache": False} for batch in tokens(padded=padded)]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batches]]] = {
    "llama": (tiny_llama, text),
    "llama, padded": (tiny_llama, lambda: text(padded=True)),
    "gpt2": (gpt2, text),
    "t5": (t5, lambda: [{**batch, "decoder_input_ids": batch["input_ids"].flip(1)[:, :5]} for batch in text()]),
    "bert": (bert, lambda: text(padded=True)),
    "mixtral": (mixtral, text),
    "experts": (lambda: seeded(Routed), vectors),
    "sequential": (stack, vectors),
    "a shared block": (lambda: seeded(Looped), vectors),
    "lists of lists": (lambda: seeded(Nested), vectors),
}


def targets(model: nn.Module) -> list[str]:
    """Paths of all linear layers and embeddings, but for T5's table that its stacks have tables of their own for."""
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    return [path for path, module in model.named_modules() if isinstance(module, kinds) and path != "shared"]


@torch.no_grad()
def captured(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], paths: Sequence[str]
) -> dict[str, list[list[Tensor]]]:
    """Per path, batch and call the input (copied), through a forward put in the place of the module's own."""
    found: dict[str, list[list[Tensor]]] = {path: [] for path in paths}
    modules = {path: model.get_submodule(path) for path in paths}
    own = {path: vars(module).get("forward") for path, module in modules.items()}
    for path, module in modules.items():

        def noting(x: Tensor, path: str = path, forward: Any = module.forward) -> Tensor:
            found[path][-1].append(x.clone())
            return forward(x)

        module.forward = noting  # type: ignore[method-assign]
    try:
        for batch in batches:
            for calls in found.values():
                calls.append([])
            model(**batch)
    finally:
        for path, module in modules.items():
            del module.forward
            if own[path] is not None:
                module.forward = own[path]  # type: ignore[method-assign]
    return found


def moments(inputs: list[list[Tensor]], batches: Sequence[Mapping[str, Any]], vocabulary: int = 0) -> np.ndarray:
    """E[x x^T] in float64, or token frequencies, of those positions that the mask shows; row after row."""
    rows = []
    for calls, batch in zip(inputs, batches, strict=True):
        mask = batch.get("attention_mask")
        for value in calls:
            lead = tuple(value.shape) if vocabulary else tuple(value.shape[:-1])
            shown = np.ones(lead, bool)
            if mask is not None and lead in (tuple(mask.shape), (mask.numel(),)):
                shown = mask.numpy().reshape(lead) != 0
            for place in np.argwhere(shown):
                row = value[tuple(place)]
                rows.append(np.eye(vocabulary)[row] if vocabulary else row.double().numpy())
    stacked = np.array(rows)
    return stacked.mean(0) if vocabulary else np.einsum("ni,nj->ij", stacked, stacked) / len(stacked)


def reference(model: nn.Module, batches: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> dict[str, np.ndarray]:
    """``moments`` of those modules at ``paths`` that are called; an embedding's are its tokens' frequencies."""
    inputs = captured(model, batches, paths)
    sizes = {path: getattr(model.get_submodule(path), "num_embeddings", 0) for path in paths}
    return {path: moments(calls, batches, sizes[path]) for path, calls in inputs.items() if any(calls)}
