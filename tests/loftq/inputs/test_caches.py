"""No cache is made, grown or read while text goes through a model, whatever the model and wherever it is told to.

The reference is a copy in float64, called once per batch with ``use_cache=False``, whose earlier modules' weights are
replaced: it never computes anything twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import WIDTH, Batches, captured, moments, reference, seeded, targets, tiny_llama, tokens, vectors
from torch import Tensor, nn
from transformers import DynamicCache
from zoo import ZOO

from loftq import collect_statistics
from loftq.inputs.caches import cacheless, configs_of
from loftq.inputs.groups import stages
from loftq.inputs.text import batches_for
from qlora_kit import ConfigError

# Two layers of float32 arithmetic against float64, relative to the largest entry.
ROUNDING = 1e-4
# Images and words, words and words, experts, and states instead of keys; the first four say use_cache in a nested
# configuration, or take it among others' keywords.
MEMBERS = (
    "llava",
    "qwen2-vl",
    "gemma3",
    "granite-moe",
    "mamba",
    "recurrent-gemma",
    "t5",
    "switch",
    "rwkv",
    "llama-tied",
)
# Kernels that know no float64.
SINGLE = ("granite-moe",)
# What a module is replaced with moves later moments by more than this, relative to the largest entry.
MOVED = 1e-2


def batches_of(name: str) -> Batches:
    """Two batches of two rows of the member, without labels; no two rows are alike."""
    batch = {key: value for key, value in ZOO[name].batch().items() if key != "labels"}
    if name in ("t5", "switch"):
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)[:, :5]
    other = {
        key: value.flip(0) if key == "pixel_values" and value.dim() == 4 else value for key, value in batch.items()
    }
    words = batch["input_ids"]
    other["input_ids"] = torch.where(words > 15, 271 - words, words)
    return [batch, other]


def in_double(batches: Batches) -> Batches:
    """As the reference is called."""
    return [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]


def switched_off(model: nn.Module) -> nn.Module:
    """``model`` with each module's own configuration, and those in it, saying that there is no cache."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for each in (config, *(vars(config).values() if config is not None else ())):
            if getattr(each, "use_cache", None):
                each.use_cache = False
    return model


def linears(model: nn.Module) -> list[str]:
    """Those that are called themselves, each in one place."""
    own = [path for path in targets(model) if isinstance(model.get_submodule(path), nn.Linear)]
    return [path for path in own if not path.endswith(("dt_proj", "out_proj")) or "mixer" not in path]


def assert_near(found: Tensor, expected: np.ndarray, path: str) -> None:
    atol = ROUNDING * np.abs(expected).max()
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=atol, err_msg=path)


def settings(model: nn.Module) -> list[Any]:
    return [(dict(vars(config)), vars(config).get("use_cache")) for config in configs_of(model)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_moments_are_those_of_a_plain_pass_without_a_cache(name: str) -> None:
    model, batches = ZOO[name].make(), batches_of(name)
    single = name in SINGLE
    original = switched_off(copy.deepcopy(model) if single else copy.deepcopy(model).double())
    plain = batches if single else in_double(batches)
    paths, before = linears(model), settings(model)
    expected = reference(original, plain, paths)
    with torch.no_grad():
        once = collect_statistics(model, batches, paths)
        assert once.keys() == expected.keys()
        for path, value in expected.items():
            assert_near(once[path], value, path)
        current, moved = copy.deepcopy(original), 0.0
        for number, stage in enumerate(stages(model, batches, paths, sequential=True)):
            inputs = captured(current, plain, stage.paths)
            for path, seen in stage.seen().items():
                value = moments(inputs[path], plain)
                assert_near(seen.statistics, value, path)
                moved = max(moved, float(np.abs(value - expected[path]).max() / np.abs(expected[path]).max()))
            if stage.seen() and next(iter(stage.seen().values())).cross is None:
                continue  # called more than once: those come last
            for path in stage.paths:
                module = current.get_submodule(path)
                draw = torch.Generator().manual_seed(number)
                change = 0.2 * model.get_submodule(path).weight.std() * torch.randn(module.weight.shape, generator=draw)
                stage.replaced[path] = change
                module.weight = nn.Parameter(module.weight + change.to(module.weight.dtype))
    assert moved > MOVED
    assert settings(model) == before


# -- models that make a cache whatever they are told ---------------------------------------------------------------


class Attending(nn.Module):
    """Attends to all rows that its cache has seen, and adds its own."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.key, self.value = number, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: Any, use_cache: bool) -> tuple[Tensor, Any]:
        keys, values = self.kept(cache, self.key(x), self.value(x))
        assert use_cache
        return x + (x @ keys.T).softmax(-1) @ values, cache

    def kept(self, cache: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class ByLibrary(Attending):
    def kept(self, cache: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = cache.update(keys[None, None], values[None, None], self.number)
        return keys[0, 0], values[0, 0]


class ByList(Attending):
    """All layers attend to what the earlier ones kept as well."""

    def kept(self, cache: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        cache.append((keys, values))
        return torch.cat([one for one, _ in cache]), torch.cat([other for _, other in cache])


class ByName(Attending):
    """Every layer but the first takes its keys from there."""

    def kept(self, cache: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys = cache["keys"] = torch.cat([cache["keys"], keys]) if "keys" in cache else keys
        return keys, values.repeat(len(keys) // len(values), 1)


class ByObject(ByList):
    def kept(self, cache: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        cache.calls += 1
        return super().kept(cache.rows, keys + 0.1 * cache.calls, values)


class InPlace(Attending):
    """Into tensors that were made beforehand."""

    def kept(self, cache: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        cache[0][self.number].add_(keys)
        cache[1][self.number].add_(values)
        return cache[0].flatten(0, 1), cache[1].flatten(0, 1)


CACHES: dict[str, tuple[type[Attending], Callable[[Tensor], Any]]] = {
    "transformers' cache": (ByLibrary, lambda x: DynamicCache()),
    "a list": (ByList, lambda x: []),
    "a dictionary": (ByName, lambda x: {}),
    "an object": (ByObject, lambda x: SimpleNamespace(rows=[], calls=0)),
    "tensors": (InPlace, lambda x: (x.new_zeros(3, *x.shape), x.new_zeros(3, *x.shape))),
}


class Remembering(nn.Module):
    """Makes its cache in every forward, asks no one, and gives it to all layers."""

    def __init__(self, layer: type[Attending], make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layers, self.make = nn.ModuleList(layer(number) for number in range(3)), make

    def forward(self, x: Tensor) -> Tensor:
        cache = self.make(x)
        for layer in self.layers:
            x, cache = layer(x, cache, use_cache=True)
        return x


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("sequential", [False, True])
def test_a_cache_that_the_forward_makes_is_filled_once_by_each_layer(kind: str, sequential: bool) -> None:
    model, batches = seeded(lambda: Remembering(*CACHES[kind])), vectors()
    double = copy.deepcopy(model).double()
    expected = reference(double, [{"x": batch["x"].double()} for batch in batches], targets(model))
    found = {
        path: seen.statistics
        for stage in stages(model, batches, targets(model), sequential=sequential)
        for path, seen in stage.seen().items()
    }
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert_near(found[path], value, path)


# -- what is said where --------------------------------------------------------------------------------------------


@pytest.fixture
def nested() -> nn.Module:
    """A model without a configuration of its own worth the name, around one with."""
    model = nn.Module()
    model.inner = tiny_llama()
    model.config = SimpleNamespace(text_config=model.inner.config, thinking=SimpleNamespace(use_cache=True))
    model.inner.config.own_config = SimpleNamespace(use_cache=True, inner=model.inner.config)
    return model


def test_every_configuration_says_no_inside_and_what_it_did_afterwards(nested: nn.Module) -> None:
    own = nested.inner.config
    with cacheless(nested):
        assert own.use_cache is False
        assert own.own_config.use_cache is False
    assert own.use_cache is True
    assert own.own_config.use_cache is True
    assert own.own_config.inner is own


def test_a_configuration_is_as_it_was_after_an_error() -> None:
    model = tiny_llama()
    before = settings(model)
    seen: list[bool] = []

    def failing(*_: object) -> None:
        seen.append(model.config.use_cache)
        if len(seen) > 2:
            raise ValueError("the model's own error")

    model.get_submodule("model.norm").register_forward_pre_hook(failing)
    for collect in (
        lambda: collect_statistics(model, tokens(5), targets(model)),
        lambda: [stage.seen() for stage in stages(model, tokens(5), targets(model), sequential=True)],
    ):
        seen.clear()
        with pytest.raises(ValueError, match="the model's own error"):
            collect()
        assert settings(model) == before
        assert seen == [False] * 3
    seen.clear()
    with closing(stages(model, tokens(), targets(model))) as walk:
        next(walk).seen()
        assert model.config.use_cache is False
    assert settings(model) == before


class Frozen:
    """A configuration that allows no changes, and one that says so by a property."""

    def __init__(self) -> None:
        vars(self)["use_cache"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)


class Property:
    @property
    def use_cache(self) -> bool:
        return True


def test_a_configuration_of_any_kind() -> None:
    for config, inside in ((Frozen(), False), (Property(), True), (SimpleNamespace(), None)):
        model = nn.Linear(2, 2)
        model.config = config
        before = dict(vars(config))
        with cacheless(model):
            assert getattr(config, "use_cache", None) is inside
        assert vars(config) == before


def test_a_batch_that_brings_a_cache_along() -> None:
    model, [batch] = tiny_llama(), tokens(1)
    with torch.no_grad():
        full = model(**batch).past_key_values
    kept = {key: value for key, value in batch.items() if key != "attention_mask"}
    for key, cache in (("past_key_values", full), ("past_key_values", (1, 2)), ("memory", full)):
        for collect in (
            lambda given: collect_statistics(model, given, targets(model)),
            lambda given: list(stages(model, given, targets(model))),
            lambda given: batches_for(given, model, rows=1, window=4),
        ):
            with pytest.raises(
                ConfigError, match=rf"expected batches without a cache, found a \w+ under '{key}'; pass"
            ):
                collect([{**kept, key: cache}])
    expected = collect_statistics(model, [kept], targets(model))
    asked = {**kept, "use_cache": True, "past_key_values": DynamicCache()}
    for given in (asked, {**kept, "past_key_values": None}):
        found = collect_statistics(model, [given], targets(model))
        assert all(torch.equal(found[path], value) for path, value in expected.items())
    assert asked["past_key_values"].get_seq_length() == 0
    assert asked["use_cache"] is True, "the caller's batch stays as it is"
