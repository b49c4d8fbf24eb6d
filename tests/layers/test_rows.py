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

from qlora_kit import AdapterError, AdapterLayer, LoraConfig, LoraModel, apply_lora, quantize_
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


# -- trained copies, and weights that are read ---------------------------------------------------------------


class Head(nn.Module):
    """Takes its input by name, with a mask and settings, and gives a tuple with a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 3)

    def forward(self, *, states: Tensor, mask: Tensor, scale: Tensor, **others: Any) -> Any:
        logits = self.out(states * mask[..., None]) * scale
        return logits, {"sum": logits.sum(1), "words": states.shape[1]}


class Net(nn.Module):
    """(rows, words) ids; the head is called with whatever else is given."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), Head()

    def forward(self, ids: Tensor, **others: Any) -> Any:
        states = torch.tanh(self.body(self.table(ids)))
        scale = torch.tensor(2.0)
        return self.head(states=states, mask=(ids > 2).to(states.dtype), scale=scale, **others)


IDS = torch.arange(20).view(4, 5) % 11


def saved(dtype: torch.dtype = torch.float32) -> LoraModel:
    """Adapter a has copies of head and table, b of the head, and c branches on body and table."""
    torch.manual_seed(0)
    lora = apply_lora(Net().to(dtype), LoraConfig(r=2, target_modules=["body", "table"], init_lora_weights=False), "c")
    lora.add_adapter("a", LoraConfig(r=2, target_modules=["body"], modules_to_save=["head", "table"]))
    lora.add_adapter("b", LoraConfig(r=3, target_modules=["body"], modules_to_save=["head"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "modules_to_save" in name or "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return lora.eval()


def alone(lora: LoraModel, name: str) -> Any:
    if name == "__base__":
        with lora.disable_adapter():
            return lora(IDS)
    lora.set_adapter(name)
    return lora(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", ["a b c __base__", "b a b a", "c c b c", "c __base__ c c"])
def test_rows_go_through_their_own_copies(names: str, dtype: torch.dtype) -> None:
    lora, own = saved(dtype), names.split()
    expected = [alone(lora, name) for name in own]
    logits, others = lora(IDS, adapter_names=own)
    assert logits.dtype == dtype
    assert others["words"] == 5
    for row, (right_logits, right_others) in enumerate(expected):
        # Products of fewer rows are summed in another order.
        near = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.05}
        torch.testing.assert_close(logits[row], right_logits[row], **near)
        torch.testing.assert_close(others["sum"][row], right_others["sum"][row], **near)


def test_a_copy_called_on_its_own() -> None:
    lora = saved()
    head = lora.saved_modules()["table"]
    found = head(IDS, adapter_names=["a", "b", "__base__", "a"])
    for row, name in enumerate(["a", None, None, "a"]):
        table = head.modules_to_save[name] if name else head.original_module.base_layer
        assert torch.equal(found[row], table.weight[IDS[row]])


def test_copies_that_cannot_be_called_with_some_of_the_rows_are_refused() -> None:
    lora = saved()
    with pytest.raises(AdapterError, match=r"head: expected a module that can be called with some.*found a Net among"):
        lora(IDS, adapter_names=["a", "b", "a", "b"], cache=Net())
    names = ["a", "b", "a", "b"]
    with in_rows(Rows(names, frozenset(map(id, lora.adapted.parts())))), pytest.raises(AdapterError, match="no tensor"):
        lora.model.head()
    for name in ("a", "b"):
        lora.model.head.modules_to_save[name].forward = _sum
    with pytest.raises(AdapterError, match=r"results of shapes \[\(\), \(\)\]"):
        lora(IDS, adapter_names=["a", "b", "a", "b"])


def _sum(*, states: Tensor, **others: Any) -> Tensor:
    return states.sum()


class Reads(nn.Module):
    """Computes with the weights of its children, which it doesn't call."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.kept = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, which: str) -> Tensor:
        weight = getattr(self, which).weight
        assert (weight.shape, weight.dtype) == ((4, 4), torch.float32)  # which are the same for all rows
        return x @ weight.T


def test_a_weight_that_is_read_past_its_module() -> None:
    lora = apply_lora(
        Reads(), LoraConfig(r=2, target_modules=["proj"], modules_to_save=["kept"], init_lora_weights=False), "a"
    )
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["proj"], modules_to_save=["kept"], init_lora_weights=False))
    with torch.no_grad():
        lora.model.kept.modules_to_save["b"].weight.mul_(2)
    x = torch.randn(2, 4)
    lora.eval()
    for which in ("proj", "kept"):
        for names in (["b", "b"], ["__base__", "__base__"]):
            assert torch.equal(lora(x, which, adapter_names=names), _with(lora, names[0], x, which))
        with pytest.raises(AdapterError, match=f"{which}: its weight is read past the module.*set_adapter"):
            lora(x, which, adapter_names=["a", "b"])


def _with(lora: LoraModel, name: str, *inputs: Any) -> Tensor:
    before = lora.active_adapters
    if name == "__base__":
        with lora.disable_adapter():
            return lora(*inputs)
    lora.set_adapter(name)
    result = lora(*inputs)
    lora.set_adapter(before)
    return result
