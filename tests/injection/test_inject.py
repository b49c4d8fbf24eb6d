"""plan -> swap -> report: what is shown before, what is changed, and that a failure changes nothing."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_kit import (
    AdapterError,
    AdapterLayer,
    Codec,
    LoraConfig,
    LoraModel,
    UnsupportedModuleError,
    apply_lora,
    make_plan,
    register_codec,
    register_initializer,
    register_layer,
)
from qlora_kit.codecs.registry import _registry as codecs
from qlora_kit.initializers import start_for
from qlora_kit.injection.engine import Request, Start, inject_
from qlora_kit.layers import LinearAdapter
from qlora_kit.layers.registry import _registry as families


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Linear(5, 3, dtype=torch.bfloat16))


def test_a_plan_says_what_will_be_done_and_changes_nothing() -> None:
    model = mlp()
    before = {path: module for path, module in model.named_modules()}
    plan = make_plan(model, LoraConfig(r=2, lora_alpha=6, target_modules=["0", "3"], rank_pattern={"3": 1}))
    first, second = plan.entries
    assert (first.path, first.module_type, first.codec, first.family) == ("0", "Linear", "dense", "linear")
    assert (first.rank, first.alpha, first.trainable_parameters) == (2, 6, 2 * (6 + 8))
    assert (first.adapter_bytes, first.base_bytes) == (2 * (6 + 8) * 4, 6 * 8 * 4)
    # A half-precision base gets float32 factors.
    assert (second.rank, second.adapter_bytes, second.base_bytes) == (1, (5 + 3) * 4, 15 * 2)
    assert "2 modules, 36 trainable parameters" in str(plan)
    assert plan.to_dict()["entries"][0]["path"] == "0"
    assert {path: module for path, module in model.named_modules()} == before


def test_the_plan_counts_what_the_model_then_trains() -> None:
    model = mlp()
    config = LoraConfig(r=2, target_modules="all-linear")
    plan = make_plan(model, config)
    lora = apply_lora(model, config)
    assert lora.get_nb_trainable_parameters()[0] == plan.trainable_parameters
    assert lora.plan == plan


def test_undo_gives_the_original_modules_hooks_and_buffers() -> None:
    model = mlp()
    first = model[0]
    first.register_buffer("extra", torch.ones(2))
    handle = first.register_forward_hook(lambda *_: None)
    config = LoraConfig(target_modules=["0", "2"], modules_to_save=["3"])
    injection = inject_(model, make_plan(model, config), config, "a", start_for)
    assert isinstance(model[0], AdapterLayer)
    injection.undo()
    assert model[0] is first
    assert "extra" in dict(model[0].named_buffers())
    assert handle.id in model[0]._forward_hooks
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())
    assert list(model.state_dict()) == ["0.weight", "0.bias", "0.extra", "2.weight", "2.bias", "3.weight", "3.bias"]


@pytest.fixture
def failing_start():
    """An initializer that fails on the last layer it is asked for."""

    @register_initializer("fails-at-2")
    def start(request: Request) -> Start:
        if request.path == "2":
            raise RuntimeError("no start for 2")
        out_features, in_features = request.shape
        return Start(torch.ones(request.rank, in_features), torch.ones(out_features, request.rank))

    return "fails-at-2"


def test_a_failing_start_leaves_the_model_as_it_was(failing_start: str) -> None:
    model = mlp()
    modules, flags = list(model.children()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="no start for 2"):
        apply_lora(model, LoraConfig(target_modules=["0", "2"], init_lora_weights=failing_start))
    assert all(now is then for now, then in zip(model.children(), modules, strict=True))
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_failing_second_adapter_leaves_the_first_alone(failing_start: str) -> None:
    lora = apply_lora(mlp(), LoraConfig(target_modules=["0"], init_lora_weights=False), "first")
    x = torch.randn(4, 6)
    model = lora.model
    model[3].to(torch.float32)
    y = lora(x)
    with pytest.raises(RuntimeError):
        lora.add_adapter("second", LoraConfig(target_modules=["0", "2"], init_lora_weights=failing_start))
    assert list(lora.peft_config) == ["first"]
    assert lora.model[0].adapter_names() == ["first"]
    assert torch.equal(lora(x), y)
    lora.add_adapter("second", LoraConfig(target_modules=["0", "2"]))


def test_a_module_that_is_trained_whole_is_not_adapted_too() -> None:
    """The adapter's layer would take the place of the trained copy."""
    lora = apply_lora(mlp(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]), "a")
    before = dict(lora.named_modules())
    with pytest.raises(AdapterError, match=r"2: expected a module that is free to be adapted by 'b', found .*\['a'\]"):
        lora.add_adapter("b", LoraConfig(r=2, target_modules=["0", "2"]))
    assert dict(lora.named_modules()) == before
    assert list(lora.peft_config) == ["a"]


def test_a_failing_saved_module_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    modules = list(model.children())
    monkeypatch.setattr("qlora_kit.injection.engine.ModulesToSave.add_adapter", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply_lora(model, LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    assert all(now is then for now, then in zip(model.children(), modules, strict=True))


class Halved(nn.Module):
    """A module of a user's own: y = (2 W') x, keeping W' = W / 2."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.halved = nn.Parameter(weight / 2, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (2 * self.halved).T


@pytest.fixture
def registered():
    kept = dict(codecs), dict(families)

    @register_codec(Halved)
    class HalvedCodec(Codec):
        name = "halved"

        def shape(self, module):
            return tuple(module.halved.shape)

        def read(self, module):
            return 2 * module.halved.detach().float()

        def write_(self, module, weight):
            module.halved.copy_(weight / 2)

        def nbytes(self, module):
            return module.halved.nbytes

        def compute_dtype(self, module):
            return module.halved.dtype

        def device(self, module):
            return module.halved.device

        def snapshot(self, module):
            return module.halved.detach().clone()

        @torch.no_grad()
        def restore_(self, module, snapshot):
            module.halved.copy_(snapshot)

    register_layer(Halved)(LinearAdapter)
    yield
    for registry, before in zip((codecs, families), kept, strict=True):
        registry.clear()
        registry.update(before)


def test_a_users_codec_and_family_serve_every_path(registered: None) -> None:
    weight = torch.randn(5, 6)
    model = nn.Sequential(Halved(weight))
    x = torch.randn(3, 6)
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    assert lora.plan.entries[0].codec == "halved"
    y = lora(x)
    delta = lora.model[0].delta("default")
    torch.testing.assert_close(y, x @ (weight + delta).T)
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), y)
    lora.unmerge_adapter()
    assert torch.equal(lora.model[0].base_layer.halved, weight / 2)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(2 * merged[0].halved, weight + delta)


def test_without_a_registration_the_type_is_refused() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"0: .*Halved.*register_codec"):
        make_plan(nn.Sequential(Halved(torch.ones(2, 2))), LoraConfig(target_modules=["0"]))


def test_the_most_specific_registration_wins(registered: None) -> None:
    class Special(nn.Linear):
        pass

    class SpecialAdapter(LinearAdapter):
        family = "special"

    register_layer(Special)(SpecialAdapter)
    plan = make_plan(nn.Sequential(Special(2, 2), nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0", "1"]))
    assert [entry.family for entry in plan.entries] == ["special", "linear"]


def test_meta_models_are_planned_and_injected_without_memory() -> None:
    config = LlamaConfig(vocab_size=320, hidden_size=4096, intermediate_size=11008, num_hidden_layers=4)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    began = time.process_time()
    lora = LoraModel(model, LoraConfig(r=16, target_modules="all-linear"))
    assert len(lora.plan.entries) == 28
    assert all(parameter.is_meta for parameter in lora.parameters())
    assert time.process_time() - began < 60  # a hang, not a speed: speed is measured in benchmarks/


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled: bool) -> None:
    """Injection pauses it while layers are built."""

    def start(request: Request) -> Start:
        assert not gc.isenabled()
        raise ZeroDivisionError

    model, config = nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ZeroDivisionError):
            inject_(model, make_plan(model, config), config, "default", start)
        assert gc.isenabled() == enabled
        apply_lora(model, config)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
