"""Whose ``weight`` is the matrix, and whose isn't: instances that others changed, subclasses of PyTorch's, of
transformers' and of bitsandbytes'."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from bitsandbytes import nn as bnb
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import Llama4TextConfig, PhimoeConfig
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.whisper.modeling_whisper import WhisperPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from qlora_kit.codecs import codec_for, find_codec, plain_weight, registered_codec


def reason(module: nn.Module) -> str | None:
    codec = registered_codec(module)
    assert codec is not None
    return codec.reason_against(module)


class Codes(Tensor):
    """A tensor that stands for others than it stores, as torchao's do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Marked(nn.Parameter):
    """A parameter with a name of its own, and nothing else."""


class Written(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class FakeQuantized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * 127).round() / 127, self.bias)


class WithDropout(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


class Scaled(nn.Linear):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=self.padding)


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 0)))[..., : x.shape[-1]]


class Sub4bit(bnb.Linear4bit):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Doubled4bit(bnb.Linear4bit):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Sub8bit(bnb.Linear8bitLt):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Doubled8bit(bnb.Linear8bitLt):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def router() -> nn.Module:
    return Llama4Router(Llama4TextConfig(hidden_size=16, num_local_experts=4, num_experts_per_tok=1))


def phi_router() -> nn.Module:
    return PhimoeTopKRouter(PhimoeConfig(hidden_size=16, num_local_experts=4))


def holding(weight: Tensor, module: nn.Module | None = None) -> nn.Module:
    module = module or nn.Linear(4, 4)
    module._parameters["weight"] = weight
    return module


def with_buffer(name: str) -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_buffer(name, torch.ones(1))
    return module


def hooked() -> nn.Module:
    return add_hook_to_module(nn.Linear(4, 4), ModelHook())


def as_fsdp_leaves_it() -> nn.Module:
    module: Any = nn.Linear(4, 4)
    views = {name: parameter.detach() for name, parameter in module._parameters.items()}
    module._parameters.clear()
    vars(module).update(views)
    return module


def patched(module: nn.Module) -> nn.Module:
    module.forward = partial(type(module).forward, module)  # type: ignore[method-assign]
    return module


HELD: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "meta": lambda: nn.Linear(4, 4, device="meta"),
    "bfloat16": lambda: nn.Linear(4, 4, dtype=torch.bfloat16),
    "float64": lambda: nn.Linear(4, 4, dtype=torch.float64),
    "no bias": lambda: Written(4, 4, bias=False),
    "a parameter's subclass": lambda: holding(Marked(torch.zeros(4, 4))),
    "accelerate's hook": hooked,
    "FSDP's views": as_fsdp_leaves_it,
    "a patched instance": lambda: patched(Written(4, 4)),
    "other buffers": lambda: with_buffer("steps"),
    "parametrization taken off": lambda: remove_parametrizations(
        parametrizations.weight_norm(nn.Linear(4, 4)), "weight"
    ),
    "pruning made permanent": lambda: prune.remove(prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), "weight"),
    "a parametrized bias": lambda: parametrizations.orthogonal(holding_bias_matrix(), "bias"),
    "Falcon": lambda: FalconLinear(4, 4),
    "Falcon on meta": lambda: FalconLinear(4, 4).to("meta"),
    "Falcon in bfloat16": lambda: FalconLinear(4, 4, bias=False).bfloat16(),
    "BART's words": lambda: BartScaledWordEmbedding(9, 4, 1, embed_scale=2.0),
    "Gemma's words": lambda: Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=2.0),
    "Gemma's words on meta": lambda: Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=2.0).to("meta"),
    "bitsandbytes' embedding": lambda: bnb.Embedding(8, 8),
    "LinearNF4": lambda: bnb.LinearNF4(64, 32).to("cpu"),
    "4 bits, a subclass": lambda: Sub4bit(64, 32).to("cpu"),
    "int8, a subclass": lambda: Sub8bit(64, 32, has_fp16_weights=False).to("cpu"),
    "a grouped convolution": lambda: nn.Conv2d(4, 4, 3, groups=4),
}


def holding_bias_matrix() -> nn.Module:
    module = nn.Linear(4, 4)
    module.bias = nn.Parameter(torch.eye(4))
    return module


def on_meta_router() -> nn.Module:
    return router().to("meta")


NOT_HELD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "computed by parametrizations"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv1d(4, 4, 3)), "computed by parametrizations"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), "computed by parametrizations"),
    "an embedding's": (lambda: parametrizations.weight_norm(nn.Embedding(4, 4)), "computed by parametrizations"),
    "old spectral_norm": (lambda: old_spectral_norm(nn.Linear(4, 4)), "computed from weight_orig"),
    "pruning": (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "computed from weight_orig"),
    "pruned Conv1D": (lambda: prune.l1_unstructured(Conv1D(4, 4), "weight", 0.5), "computed from weight_orig"),
    "int8": (lambda: holding(nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), False)), "stored in torch.int8"),
    "float8": (lambda: holding(nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), False)), "torch.float8_e4m3fn"),
    "a tensor of another class": (
        lambda: holding(torch.zeros(4, 4).as_subclass(Codes)),
        "is a test_plain_weight.Codes",
    ),
    "an uninitialized one": (lambda: nn.LazyLinear(4), "UninitializedParameter"),
    "none": (lambda: holding(None), "no tensor"),  # type: ignore[arg-type]
    **{
        name: (partial(with_buffer, name), f"beside {name}")
        for name in ("weight_scale", "weight_scale_inv", "scales", "input_scale", "weight_zero_point")
    },
    "FP8Linear": (lambda: FP8Linear(64, 64, block_size=(32, 32)), "torch.float8_e4m3fn"),
    "Llama 4's router": (router, "returns a tuple"),
    "its skeleton": (on_meta_router, "returns a tuple"),
    "Phi-MoE's router": (phi_router, "forward isn't that of"),
    "fake quantization": (lambda: FakeQuantized(4, 4), "something else"),
    "children": (lambda: WithDropout(4, 4), "modules of its own, dropout"),
    "standardized weights": (lambda: Standardized(4, 4, 3, padding=1), "something else"),
    "another padding": (lambda: Causal(4, 4, 3), "something else"),
    "BART's positions": (lambda: BartLearnedPositionalEmbedding(9, 4), "something else"),
    "Whisper's positions": (lambda: WhisperPositionalEmbedding(9, 4), "something else"),
    "Marian's positions": (lambda: MarianSinusoidalPositionalEmbedding(9, 4), "forward isn't that of"),
    "StableEmbedding": (lambda: bnb.StableEmbedding(8, 8), "modules of its own, norm"),
    "Embedding4bit": (lambda: bnb.Embedding4bit(16, 64).to("cpu"), "Params4bit"),
    "4 bits, twice": (lambda: Doubled4bit(64, 32).to("cpu"), "forward isn't that of bitsandbytes"),
    "int8, twice": (
        lambda: Doubled8bit(64, 32, has_fp16_weights=False),
        "forward isn't that of bitsandbytes",
    ),
    "4 bits under weight_norm": (lambda: fake_parametrized(bnb.Linear4bit(64, 32)), "computed by parametrizations"),
}


def fake_parametrized(module: nn.Module) -> nn.Module:
    del module._parameters["weight"]
    module.parametrizations = nn.ModuleDict({"weight": nn.Identity()})
    return module


@pytest.mark.parametrize("name", HELD)
def test_its_weight_is_the_matrix(name: str) -> None:
    module = HELD[name]()
    assert reason(module) is None
    assert find_codec(module) is registered_codec(module)


@pytest.mark.parametrize("name", NOT_HELD)
def test_its_weight_is_not(name: str) -> None:
    make, message = NOT_HELD[name]
    module = make()
    assert find_codec(module) is None
    with pytest.raises(TypeError, match=rf"^a\.path: expected a weight .*\(.*{message}.*\)"):
        codec_for(module, "a.path")


def test_old_weight_norm() -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        module = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    assert "computed from weight_g and weight_v" in str(reason(module))
    torch.nn.utils.remove_weight_norm(module)
    assert reason(module) is None


def test_settings_of_an_instance_count() -> None:
    first, second = Scaled(4, 4), Scaled(4, 4)
    second.factor = 2.0
    assert reason(first) is None
    assert reason(second) is not None
    assert reason(first) is None


def test_trying_touches_nothing() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            torch.rand(1) if self.training else None
            return super().forward(x)

    module = Counting()
    weight, state = module.weight, torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert reason(module) is None
    assert module.calls == 0
    assert module.weight is weight
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_is_tried_once() -> None:
    class Counted(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x)

    for size in (4, 4, 4):
        assert reason(Counted(size, size)) is None
    assert Counted.calls == 1


def test_pytorchs_own_kinds_of_tensors_are_known() -> None:
    from torch._subclasses import FakeTensor, FakeTensorMode
    from torch.distributed.tensor import DTensor

    assert plain_weight._is_plain(DTensor)
    assert plain_weight._is_plain(FakeTensor)
    with FakeTensorMode():
        module = nn.Linear(4, 4)
    assert type(module.weight) is not nn.Parameter
    assert reason(module) is None


def test_a_shape_of_any_size_costs_nothing() -> None:
    """A layer of 10^12 entries, of which there is no memory."""
    assert reason(FalconLinear(1_000_000, 1_000_000, bias=False, device="meta")) is None
    assert all(len(str(key)) < 1000 for key in plain_weight._tried), "no tensors are kept"
