"""Rows with adapters of their own, layer by layer: every family and storage against float64, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from adapted_layers import adapt
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from reference import branches as ref
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers.pytorch_utils import Conv1D

from qlora_kit import AdapterError, AdapterLayer, quantize_
from qlora_kit.layers.row_choice import in_rows, rows_of
from qlora_kit.layers.rows import Rows

#: Of a difference of two sums of up to 96 products in float32, relative to the largest.
DIFFERENCE = 1e-5
# By places: rows of an adapter apart, together, one without any, and one whose adapter this layer lacks.
NAMES = ("a1", "a0", "__base__", "a1", "a0", "elsewhere")
TOGETHER = ("a0", "a0", "a0", "a1", "a1", "__base__")
# As many rows of each, so one batched product has all.
EVEN = ("__base__", "a0", "a0", "a1", "a1", "elsewhere")


def packed(bits: int) -> nn.Module:
    model = nn.ModuleDict({"layer": nn.Linear(64, 36)})
    return quantize_(model, bits, target_modules=["layer"])["layer"]


LINEARS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Linear(64, 36),
    "bfloat16": lambda: nn.Linear(64, 36).to(torch.bfloat16),
    "transposed": lambda: Conv1D(36, 64),
    "nf4": lambda: Linear4bit(64, 36, compute_dtype=torch.float32, quant_type="nf4").to("cpu"),
    "int8": lambda: Linear8bitLt(64, 36, has_fp16_weights=False).to("cpu"),
    "3 bits": lambda: packed(3),
    "2 bits": lambda: packed(2),
}


def branch_of(layer: AdapterLayer, name: str) -> ref.Branch | None:
    """Adapter ``name``'s matrices in float64, and its scaling from the definition."""
    if name not in layer.r:
        return None
    A, B = (ref.array(t) for t in layer.adapter_tensors(name).values())
    return A.reshape(len(A), -1), B.reshape(len(B), -1), layer.lora_alpha[name] / layer.r[name]


def right(layer: AdapterLayer, names: Sequence[str], x: Tensor, give: Callable[..., np.ndarray]) -> np.ndarray:
    """What ``give`` gives for each row of ``x`` and the branches that are its own."""
    rows = []
    for name, row in zip(names, x, strict=True):
        branch = branch_of(layer, name)
        rows.append(give(row.numpy() if not row.is_floating_point() else ref.array(row), [branch] if branch else []))
    return np.stack(rows)


def assert_same(found: Tensor, expected: np.ndarray, tolerance: float = DIFFERENCE) -> None:
    assert np.abs(ref.array(found) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("names", "config"),
    [(NAMES, {}), (TOGETHER, {}), (NAMES, {"r": 4}), (EVEN, {"r": 4, "lora_alpha": 6}), (TOGETHER, {"r": 4})],
    ids=["apart", "together", "apart, one rank", "even, one rank and scaling", "together, one rank"],
)
@pytest.mark.parametrize("shape", [(6, 64), (6, 5, 64)], ids=["vectors", "words"])
@pytest.mark.parametrize("storage", LINEARS)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_a_linear_on_every_storage(
    storage: str, shape: tuple[int, ...], names: tuple[str, ...], config: dict[str, Any]
) -> None:
    """Called on its own with PEFT's keyword, and within a model's call; what isn't a row's own adds nothing to it."""
    lora, layer = adapt(LINEARS[storage](), adapters=2, fan_in_fan_out=storage == "transposed", **config)
    lora.eval()
    dtype = torch.bfloat16 if storage == "bfloat16" else torch.float32
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    zero = np.zeros((36, 64))
    with torch.no_grad():
        with lora.disable_adapter():
            off = layer(x)
        found = layer(x, adapter_names=list(names))
        with in_rows(Rows(names, frozenset({id(layer)}))):
            assert torch.equal(layer(x), found)
    expected = right(layer, names, x, lambda row, held: ref.linear(row, zero, None, held))
    # bfloat16: the sum is rounded to 8 bits, which stay in the difference.
    assert_same(found.float() - off.float(), expected, DIFFERENCE if dtype is torch.float32 else 0.02)
    silent = [i for i, name in enumerate(names) if name not in layer.r]
    assert torch.equal(found[silent], off[silent])


def calls_of(function: Callable[[], object], name: str) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    return sum(event.name == name for event in seen.events())


def test_adapters_with_as_many_rows_are_multiplied_with_in_one() -> None:
    lora, layer = adapt(nn.Linear(7, 5), adapters=2, r=3)
    lora.eval()
    x = torch.randn(6, 7)
    assert calls_of(lambda: layer(x, adapter_names=list(NAMES)), "aten::bmm") == 2
    assert calls_of(lambda: layer(x, adapter_names=list(TOGETHER)), "aten::bmm") == 0
    layer.lora_A["a0"].register_forward_hook(lambda *_: None)  # who listens is called
    assert calls_of(lambda: layer(x, adapter_names=list(NAMES)), "aten::bmm") == 0


@pytest.mark.parametrize("config", [{}, {"r": 3}], ids=["two ranks", "one rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_reach_each_adapter_from_its_own_rows_only(dtype: torch.dtype, config: dict[str, Any]) -> None:
    lora, layer = adapt(nn.Linear(7, 5).to(dtype), adapters=2, **config)
    lora.eval()
    x = torch.randn(6, 3, 7, dtype=dtype, requires_grad=True)
    grad = torch.randn(6, 3, 5, dtype=dtype)
    layer(x, adapter_names=list(NAMES)).backward(grad)
    weight = ref.array(layer.base_layer.weight)
    for name in ("a0", "a1"):
        rows = [i for i, own in enumerate(NAMES) if own == name]
        held = [branch_of(layer, name)]
        grad_x, ((grad_A, grad_B),) = ref.linear_gradients(ref.array(x[rows]), weight, held, ref.array(grad[rows]))
        A, B = layer.adapter_tensors(name).values()
        for found, expected in ((x.grad[rows], grad_x), (A.grad, grad_A), (B.grad, grad_B)):
            assert_same(found, expected, DIFFERENCE if dtype is torch.float32 else 1e-12)


def test_an_embedding() -> None:
    _, layer = adapt(nn.Embedding(11, 6), adapters=2)
    ids = torch.arange(30).view(6, 5) % 11
    found = layer(ids, adapter_names=list(NAMES))
    table = ref.array(layer.base_layer.weight).T
    assert_same(found, right(layer, NAMES, ids, lambda row, held: ref.embedding(row, table, held)))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution(groups: int) -> None:
    _, layer = adapt(nn.Conv1d(4, 6, 3, padding=1, groups=groups), adapters=2)
    x = torch.randn(6, 4, 9)
    base = layer.base_layer
    geometry: Any = {"stride": [1], "padding": [1], "dilation": [1], "groups": groups}
    weight, bias = ref.array(base.weight), ref.array(base.bias)
    expected = right(layer, NAMES, x, lambda row, held: ref.convolution(row[None], weight, bias, held, **geometry)[0])
    assert_same(layer(x, adapter_names=list(NAMES)), expected)


@pytest.mark.parametrize("config", [{}, {"r": 3}], ids=["two ranks", "one rank"])
def test_a_broken_adapter_spoils_its_own_rows_only(config: dict[str, Any]) -> None:
    _, layer = adapt(nn.Linear(7, 5), adapters=2, **config)
    with torch.no_grad():
        layer.lora_A["a1"].weight.fill_(float("nan"))
    found = layer(torch.randn(6, 7), adapter_names=list(NAMES))
    assert found.isnan().any(dim=1).tolist() == [name == "a1" for name in NAMES]


# -- which inputs are whose ----------------------------------------------------------------------------------


def inside(layer: nn.Module, names: Any, **known: Any) -> Any:
    return in_rows(Rows(names, frozenset({id(layer)}), **known))


def test_beams_and_words_laid_end_to_end_follow_their_row() -> None:
    _, layer = adapt(nn.Linear(7, 5), adapters=2)
    x = torch.randn(6, 4, 7)
    expected = layer(x, adapter_names=list(NAMES))
    with inside(layer, NAMES, lengths={4}):
        assert torch.equal(layer(x.flatten(0, 1)), expected.flatten(0, 1))
    with inside(layer, NAMES):
        layer(x)  # from which the number of words is known
        assert torch.equal(layer(x.flatten(0, 1)), expected.flatten(0, 1))
    with inside(layer, ("a1", "a0"), copies=frozenset({1, 3}), lengths={4}):
        rows = [name for name in ("a1", "a0") for _ in range(3)]
        assert torch.equal(layer(x), layer(x, adapter_names=rows))
        assert torch.equal(layer(x.flatten(0, 1)), layer(x, adapter_names=rows).flatten(0, 1))


@pytest.mark.parametrize("shape", [(1, 6, 7), (5, 7), (4, 6, 7), (12, 7), (7,)], ids=str)
def test_inputs_that_do_not_tell_their_row_are_refused(shape: tuple[int, ...]) -> None:
    """A table of positions, some of the words, words first, twice the rows, a single vector."""
    _, layer = adapt(nn.Linear(7, 5), adapters=2)
    with inside(layer, NAMES, lengths={4}, path_of=lambda _: "block.proj"):
        with pytest.raises(AdapterError, match=r"block\.proj: expected inputs for each of the 6 rows.*set_adapter"):
            layer(torch.randn(shape))
        assert layer(torch.randn(0, 7)).shape == (0, 5)  # an expert that no word goes to
    with inside(layer, ["a1"] * 6):  # nothing to tell apart
        assert layer(torch.randn(shape)).shape == (*shape[:-1], 5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a0", "found 'a0'; put it into a list"),
        (["a0", 1], "expected a list with a name for each row"),
        (torch.zeros(2), "expected a list with a name for each row"),
        (["a0"], r"each input of this LinearAdapter.*\(2, 7\), found 1 names"),
    ],
)
def test_what_is_no_name_for_each_row(names: Any, message: str) -> None:
    _, layer = adapt(nn.Linear(7, 5), adapters=2)
    with pytest.raises(AdapterError, match=message):
        layer(torch.randn(2, 7), adapter_names=names)
    layer.merge_(["a0"])
    with pytest.raises(AdapterError, match=r"found \['a0'\] merged into it; call unmerge_adapter"):
        layer(torch.randn(2, 7), adapter_names=["a0", "a1"])


def test_the_choice_is_for_its_layers_and_ends_with_its_block() -> None:
    _, layer = adapt(nn.Linear(7, 5), adapters=2)
    rows = Rows(["a0", "a1"], frozenset({id(layer)}))
    with in_rows(rows):
        assert rows_of(layer) is rows
        assert rows_of(nn.Linear(1, 1)) is None
        with in_rows(None):
            assert rows_of(layer) is None
        assert rows_of(layer) is rows
    assert rows_of(layer) is None
