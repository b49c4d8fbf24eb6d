"""One group of modules after the other, with the inputs that a model has whose earlier modules were replaced.

The reference is that model itself: a copy in float64, with D added to the weights of all modules that came before.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from small_models import (
    MODELS,
    VOCABULARY,
    WIDTH,
    Batches,
    Looped,
    captured,
    moments,
    seeded,
    stack,
    targets,
    text,
    tiny_llama,
    vectors,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loftq.inputs.groups import Seen, stages

# Two layers of float32 arithmetic against float64, relative to the largest entry. What was replaced moves the
# moments by a thousand times as much, which the tests check.
ROUNDING = 2e-5
FIRST = "model.layers.0"


def random_change(module: nn.Module, seed: int) -> Tensor:
    """D (out, in), a fifth of the weight's size."""
    weight = module.weight.detach() if isinstance(module, nn.Linear) else module.weight.detach().T
    draw = torch.Generator().manual_seed(seed)
    return 0.2 * weight.std() * torch.randn(weight.shape, generator=draw)


@torch.no_grad()
def replaced_(model: nn.Module, path: str, change: Tensor) -> None:
    """The module's weight is W + D from now on."""
    module = model.get_submodule(path)
    change = change if isinstance(module, nn.Linear) else change.T
    module.weight = nn.Parameter(module.weight + change.to(module.weight.dtype))  # its own, if it was tied


def rows_of(inputs: list[list[Tensor]], batches: Batches) -> np.ndarray:
    rows = []
    for calls, batch in zip(inputs, batches, strict=True):
        mask = batch.get("attention_mask")
        for value in calls:
            flat = value.reshape(-1, value.shape[-1]).numpy()
            hidden = mask is not None and value.shape[:-1] == mask.shape
            rows.append(flat[mask.numpy().reshape(-1) != 0] if hidden else flat)
    return np.concatenate(rows)


def assert_near(found: Tensor, expected: np.ndarray) -> None:
    atol = ROUNDING * np.abs(expected).max()
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=atol)


def assert_near_half(seen: Seen, own: list[list[Tensor]], its: list[list[Tensor]], batches: Batches) -> None:
    """``seen.half`` is of the first half of the batches, if these and the rest had inputs."""
    first = slice((len(batches) + 1) // 2)
    x, other = (rows_of(each[first], batches[first]) for each in (own, its))
    if not 0 < len(other) < seen.tokens:
        assert seen.half is None
        return
    assert seen.half is not None
    assert seen.half.share == len(other) / seen.tokens
    assert_near(seen.half.statistics, other.T @ other / len(other))
    assert_near(seen.half.cross, x.T @ other / len(other))


def in_double(batches: Batches) -> Batches:
    return [
        {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
        for batch in batches
    ]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "a shared block"])
@pytest.mark.slow
def test_inputs_are_those_of_the_model_with_the_earlier_modules_replaced(name: str) -> None:
    make, draw = MODELS[name]
    model, batches = make(), draw()
    # Mixtral's experts, all in one product, know no float64.
    original, double = (
        (copy.deepcopy(model), batches) if name == "mixtral" else (copy.deepcopy(model).double(), in_double(batches))
    )
    current = copy.deepcopy(original)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    order: list[str] = []
    moved = 0.0
    for stage in stages(model, batches, targets(model), sequential=True):
        own, its = captured(original, double, stage.paths), captured(current, double, stage.paths)
        for path in stage.paths:
            module = original.get_submodule(path)
            if not any(its[path]):
                assert path not in stage.seen()
                continue
            seen = stage.seen()[path]
            size = module.num_embeddings if isinstance(module, nn.Embedding) else 0
            expected = moments(its[path], batches, size)
            assert_near(seen.statistics, expected)
            if size:
                assert seen.cross is None
                continue
            x, other = rows_of(own[path], batches), rows_of(its[path], batches)
            assert seen.tokens == len(other)
            if seen.cross is None:
                assert len(x) != len(other), "only a router may leave out the cross moments"
                continue
            cross = x.T @ other / len(x)
            assert_near(seen.cross, cross)
            assert_near_half(seen, own[path], its[path], batches)
            moved = max(moved, float(np.abs(cross - expected).max() / np.abs(expected).max()))
        for path in stage.paths:
            stage.replaced[path] = random_change(model.get_submodule(path), len(order))
            replaced_(current, path, stage.replaced[path])
            order.append(path)
    assert sorted(order) == sorted(targets(model))
    assert moved > 1000 * ROUNDING
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_modules_with_one_input_come_as_one_stage_in_the_order_of_the_forward() -> None:
    model = tiny_llama()
    found = [stage.paths for stage in stages(model, text(), targets(model)[::-1], sequential=True)]
    groups = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    names = [[path.rpartition(".")[2] for path in paths] for paths in found]
    assert [sorted(own) for own in names] == [
        ["embed_tokens"],
        *[sorted(group) for _ in range(2) for group in groups],
        ["lm_head"],
    ]


def of_path(model: nn.Module, changed: set[str], wanted: str) -> Seen:
    for stage in stages(model, text(), targets(model), sequential=True):
        if wanted in stage.paths:
            return stage.seen()[wanted]
        for path in changed & set(stage.paths):
            stage.replaced[path] = random_change(model.get_submodule(path), 1)
    raise AssertionError(wanted)


@pytest.mark.parametrize(
    ("changed", "wanted", "sees"),
    [
        ("self_attn.v_proj", "model.layers.0.self_attn.o_proj", True),
        ("self_attn.v_proj", "model.layers.0.mlp.up_proj", True),
        ("mlp.gate_proj", "model.layers.0.mlp.down_proj", True),
        ("mlp.down_proj", "model.layers.1.self_attn.q_proj", True),
        ("self_attn.q_proj", "lm_head", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.v_proj", False),  # the same input
        ("mlp.up_proj", "model.layers.0.self_attn.o_proj", False),  # comes before it
    ],
)
@pytest.mark.slow
def test_later_modules_see_earlier_replacements_and_no_others(changed: str, wanted: str, sees: bool) -> None:
    plain = of_path(tiny_llama(), set(), wanted)
    found = of_path(tiny_llama(), {f"{FIRST}.{changed}"}, wanted)
    assert torch.equal(found.statistics, plain.statistics) != sees
    assert found.cross is not None
    assert torch.equal(found.cross, plain.statistics) != sees


def test_without_replacements_both_moments_are_the_plain_ones() -> None:
    model = tiny_llama()
    plain = {path: seen for stage in stages(model, text(), targets(model)) for path, seen in stage.seen().items()}
    for stage in stages(model, text(), targets(model), sequential=True):
        for path, seen in stage.seen().items():
            assert torch.equal(seen.statistics, plain[path].statistics)
            assert seen.cross is None or torch.equal(seen.cross, plain[path].statistics)
            assert seen.tokens == plain[path].tokens == 3 * 2 * 9


class Scaled(nn.Embedding):
    """As Gemma's: what is looked up is multiplied."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)
        self.register_buffer("embed_scale", torch.tensor(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


class ByName(nn.Module):
    """Calls its modules with their inputs' names."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.last = Scaled(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.last(input=torch.tanh(self.middle(input=self.table(input_ids))))


def test_a_table_s_scale_and_inputs_given_by_name_are_heeded() -> None:
    torch.manual_seed(0)
    model, batches = ByName(), text()
    current = copy.deepcopy(model).double()
    for stage in stages(model, batches, ["table", "middle", "last"], sequential=True):
        [path] = stage.paths
        if path != "table":
            found: list[Tensor] = []
            handle = current.get_submodule(path).register_forward_pre_hook(
                lambda module, args, kwargs, found=found: found.append(kwargs["input"].detach()), with_kwargs=True
            )
            for batch in batches:
                current(**batch)
            handle.remove()
            rows = torch.cat(found).reshape(-1, WIDTH).numpy()
            assert_near(stage.seen()[path].statistics, rows.T @ rows / len(rows))
        stage.replaced[path] = random_change(model.get_submodule(path), 3)
        replaced_(current, path, stage.replaced[path])


@pytest.mark.parametrize("sequential", [False, True])
def test_what_a_forward_calls_again_comes_last_with_the_original_s_inputs_of_all_calls(sequential: bool) -> None:
    model, batches = seeded(Looped), vectors()
    found = []
    for stage in stages(model, batches, targets(model), sequential=sequential):
        found.append(stage.paths)
        seen = stage.seen()[stage.paths[0]]
        for path in stage.paths:
            stage.replaced[path] = random_change(model.get_submodule(path), 5)
    assert found == [["first"], ["last"], ["blocks.0.0"]]
    assert_near(seen.statistics, moments(captured(model, batches, ["blocks.0.0"])["blocks.0.0"], batches))
    assert (seen.tokens, seen.cross) == (3 * 5 * 3, None)


class Again(nn.Module):
    """Goes through its layer once more where its input asks for that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        for _ in range(1 + int(x[0, 0] > 0)):
            y = y + torch.tanh(self.last(y))
        return y


class Repeating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Again() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        start = x[:1, :1]
        for block in self.blocks:
            x = block(torch.cat([torch.cat([start, x[:1, 1:]], 1), x[1:]]))
        return x


def test_a_module_that_some_batches_come_to_twice_within_a_block_is_seen_each_time() -> None:
    model, batches = seeded(Repeating), vectors()
    assert {bool(batch["x"][0, 0] > 0) for batch in batches} == {False, True}
    current, plain = copy.deepcopy(model).double(), in_double(batches)
    for number, stage in enumerate(stages(model, batches, targets(model), sequential=True)):
        [path] = stage.paths
        expected = captured(current, plain, [path])[path]
        assert_near(stage.seen()[path].statistics, moments(expected, plain))
        assert stage.seen()[path].tokens == sum(len(rows) for calls in expected for rows in calls)
        stage.replaced[path] = random_change(model.get_submodule(path), number)
        replaced_(current, path, stage.replaced[path])


@pytest.mark.parametrize(("limit", "again"), [(1 << 30, 1), (0, 2)])
def test_a_block_is_computed_no_further_than_to_what_is_looked_at(limit: int, again: int) -> None:
    model, batches, calls = tiny_llama(), text(), Counter[str]()
    names = ("q_proj", "o_proj", "gate_proj", "down_proj")
    for path in targets(model):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.update([path]))
    for stage in stages(model, batches, targets(model), sequential=True, limit=limit):
        stage.seen()
    # A row ahead; of each batch once whole and once as the model becomes, and for each later group once as it becomes
    # and, where its inputs had no room, once as it was; its outputs had none either there.
    once = 1 + len(batches) * (2 if limit else 3)
    expected = {name: once + len(batches) * again * later for name, later in zip(names, (3, 2, 1, 0), strict=True)}
    for layer in (0, 1):
        found = {path.rpartition(".")[2]: count for path, count in calls.items() if f"layers.{layer}." in path}
        assert {name: found[name] for name in names} == expected
    assert calls["lm_head"] == 1, "no run's own call of the last one comes"


@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 8])
def test_inputs_that_are_kept_are_those_that_are_computed_again(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Whatever has room: none, a part of a block's, all; changes in the meantime make no difference to the original."""
    model, batches = tiny_llama(), text()

    def found(limit: int) -> dict[str, tuple[Tensor, Tensor]]:
        seen = {}
        for number, stage in enumerate(stages(model, batches, targets(model), sequential=True, limit=limit)):
            for path, known in stage.seen().items():
                seen[path] = known.statistics, torch.zeros(0) if known.cross is None else known.cross
                stage.replaced[path] = random_change(model.get_submodule(path), number)
        return seen

    one = 4 * 64 * max(batch["input_ids"].numel() for batch in batches)
    whole, bounded = found(1 << 30), found(2 * (room * one + one // 2))
    for path, known in whole.items():
        assert all(torch.equal(own, other) for own, other in zip(known, bounded[path], strict=True)), path


def test_a_conv1d_is_replaced_in_the_orientation_of_its_kind() -> None:
    model, batches = stack(), vectors()
    assert isinstance(model[4], Conv1D)
    wide = nn.Sequential(*model, nn.Linear(8, 3))
    batches = [{"input": batch["x"]} for batch in batches]
    current = copy.deepcopy(wide)
    for stage in stages(wide, batches, ["4", "5"], sequential=True):
        [path] = stage.paths
        expected = moments(captured(current, batches, [path])[path], batches)
        assert_near(stage.seen()[path].statistics, expected)
        stage.replaced[path] = random_change(wide.get_submodule(path), 1)
        replaced_(current, path, stage.replaced[path])


def test_one_batch_has_no_half_of_its_own() -> None:
    for stage in stages(tiny_llama(), text()[:1], targets(tiny_llama()), sequential=True):
        assert all(seen.half is None for seen in stage.seen().values())
    for stage in stages(tiny_llama(), text(), targets(tiny_llama())):
        assert all(seen.half is None for seen in stage.seen().values()), "nothing differs from the original's inputs"


def test_no_batches_and_no_paths_are_no_stages() -> None:
    assert list(stages(tiny_llama(), [], targets(tiny_llama()))) == []
    assert list(stages(tiny_llama(), text(), [])) == []
