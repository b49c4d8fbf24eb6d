"""A model's own forward, stopped block by block: what is seen is what one pass sees, and nothing else is changed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import (
    MODELS,
    WIDTH,
    Batches,
    Nested,
    gpt2,
    seeded,
    stack,
    targets,
    tiny_llama,
    tokens,
    vectors,
)
from torch import Tensor, nn

from loftq import collect_statistics
from loftq.inputs.groups import stages
from loftq.inputs.walk import Walk, stops_for

PLENTY = 1 << 40
# A block at a time does what one pass does, on the same values with the same kernels; memory that is aligned in
# another way may move float32's last digit.
ROUNDING = 1e-6


def walked(model: nn.Module, batches: Batches, **options: Any) -> dict[str, Tensor]:
    """Statistics by path, one stage after the other; a path comes once."""
    found: dict[str, Tensor] = {}
    for stage in stages(model, batches, targets(model), **options):
        new = {path: seen.statistics for path, seen in stage.seen().items()}
        assert not new.keys() & found.keys()
        found.update(new)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for path, statistics in expected.items():
        atol = ROUNDING * float(statistics.abs().max())
        torch.testing.assert_close(found[path], statistics, rtol=0, atol=atol, msg=lambda m, path=path: f"{path}: {m}")


def dropping() -> nn.Module:
    return gpt2(resid_pdrop=0.4, embd_pdrop=0.4, attn_pdrop=0.4).train()


@pytest.mark.parametrize("name", [*MODELS, "dropout while training"])
@pytest.mark.slow
def test_walking_sees_what_one_pass_sees(name: str) -> None:
    make, draw = MODELS.get(name, (dropping, tokens))
    model, batches = make(), draw()
    for diagonal in (False, True):
        expected = collect_statistics(model, batches, targets(model), diagonal=diagonal)
        assert_same(walked(model, batches, diagonal=diagonal), expected)
    assert model.training == (name == "dropout while training")


def test_the_stages_are_blocks_in_the_order_of_the_forward() -> None:
    model = tiny_llama()
    names = [[path.rpartition(".")[2] for path in s.paths] for s in stages(model, tokens(), targets(model)[::-1])]
    block = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert [set(own) for own in names] == [{"embed_tokens"}, block, block, {"lm_head"}]


def test_blocks_without_a_forward_are_no_stops() -> None:
    model = seeded(Nested)
    paths = targets(model)
    assert stops_for(model, paths) == {
        **{f"layers.{k}.0": [f"layers.{k}.0"] for k in (0, 1)},
        **{f"layers.{k}.1": [f"layers.{k}.1.0"] for k in (0, 1)},
        "tail.0": ["tail.0.0", "tail.0.1"],
    }
    # And tail.0, which is never called itself though its parts are, gives way to them.
    stops = [stage.paths for stage in stages(model, vectors(), paths)]
    assert stops[-2:] == [["tail.0.0"], ["tail.0.1"]]


@torch.no_grad()
def outputs(model: nn.Module, batches: Batches, folder: Path, limit: int) -> list[list[Tensor]]:
    """The model's outputs for each batch when all runs go through it block by block, each block computed twice."""
    found: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        with Walk(model, batches, stops_for(model, targets(model)), limit=limit, folder=folder) as walk:
            while (place := walk.here()) is not None:
                walk.passed.add(place[0])
                for run in place[1]:
                    run.forward()
                    walk.go_on(run, run.forward())
    finally:
        handle.remove()
    return [[v for v in torch.utils._pytree.tree_leaves(output) if isinstance(v, Tensor)] for output in found]


@pytest.mark.parametrize("limit", [0, PLENTY], ids=["in files", "in memory"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_a_walk_s_outputs_are_the_model_s_bit_for_bit(name: str, limit: int, tmp_path: Path) -> None:
    make, draw = MODELS[name]
    model, batches = make(), draw()
    with torch.no_grad():
        plain = [model(**batch) for batch in batches]
    expected = [[v for v in torch.utils._pytree.tree_leaves(o) if isinstance(v, Tensor)] for o in plain]
    found = outputs(model, batches, tmp_path, limit)
    assert len(found) == len(expected)
    for its, own in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(its, own, strict=True))
    assert list(tmp_path.iterdir()) == []


class InPlace(nn.Module):
    """Blocks that add to the very tensor that they are given, and get it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adding() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        for block in self.blocks:
            x = block(x, x)
        return x


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        change = torch.tanh(self.one(x)) + self.two(y)
        return x.add_(change)


def test_blocks_that_work_in_place_see_their_inputs_anew() -> None:
    model = seeded(InPlace)
    found = walked(model, vectors(), limit=0)
    assert_same(found, collect_statistics(model, vectors(), targets(model)))
    # Each layer's two modules are given one tensor under two names: it is one input.
    assert len({id(statistics) for statistics in found.values()}) == 3


def test_hooks_on_a_block_run_once_for_each_batch() -> None:
    model, calls = tiny_llama(), []
    layer = model.get_submodule("model.layers.0")
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    layer.register_forward_hook(lambda module, args, output: (calls.append(0), output * 2)[1])
    expected = collect_statistics(model, tokens(), targets(model))
    calls.clear()
    assert_same(walked(model, tokens()), expected)
    assert len(calls) == 1 + 3  # a row ahead, and three batches


def state_of(model: nn.Module) -> list[Any]:
    """All that a walk might leave behind on ``model``."""
    modules = list(model.modules())
    return [
        [vars(module).get("forward") for module in modules],
        [list(module._forward_pre_hooks) + list(module._forward_hooks) for module in modules],
        [module.training for module in modules],
        [parameter.data_ptr() for parameter in model.parameters()],
    ]


@pytest.fixture
def model() -> nn.Module:
    """In training mode but for one part, with a forward and a hook of its own on blocks."""
    model = tiny_llama().train()
    model.get_submodule("model.layers.1.mlp").eval()
    layer = model.get_submodule("model.layers.0")
    layer.forward = layer.forward
    layer.register_forward_pre_hook(lambda *_: None)
    return model


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """No thread is alive after a test that wasn't before."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("taken", range(5))
@pytest.mark.slow
def test_a_walk_that_is_left_midway_leaves_nothing(
    taken: int, sequential: bool, model: nn.Module, tmp_path: Path
) -> None:
    before = state_of(model)
    walk = stages(model, tokens(), targets(model), limit=0, folder=tmp_path, sequential=sequential)
    with closing(walk):
        for _ in range(taken):
            next(walk).seen()
        assert taken == 0 or (state_of(model) != before and list(tmp_path.iterdir()))
    assert state_of(model) == before
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_consumer_leaves_nothing(model: nn.Module, tmp_path: Path) -> None:
    before = state_of(model)
    with closing(stages(model, tokens(), targets(model), limit=0, folder=tmp_path)) as walk, pytest.raises(KeyError):
        next(walk).seen()["no such module"]
    assert state_of(model) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.0.mlp", "model.norm"])
@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_an_error_of_the_model_leaves_nothing(
    number: int, part: str, sequential: bool, model: nn.Module, tmp_path: Path
) -> None:
    calls = []

    def failing(*_: object) -> None:
        calls.append(0)
        if len(calls) == number:
            raise ValueError("the model's own error")

    model.get_submodule(part).register_forward_pre_hook(failing)
    before = state_of(model)
    with pytest.raises(ValueError, match="the model's own error"):
        walked(model, tokens(5), limit=0, folder=tmp_path, sequential=sequential)
    assert state_of(model) == before
    assert list(tmp_path.iterdir()) == []


class Swallowing(nn.Module):
    """Goes on whatever its blocks raise."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            try:
                x = block(x)
            except BaseException:
                continue
        return x


def test_a_model_that_swallows_every_error_is_left_all_the_same() -> None:
    model = seeded(Swallowing)
    with closing(stages(model, vectors(), targets(model))) as walk:
        assert next(walk).paths == ["blocks.0"]


def test_the_caller_s_tensors_are_whole_after_a_walk_that_was_left() -> None:
    for sequential in (False, True):
        batches = vectors()
        with closing(stages(stack(), batches, ["0", "2"], limit=0, sequential=sequential)) as walk:
            next(walk).seen()
        assert all(torch.equal(own["x"], other["x"]) for own, other in zip(batches, vectors(), strict=True))


def test_a_walk_is_repeatable() -> None:
    first, second = (walked(tiny_llama(), tokens(padded=True)) for _ in range(2))
    assert all(torch.equal(first[path], second[path]) for path in first)


def test_the_number_of_threads_is_kept_in_every_run() -> None:
    model, seen = tiny_llama(), set()
    model.get_submodule("model.norm").register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            seen.clear()
            torch.set_num_threads(threads)
            walked(model, tokens())
            assert seen == {threads} == {torch.get_num_threads()}
    finally:
        torch.set_num_threads(before)


def test_a_stage_can_be_asked_in_its_turn_only() -> None:
    model = tiny_llama()
    walk = list(stages(model, tokens(), targets(model)))
    with pytest.raises(RuntimeError, match=r"stage of model.embed_tokens: the model has gone on; call seen\(\) before"):
        walk[0].seen()
