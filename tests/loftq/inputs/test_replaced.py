"""What modules answer that have become something else: computed once, and anew where anything before has changed."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import WIDTH, captured, moments, seeded, stack, targets, text, tiny_llama, vectors
from test_groups import assert_near, random_change, replaced_
from torch import Tensor, nn

from loftq.inputs.groups import stages
from loftq.inputs.replaced import Replaced
from loftq.inputs.walk import Walk


class Changing(nn.Module):
    """Works in place in what its first layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.between(self.first(x).relu_().add_(x))))


class Choosing(Changing):
    """Calls the layer between the others for some batches only, the first not among them: its turn comes last."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.last(y + self.between(y) if x[0, 0] > 0 else y)


class Returning(Changing):
    """Calls two layers in turns."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.between(torch.tanh(self.first(x)))
        return self.last(x)


def blocks_of(kind: type[Changing]) -> nn.Module:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(kind() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            start = x[:1, :1]  # what chooses is the same for both
            for block in self.blocks:
                x = block(torch.cat([torch.cat([start, x[:1, 1:]], 1), x[1:]]))
            return x

    return seeded(Blocks)


@pytest.mark.parametrize("limit", [1 << 30, 12 * 5 * WIDTH, 0])
@pytest.mark.parametrize("kind", [Changing, Choosing, Returning])
def test_answers_are_those_of_the_modules_as_they_have_become(kind: type[Changing], limit: int) -> None:
    model, batches = blocks_of(kind), vectors(4)
    batches.sort(key=lambda batch: float(batch["x"][0, 0]))
    assert [bool(batch["x"][0, 0] > 0) for batch in (batches[0], batches[-1])] == [False, True]
    current = copy.deepcopy(model).double()
    plain = [{"x": batch["x"].double()} for batch in batches]
    order = []
    for number, stage in enumerate(stages(model, batches, targets(model), sequential=True, limit=limit)):
        [path] = stage.paths
        order.append(path.rpartition(".")[2])
        assert_near(stage.seen()[path].statistics, moments(captured(current, plain, [path])[path], plain))
        stage.replaced[path] = random_change(model.get_submodule(path), number)
        replaced_(current, path, stage.replaced[path])
    turns = ["first", "last", "between"] if kind is Choosing else ["first", "between", "last"]
    assert order == 2 * turns


@pytest.mark.parametrize(("limit", "later"), [(1 << 30, 0), (0, 1)])
def test_a_module_that_has_become_something_else_answers_each_input_once(limit: int, later: int) -> None:
    model, batches, calls = tiny_llama(), text(), Counter[str]()
    names = ("q_proj", "o_proj", "gate_proj", "down_proj")
    for path in targets(model):
        module = model.get_submodule(path)

        def counted(x: Tensor, own: Any = module.forward, path: str = path) -> Tensor:
            calls.update([path])
            return own(x)

        module.forward = counted
    for number, stage in enumerate(stages(model, batches, targets(model), sequential=True, limit=limit)):
        stage.seen()
        stage.replaced.update({path: random_change(model.get_submodule(path), number) for path in stage.paths})
    # A row ahead; of each batch once as it was, and once as it becomes; without room for inputs, outputs and answers
    # once more as it was and for each later group of the block once more as it was and as it becomes.
    for layer in (0, 1):
        found = {path.rpartition(".")[2]: count for path, count in calls.items() if f"layers.{layer}." in path}
        expected = {
            name: 1 + len(batches) * (2 + later * (1 + 2 * behind))
            for name, behind in zip(names, (3, 2, 1, 0), strict=True)
        }
        assert {name: found[name] for name in names} == expected
    assert not any("forward" in vars(module) and module.forward.__name__ != "counted" for module in model.modules())


def test_replacements_that_are_cut_short_leave_nothing(tmp_path: Path) -> None:
    model = stack()
    before = [dict(vars(module)) for module in model.modules()]
    with Walk(model, vectors(1), ["2"], limit=0, folder=tmp_path) as walk:
        replaced = Replaced(walk)
        replaced.changes = {"0": torch.ones(WIDTH, WIDTH), "9": torch.ones(1)}
        with pytest.raises(AttributeError), replaced.answering(walk.runs[0]):
            pass
    assert [dict(vars(module)) for module in model.modules()] == before
    assert not any(module._forward_hooks for module in model.modules())
