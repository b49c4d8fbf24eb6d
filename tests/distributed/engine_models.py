"""Models, batches and one training run, the same in one process and in several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from tiny_llama import VOCABULARY, llama
from torch import Tensor, nn
from torch.utils.data import Dataset

from qlora_kit import LoraConfig, LoraModel, apply_lora, quantize_

BASES = ("float32", "bf16", "nf4", "int8", "2-bit")
STEPS = 10
ROWS = 4


def base(kind: str, tied: bool = False) -> Any:
    model = llama(tied)
    if kind == "bf16":
        return model.bfloat16()
    if kind == "nf4":
        quantize_(model, 4)
    elif kind == "int8":
        quantize_(model, quant_type="int8")
    elif kind == "2-bit":
        quantize_(model, 2)
    return model


def adapted(kind: str, case: str = "", seed: int = 3) -> LoraModel:
    """A model with an adapter that isn't at zero, trainable, in training mode."""
    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    model = base(kind, tied="tied" in case)
    torch.manual_seed(seed)
    if "embeddings" in case:
        settings["target_modules"] = ["q_proj", "down_proj", "embed_tokens"]
    if "copies" in case:
        settings["modules_to_save"] = ["norm", "lm_head"]
    if "dropout" in case:
        settings["lora_dropout"] = 0.3
    if "merge-aware" in case:
        settings["merge_aware"] = "same"
    if "biases" in case:
        model.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.zeros(model.config.hidden_size))
        settings["bias"] = "all"
    lora = apply_lora(model, LoraConfig(**settings))
    if "two adapters" in case:
        lora.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
        lora.set_adapter(["default", "second"])
    if "checkpointing" in case:
        lora.activation_checkpointing_enable()
    return lora.train()


def optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    # eps is large so that rounding isn't amplified where a gradient is next to nothing.
    return torch.optim.AdamW(parameters, lr=2e-3, eps=1e-2)


def batch(step: int, rank: int = 0, size: int = 1) -> Tensor:
    """Token ids (rows, tokens): this rank's share of the step's rows."""
    ids = torch.randint(1, VOCABULARY, (ROWS, 12), generator=torch.Generator().manual_seed(100 + step))
    return ids.chunk(size)[rank]


class Rows(Dataset[dict[str, Tensor]]):
    """The first batches' rows, in the order that ranks share them out."""

    def __len__(self) -> int:
        return 4 * ROWS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = batch(i // ROWS)[i % ROWS]
        return {"input_ids": ids, "labels": ids}


def trained(lora: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in lora.named_parameters() if parameter.requires_grad}


def train(
    model: Any,
    lora: LoraModel,
    backward: Callable[[Tensor], None],
    step: Callable[[], None],
    gradient: Callable[[nn.Parameter], Tensor],
    *,
    steps: Iterable[int] = range(STEPS),
    share: tuple[int, int] = (0, 1),
    evaluates: bool = False,
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """The losses, and the gradients by name, of each step."""
    losses, gradients = [], []
    for i in steps:
        ids = batch(i, *share)
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        gradients.append({name: gradient(parameter).clone() for name, parameter in trained(lora).items()})
        step()
        losses.append(loss.item())
        if evaluates:
            model.eval()
            with torch.no_grad():
                losses[-1] += model(input_ids=ids, labels=ids).loss.item()
            model.train()
    return losses, gradients


def seed_of(rank: int) -> int:
    """Where a rank's masks of dropout begin."""
    return 70 + rank


class InTurns(nn.Module):
    """One process as two ranks: each computes its half of the rows with random numbers of its own, and the loss is the
    mean."""

    def __init__(self, lora: LoraModel, seeds: Sequence[int]) -> None:
        super().__init__()
        self.lora = lora
        self.states = [torch.Generator().manual_seed(seed).get_state() for seed in seeds]

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        losses = []
        for rank, ids in enumerate(input_ids.chunk(len(self.states))):
            torch.set_rng_state(self.states[rank])
            losses.append(self.lora(input_ids=ids, labels=ids).loss)
            self.states[rank] = torch.get_rng_state()
        return SimpleNamespace(loss=torch.stack(losses).mean())


def of_parameter(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach()


def in_one_process(
    kind: str, case: str = "", seeds: Sequence[int] = (seed_of(0), seed_of(1))
) -> tuple[list[float], list[dict[str, Tensor]], LoraModel, Any]:
    """``train`` without an engine; ``seeds`` are where the masks of the halves of each batch begin."""
    lora = adapted(kind, case)
    model = InTurns(lora, seeds) if "dropout" in case else lora
    stepped = optimizer(list(trained(lora).values()))

    def step() -> None:
        stepped.step()
        stepped.zero_grad()

    losses, gradients = train(model, lora, lambda loss: loss.backward(), step, of_parameter, evaluates="eval" in case)
    return losses, gradients, lora, stepped
