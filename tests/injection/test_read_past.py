"""Which modules are read past, by the source of those who read them; and what targets make of it."""

from __future__ import annotations

from functools import cached_property
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from qlora_kit import LoraConfig, TargetError, apply_lora, make_plan, quantize_
from qlora_kit.injection.read_past import ReadPast

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}


def product(x: Tensor, holder: Any, *, scale: float = 1.0) -> Tensor:
    return x @ holder.handed.weight.T * scale


def whole(x: Tensor, module: Any) -> Tensor:
    return F.linear(x, module.by_self.weight)


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.handed = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Reader(nn.Module):
    """Reads weights in all ways that are followed; modules are named after how."""

    def __init__(self) -> None:
        super().__init__()
        names = (
            "plain alias by_name weight_named walrus form form_alias both sliced guarded asked same device inherited "
            "by_self by_method"
        )
        for name in names.split():
            setattr(self, name, nn.Linear(8, 8))
        self.layers = nn.ModuleList(Child() for _ in range(2))
        self.table = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
        self.norm, self.child = nn.LayerNorm(8), Child()

    def forward(self, x: Tensor) -> Tensor:
        alias, (first, second) = self.alias, (x, x)
        weight = self.weight_named.weight
        x = x @ self.plain.weight + alias(x) @ alias.weight + F.linear(first, weight)
        x = x @ getattr(self, "by_name").weight + second @ getattr(self.by_name, "weight")  # noqa: B009
        if (dtype := self.walrus.weight.dtype).is_floating_point:
            x = self.walrus(x.to(dtype))
        x = self.form(x.to(self.form.weight.dtype)) + self.norm(x.to(self.norm.weight.dtype))
        kept = self.form_alias.weight
        x = self.form_alias(x.to(kept.dtype)) + self.both(x) @ self.both.weight[:, :8]
        if isinstance(self.asked.weight, Tensor) and hasattr(self.asked.weight, "quant_state"):
            x = x.to(self.device.weight.device)
        if self.same.weight is self.asked.weight:
            x = self.same(x)
        for number, layer in enumerate(self.layers):
            x = layer(x) * layer.fc.weight.shape[number]
        for one in self.table.values():
            x = F.linear(x, one.weight)
        return whole(self.device(self.asked(product(x, self.child, scale=2.0))), self) + self._of(self.by_method, x)

    def _of(self, module: Any, x: Tensor) -> Tensor:
        return x @ module.weight


class Derived(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self._own()

    def _own(self) -> Tensor:
        return self.inherited.weight.sum()


def found(model: nn.Module) -> dict[str, str]:
    """By path: v(alue), w(ritten), c(alled)."""
    reads = ReadPast(model).reads
    return {
        path: "v" * read.value + "w" * read.written + "c" * read.called or "-" for path, read in sorted(reads.items())
    }


def test_all_ways_of_reading_are_seen() -> None:
    expected = {
        **{"plain": "v", "alias": "vc", "by_name": "v", "weight_named": "v", "walrus": "c", "form": "c", "norm": "c"},
        **{"form_alias": "c", "both": "vc", "layers.0.fc": "c", "layers.1.fc": "c", "table.one": "v", "table.two": "v"},
        **{"child.handed": "v", "by_self": "v", "by_method": "v"},
    }
    assert found(Reader()) == dict(sorted(expected.items()))
    assert found(Derived()) == dict(sorted({**expected, "inherited": "v"}.items()))
    with torch.device("meta"):
        assert found(Reader()) == found(Reader())


def test_what_is_asked_for_its_place_or_read_and_never_called_has_to_be_there() -> None:
    uncalled = {"plain", "by_name", "weight_named", "table.one", "table.two", "child.handed", "by_self", "by_method"}
    assert ReadPast(Reader()).on_the_spot() == sorted({*uncalled, "device"})


class Settled(nn.Module):
    """Code that its settings switch on."""

    def __init__(self, slices: int, quantized: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(slices=slices, to_dict=dict, **({"_is_quantized": True} if quantized else {}))
        self.slices, self.exact = slices, True
        self.dense, self.dt = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.slices > 1 and self.exact:
            x = sum(x @ self.dense.weight[:, : self.slices] for _ in range(self.config.slices))
        else:
            x = self.dense(x)
        return self.dt(x) - self.dt.bias if hasattr(self.config, "_is_quantized") else self.dt.weight @ x


@pytest.mark.parametrize(
    ("slices", "quantized", "expected"),
    [(1, False, {"dt": "v"}), (1, True, {}), (2, False, {"dense": "v", "dt": "v"}), (2, True, {"dense": "v"})],
)
def test_what_settings_switch_off_doesnt_count(slices: int, quantized: bool, expected: dict[str, str]) -> None:
    assert found(Settled(slices, quantized)) == expected


class Training(nn.Module):
    """A state isn't a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.fc.weight if self.training else self.fc(x)


def test_a_state_may_change() -> None:
    assert found(Training()) == found(Training().eval()) == {"fc": "vc"}


class Tells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def get_dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @cached_property
    def kind(self) -> torch.dtype:
        return self.fc.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Tells()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(self.inner.get_dtype()))


def test_a_dtype_that_nobody_asks_for_doesnt_count() -> None:
    assert found(Tells()) == {}
    assert found(Asks()) == {"inner.fc": "c"}


def test_a_forward_on_the_instance_counts() -> None:
    model = Child()
    model.forward = lambda x: x @ model.fc.weight  # type: ignore[method-assign]
    assert found(model) == {}  # not a method of the module: what `model` is there can't be told

    def forward(self: Any, x: Tensor) -> Tensor:
        return x @ self.fc.weight

    model.forward = forward.__get__(model)  # type: ignore[method-assign]
    assert found(model) == {"fc": "v"}


def typed(module: Any, *, strict: bool = True) -> Any:
    if strict and not isinstance(module, nn.Module):
        raise TypeError
    return module


def test_a_function_that_gives_its_argument_back_is_seen_through() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return typed(self.out)(typed(self.qkv)(x) * self.qkv.weight.sum())

        def clip_after_a_step(self) -> None:
            self.out.weight.data.clamp_(-1, 1)

    assert found(Attention()) == {"qkv": "vc"}  # and what clips weights computes nothing


def test_code_without_source_is_no_error() -> None:
    scope: dict[str, Any] = {"nn": nn}
    exec("class Bare(nn.Module):\n    def forward(self, x):\n        return x @ self.fc.weight", scope)
    bare = scope["Bare"]()
    bare.fc = nn.Linear(8, 8)
    assert found(bare) == {}


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4))


def rwkv() -> nn.Module:
    sizes = {
        **SIZES,
        "num_hidden_layers": 2,
        "attention_hidden_size": 32,
        "intermediate_size": 64,
        "context_length": 16,
    }
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes))


ATTENTION = {"attn.out_proj"}
MODELS: dict[str, tuple[Any, set[str]]] = {
    "attention": (lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2), "out": nn.Linear(16, 16)}), ATTENTION),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32), {"self_attn.out_proj"}),
    "mamba": (mamba, {"backbone.layers.0.mixer.dt_proj"}),
    "rwkv": (rwkv, set()),
}


@pytest.mark.parametrize(("build", "aside"), MODELS.values(), ids=MODELS)
def test_all_linear_leaves_out_what_nobody_calls(build: Any, aside: set[str]) -> None:
    model = build()
    assert {p for p in ReadPast(model).left_out() if isinstance(model.get_submodule(p), nn.Linear)} == aside
    planned = {entry.path for entry in make_plan(model, LoraConfig(target_modules="all-linear")).entries}
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears - planned - {"lm_head", "head"} == aside
    for path in aside:
        assert "its weight is read by" in ReadPast(model).left_out()[path]
        assert "nobody calls it" in ReadPast(model).left_out()[path]


def test_a_second_adapter_sees_what_the_first_saw() -> None:
    lora = apply_lora(mamba(), LoraConfig(r=2, target_modules=["dt_proj", "in_proj"]))
    assert ReadPast(lora.model).reads == ReadPast(mamba()).reads
    lora.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    assert not any("second" in layer.r for path, layer in lora.adapter_layers().items() if path.endswith("dt_proj"))


def test_few_bits_that_are_read_are_refused_by_name() -> None:
    attention = nn.MultiheadAttention(64, 2)
    attention.out_proj = quantize_(nn.ModuleDict({"fc": nn.Linear(64, 64)}), 4)["fc"]
    net = nn.ModuleDict({"attn": attention, "out": nn.Linear(64, 64)})
    assert [entry.path for entry in make_plan(net, LoraConfig(target_modules="all-linear")).entries] == ["out"]
    match = r"attn.out_proj: expected a module whose adapter takes part .* read by MultiheadAttention, and nobody calls"
    with pytest.raises(TargetError, match=match):
        apply_lora(net, LoraConfig(target_modules=["out_proj"]))


def test_few_bits_that_are_rescaled_in_place_are_refused_too() -> None:
    model: Any = rwkv()
    block = model.rwkv.blocks[0]
    block.attention = quantize_(block.attention, 4, target_modules=["output"])
    planned = {entry.path for entry in make_plan(model, LoraConfig(target_modules="all-linear")).entries}
    assert "rwkv.blocks.0.attention.output" not in planned
    assert "rwkv.blocks.0.feed_forward.value" in planned
    with pytest.raises(TargetError, match=r"attention\.output: expected a module whose adapter takes part"):
        make_plan(model, LoraConfig(target_modules=["output"]))
