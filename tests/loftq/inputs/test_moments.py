"""Second moments of a model's inputs: equal to sums in float64 over inputs that were captured another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_models import (
    MODELS,
    VOCABULARY,
    WIDTH,
    captured,
    moments,
    reference,
    stack,
    targets,
    tiny_llama,
    tokens,
    vectors,
)
from torch import Tensor, nn

from loftq import collect_statistics
from qlora_kit.errors import ConfigError

# Sums of some dozen float32 products, relative to the largest entry; a sum in bfloat16 would be 4e-3 off.
ROUNDING = 1e-6


def assert_moments(found: Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.float32
    assert tuple(found.shape) == expected.shape
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_moments_are_those_of_the_inputs_that_were_captured(name: str) -> None:
    make, draw = MODELS[name]
    model, batches = make(), draw()
    paths = targets(model)
    found, expected = collect_statistics(model, batches, paths), reference(model, batches, paths)
    # Of the experts, the last one of each layer is called by no row.
    assert set(paths) - set(found) == {path for path in paths if path.endswith("experts.3")}
    assert set(found) == set(expected)
    for path, statistics in found.items():
        assert_moments(statistics, expected[path])


def test_diagonals_are_the_diagonals() -> None:
    model, batches = tiny_llama(), tokens(padded=True)
    found, full = (
        collect_statistics(model, batches, targets(model), diagonal=True),
        reference(model, batches, targets(model)),
    )
    for path, expected in full.items():
        assert_moments(found[path], expected if expected.ndim == 1 else expected.diagonal())


def test_modules_with_one_input_share_one_matrix() -> None:
    model = tiny_llama()
    paths = [path for path in targets(model) if ".layers." in path]
    found = collect_statistics(model, tokens(), paths)
    for layer in (0, 1):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        assert found[f"{attention}.q_proj"] is found[f"{attention}.k_proj"] is found[f"{attention}.v_proj"]
        assert found[f"{mlp}.gate_proj"] is found[f"{mlp}.up_proj"]
    # Seven linears in each of two layers have four distinct inputs: attention, its output, the MLP, its inside.
    assert (len(found), len({id(statistics) for statistics in found.values()})) == (14, 8)


class Pair(nn.Module):
    """Layers ``a`` and ``b`` in the order, and with the inputs, that ``way`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, way: str) -> None:
        if way == "together":
            self.a(x), self.b(x)
        elif way == "b first":
            self.b(x), self.a(x)
        elif way == "apart":
            self.a(x), self.b(x + 1)
        elif way == "a alone":
            self.a(x)
        elif way == "b alone":
            self.b(x)
        elif way == "a twice":
            self.a(x), self.b(x), self.a(torch.tanh(x))
        elif way == "changed in between":
            self.a(x), self.b(x.mul_(2))


@pytest.mark.parametrize(
    "ways",
    [
        *(["together", way] for way in ("b first", "apart", "a alone", "b alone", "a twice")),
        *([way, "together"] for way in ("b first", "apart", "a alone", "b alone")),
        ["a twice"],
        ["changed in between"],
    ],
    ids=", then ".join,
)
def test_sharing_that_breaks_is_noticed(ways: list[str]) -> None:
    torch.manual_seed(0)
    model = Pair()

    def batches() -> list[dict[str, Any]]:
        return [{**batch, "way": way} for batch, way in zip(vectors(len(ways)), ways, strict=True)]

    found = collect_statistics(model, batches(), ["a", "b"])
    if "changed in between" in ways:  # the pass changed the batches, which start anew
        found = collect_statistics(model, batches(), ["a", "b"])
    inputs = captured(model, batches(), ["a", "b"])
    for path in ("a", "b"):
        assert_moments(found[path], moments(inputs[path], batches()))
    assert not torch.equal(found["a"], found["b"]) or "b first" in ways


class Tables(nn.Module):
    """Two embeddings of other sizes, looked up by the same ids."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Embedding(VOCABULARY, 4), nn.Embedding(VOCABULARY + 8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.small(input_ids) + self.large(input_ids)


def test_embeddings_have_token_frequencies_each_of_its_own_size() -> None:
    model, batches = Tables(), tokens(padded=True)
    found = collect_statistics(model, batches, ["small", "large"])
    seen = torch.cat([b["input_ids"][b["attention_mask"] != 0] for b in batches]).tolist()
    for path, size in (("small", VOCABULARY), ("large", VOCABULARY + 8)):
        assert_moments(found[path], np.array([seen.count(token) / len(seen) for token in range(size)]))


class Flattening(nn.Module):
    """Gives a layer all the tokens in one row of them, as routers get them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.router = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.router(self.table(input_ids).flatten(0, 1))


def test_padding_does_not_count_whatever_it_holds() -> None:
    torch.manual_seed(0)
    for model, path in ((tiny_llama(), "model.layers.1.self_attn.o_proj"), (Flattening(), "router")):
        batches = tokens(padded=True)
        found = collect_statistics(model, batches, [path])[path]
        for batch in batches:
            batch["input_ids"][batch["attention_mask"] == 0] = 5
        assert torch.equal(collect_statistics(model, batches, [path])[path], found)
        everything = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
        assert not torch.allclose(collect_statistics(model, everything, [path])[path], found, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_summed_up_in_float32(dtype: torch.dtype) -> None:
    model, batches = tiny_llama().to(dtype), tokens(6)
    found = collect_statistics(model, batches, targets(model))
    for path, expected in reference(model, batches, targets(model)).items():
        assert_moments(found[path], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("diagonal", [False, True])
def test_inputs_that_are_not_finite_are_refused_by_path(value: float, diagonal: bool) -> None:
    model = stack()
    with torch.no_grad():
        model[0].bias[3] = value
    model[1] = nn.Identity()  # infinity would be a number again behind tanh
    message = r"^2: expected finite inputs .* found NaN, infinity or squares beyond float32; run the model in bfloat16"
    with pytest.raises(ConfigError, match=message):
        collect_statistics(model, vectors(), ["0", "2"], diagonal=diagonal)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def failing(*_: object) -> None:
    raise ValueError("the model's own error")


@pytest.mark.parametrize("fails", [False, True])
def test_flags_and_hooks_are_as_before_also_after_an_error(fails: bool) -> None:
    model = stack().train()
    model[1].eval()  # a part that was put in evaluation mode stays so
    modes = [module.training for module in model.modules()]
    model[2].register_forward_pre_hook(failing if fails else lambda *_: None)
    before = hooks_of(model)
    seen: list[bool] = []
    model[3].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    if fails:
        with pytest.raises(ValueError, match="the model's own error"):
            collect_statistics(model, vectors(), ["0", "4"])
    else:
        collect_statistics(model, vectors(), ["0", "4"])
        assert seen == [False] * 3
    assert [module.training for module in model.modules()] == modes
    assert hooks_of(model) == before + 1


def test_dropout_is_off_meanwhile() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, 4)).train()
    batches = [{"input": batch["x"]} for batch in vectors()]
    rows = torch.cat([batch["input"] for batch in batches]).double().numpy()
    assert_moments(collect_statistics(model, batches, ["1"])["1"], rows.T @ rows / len(rows))


def test_modules_that_are_never_called_are_absent() -> None:
    model: Callable[..., Any] = Pair()
    batches = [{**batch, "way": "a alone"} for batch in vectors()]
    assert list(collect_statistics(model, batches, ["a", "b"])) == ["a"]
    hidden = [{**batch, "attention_mask": torch.zeros_like(batch["input_ids"])} for batch in tokens()]
    assert collect_statistics(Flattening(), hidden, ["table", "router"]) == {}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


def test_inputs_given_by_name_count_too() -> None:
    rows = torch.cat([batch["x"] for batch in vectors()]).double().numpy()
    assert_moments(collect_statistics(Named(), vectors(), ["layer"])["layer"], rows.T @ rows / len(rows))
