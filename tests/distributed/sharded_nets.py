"""A small network of all that tensor parallelism shares out, plans for it in every form of inputs and outputs, and what
one process and several of them compute of it, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from qlora_kit import LoraConfig, LoraModel, apply_lora
from qlora_kit.distributed.clipping import clip_grad_norm_

WORDS, WIDTH, INNER, RANK = 24, 64, 128, 4
LINEARS = ["up", "down", "other", "back"]
PLAIN = ColwiseParallel(), RowwiseParallel()


class Net(nn.Module):
    """Words, a norm, two pairs of linears with a residual, a head: logits of every word."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER, bias), nn.Linear(INNER, WIDTH, bias)
        self.other, self.back = nn.Linear(WIDTH, INNER, bias), nn.Linear(INNER, WIDTH, bias)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(self.table(words))
        x = x + self.down(torch.tanh(self.up(x)))
        x = x + self.back(torch.tanh(self.other(x)))
        return self.head(x)  # type: ignore[no-any-return]


def net(**settings: Any) -> Net:
    torch.manual_seed(3)
    return Net(**settings)


def words() -> Tensor:
    return torch.randint(0, WORDS, (2, 6), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, given: Tensor) -> Tensor:
    logits = model(given)
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), given.roll(-1, 1).flatten())


def _pairs(column: Any, row: Any) -> dict[str, Any]:
    return {"up": column(), "down": row(), "other": column(), "back": row()}


#: What each plan is for: how inputs come, what outputs are.
PLANS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {
        "table": RowwiseParallel(input_layouts=Replicate()),
        **_pairs(ColwiseParallel, RowwiseParallel),
        "head": ColwiseParallel(output_layouts=Replicate()),
    },
    "dtensors": lambda: {
        "table": ColwiseParallel(output_layouts=Replicate()),
        **_pairs(lambda: ColwiseParallel(use_local_output=False), lambda: RowwiseParallel(output_layouts=Replicate())),
        "head": ColwiseParallel(use_local_output=False),
    },
    "gathered": lambda: {
        **_pairs(
            lambda: ColwiseParallel(output_layouts=Replicate()), lambda: RowwiseParallel(input_layouts=Replicate())
        ),
        "head": ColwiseParallel(output_layouts=Replicate()),
    },
    "sequence": lambda: {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(use_local_output=True),
        **_pairs(lambda: ColwiseParallel(input_layouts=Shard(1)), lambda: RowwiseParallel(output_layouts=Shard(1))),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
    "sequence of dtensors": lambda: {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False),
        "norm": SequenceParallel(),
        **_pairs(
            lambda: ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
            lambda: RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        ),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
}


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(model: nn.Module, plan: str) -> nn.Module:
    return parallelize_module(copy.deepcopy(model), mesh(), PLANS[plan]())


def adapted(model: nn.Module, targets: list[str], seed: int = 5, **settings: Any) -> LoraModel:
    """Both factors random, so that every gradient is there from the first step."""
    torch.manual_seed(seed)
    return apply_lora(
        model, LoraConfig(**{"r": RANK, "target_modules": targets, "init_lora_weights": False, **settings})
    )


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()  # type: ignore[operator]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def steps(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], count: int, lr: float = 0.05, clip: float | None = 1.0
) -> list[tuple[float, dict[str, Tensor]]]:
    """The loss and the whole gradients of each step of SGD with momentum, gradients clipped."""
    parameters, found = trained(model), []
    optimizer = torch.optim.SGD(parameters.values(), lr=lr, momentum=0.9)
    for step in range(count):
        torch.manual_seed(step)
        value = loss(model)
        value.backward()
        gradients = {name: whole(p.grad).clone() for name, p in parameters.items() if p.grad is not None}
        if clip is not None:
            clip_grad_norm_(parameters.values(), clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(value.detach()), gradients))
    return found


def apart(one: list[tuple[float, dict[str, Tensor]]], other: list[tuple[float, dict[str, Tensor]]]) -> dict[str, float]:
    """The largest difference of losses, and of all gradients together relative to their norm."""
    losses, gradients = 0.0, 0.0
    for (first, own), (second, others) in zip(one, other, strict=True):
        assert own.keys() == others.keys()
        losses = max(losses, abs(first - second))
        size = sum(float(t.double().square().sum()) for t in own.values()) ** 0.5
        off = sum(float((own[name].double() - others[name].double()).square().sum()) for name in own) ** 0.5
        gradients = max(gradients, off / size)
    return {"losses": losses, "gradients": gradients}


@contextmanager
def told() -> Iterator[list[tuple[str, int]]]:
    """In the block: the name and number of elements of what ranks tell each other beside what DTensors do."""
    from qlora_kit.layers.sharded import collectives

    found: list[tuple[str, int]] = []
    before = dist.all_reduce, collectives._all_gather, collectives._reduce_scatter

    def reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(("all-reduce", tensor.numel()))
        return before[0](tensor, *args, **kwargs)

    def gather(into: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(("all-gather", into.numel()))
        return before[1](into, tensor, *args, **kwargs)

    dist.all_reduce, collectives._all_gather = reduce, gather
    try:
        yield found
    finally:
        dist.all_reduce, collectives._all_gather = before[0], before[1]
