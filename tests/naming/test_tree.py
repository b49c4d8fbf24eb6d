"""Canonical paths: what stands in wrappers, adapter layers or several places has the names that its user knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel

from qlora_kit import LoraConfig, apply_lora
from qlora_kit.injection.engine import Injection, swap_
from qlora_kit.layers import AdapterLayer
from qlora_kit.naming import Closed, Tree, base_of, canonical, module_at, slot


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.proj(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.again = self.blocks[0].proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.again(x)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


WRAPPERS = {"compile": compiled, "checkpoint": checkpoint_wrapper, "data parallel": DataParallel}
PATHS = ["", "blocks", "blocks.0", "blocks.0.proj", "blocks.1", "blocks.1.proj", "again"]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("where", ["whole", "block", "leaf", "twice"])
def test_paths_are_those_without_wrappers(wrap: Any, where: str) -> None:
    net: Any = Net()
    inner = net.blocks[1].proj
    if where == "block":
        net.blocks[1] = wrap(net.blocks[1])
    elif where == "leaf":
        net.blocks[1].proj = wrap(inner)
    elif where == "twice":
        net.blocks[1] = wrap(checkpoint_wrapper(net.blocks[1]))
    model = wrap(net) if where == "whole" else net
    tree = Tree(model)
    assert list(tree.modules) == PATHS
    assert tree.modules["blocks.1.proj"] is inner is module_at(model, "blocks.1.proj")
    assert tree.modules[""] is net
    assert tree.paths_of(net.again) == ["blocks.0.proj", "again"]
    assert [path for path, _ in tree.firsts()] == PATHS[:-1]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("where", ["block", "leaf"])
def test_a_swap_inside_wrappers_takes_effect_and_is_undone(wrap: Any, where: str) -> None:
    net: Any = Net()
    old = net.blocks[1].proj
    if where == "block":
        net.blocks[1] = wrap(net.blocks[1])
    else:
        net.blocks[1].proj = wrap(old)
    x, new = torch.randn(2, 4), nn.Linear(4, 4)
    with torch.no_grad():
        before = net(x)
        undo = Injection()
        swap_(net, "blocks.1.proj", new, undo)
        assert module_at(net, "blocks.1.proj") is new
        first = net.blocks[0](x)
        torch.testing.assert_close(net(x), net.again(first + new(first)), rtol=0, atol=0)
        undo.undo()
        assert module_at(net, "blocks.1.proj") is old
        torch.testing.assert_close(net(x), before, rtol=0, atol=0)


def test_a_path_with_wrappers_in_it_means_the_same_module() -> None:
    net: Any = Net()
    net.blocks[1] = compiled(net.blocks[1])
    assert module_at(net, "blocks.1._orig_mod.proj") is module_at(net, "blocks.1.proj")
    holder, name = slot(net, "blocks.1.proj")
    assert (holder, name) == (net.blocks[1]._orig_mod, "proj")


def test_keys_of_state_dicts() -> None:
    assert canonical("model._orig_mod.layers.0._checkpoint_wrapped_module.q.weight") == "model.layers.0.q.weight"
    assert canonical("_fsdp_wrapped_module.q.weight") == "q.weight"
    assert canonical("my_orig_mod.q_proj") == "my_orig_mod.q_proj"
    assert canonical("") == ""


def test_an_adapter_layer_counts_as_its_base_and_is_not_entered() -> None:
    net: Any = Net()
    base = net.again
    lora = apply_lora(net, LoraConfig(target_modules=["proj", "again"]))
    tree = Tree(lora.model)
    assert list(tree.modules) == PATHS
    layer = tree.modules["again"]
    assert isinstance(layer, AdapterLayer)
    assert base_of(layer) is base
    assert tree.paths_of(layer) == tree.paths_of(base) == ["blocks.0.proj", "again"]


def test_what_is_not_there_is_an_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match=r"blocks.1.q_proj: Block has no module 'q_proj'"):
        module_at(Net(), "blocks.1.q_proj")


def test_what_files_call_a_module() -> None:
    net: Any = Net()
    tree = Tree(net)
    assert tree.path_of("blocks.0.proj") == "blocks.0.proj"
    assert tree.path_of("module.blocks.0._orig_mod.proj") == "blocks.0.proj"
    assert tree.path_of("layers.0.proj") is None


def test_a_stand_in_at_one_of_its_base_s_places_is_at_that_alone() -> None:
    for target, other in (("proj", "again"), ("again", "blocks.0.proj")):
        net: Any = Net()
        base = net.again
        lora = apply_lora(
            net, LoraConfig(target_modules=[target], exclude_modules=["blocks.1.proj"] * (target == "proj"))
        )
        (layer,) = lora.adapter_layers().values()
        tree = Tree(lora.model)
        (own,) = tree.paths_of(layer)
        assert tree.modules[own] is layer
        assert tree.first(own) == own
        assert tree.modules[other] is base
        assert sorted(tree.paths_of(base)) == sorted([own, other])


class Opened(Closed):
    """Computes by a child of its own, and has a part."""

    parts = ("half",)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.half = nn.Linear(4, 4), nn.Linear(4, 2)


def test_of_a_closed_module_parts_alone_have_paths() -> None:
    model = nn.ModuleDict({"a": Opened(), "b": nn.Linear(4, 4)})
    assert list(Tree(model).modules) == ["", "a", "a.half", "b"]
    lora = apply_lora(model, LoraConfig(r=2, target_modules="all-linear"))
    assert sorted(lora.adapter_layers()) == ["a.half", "b"]
    assert module_at(model, "a.half") is lora.adapter_layers()["a.half"]
