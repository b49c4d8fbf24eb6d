"""The built-in starts' distributions, the registry, and what a wrong start says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from qlora_kit import initializers
from qlora_kit.codecs import codec_for
from qlora_kit.config.lora import INIT_NAMES, LoraConfig
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.initializers import Request, Start, register_initializer, start_for

RANK = 8


def request_for(base: nn.Module, init: bool | str, family: str = "linear", **fields: object) -> Request:
    config = LoraConfig(r=RANK, init_lora_weights=init)
    made = Request(
        path="block.proj",
        base=base,
        codec=codec_for(base),
        rank=RANK,
        scaling=2.0,
        config=config,
        family=family,
    )
    return replace(made, **fields)


MODULES = [
    (nn.Linear(300, 40), "linear", (40, 300)),
    (nn.Embedding(300, 40), "embedding", (40, 300)),
    (nn.Conv2d(12, 40, (5, 5)), "conv", (40, 300)),
    (nn.Conv1d(24, 40, 25, groups=2), "conv", (40, 300)),
]


@pytest.mark.parametrize(("base", "family", "shape"), MODULES)
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_default_starts_leave_the_function_as_it_is(
    base: nn.Module, family: str, shape: tuple[int, int], init: bool | str
) -> None:
    start = start_for(request_for(base, init, family))
    assert (start.B.shape[0], start.A.shape[1]) == shape
    assert torch.count_nonzero(start.B @ start.A) == 0
    drawn = start.B if family == "embedding" else start.A
    assert torch.count_nonzero(drawn) == drawn.numel()
    assert start.base is None


@pytest.mark.parametrize(("base", "family", "shape"), MODULES)
def test_the_distributions_are_peft_s(base: nn.Module, family: str, shape: tuple[int, int]) -> None:
    """Spread of 2,400 draws (320 for an embedding's B): 10 % is over 4 standard errors of either."""
    start = start_for(request_for(base, True, family))
    if family == "embedding":
        assert start.B.std().item() == pytest.approx(1.0, rel=0.2)
    else:
        bound = 1 / math.sqrt(shape[1])
        assert start.A.abs().max() <= bound
        assert start.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        gaussian = start_for(request_for(base, "gaussian", family)).A
        assert gaussian.std().item() == pytest.approx(1 / RANK, rel=0.1)
        assert gaussian.abs().max() > 2 / RANK


def test_the_distributions_equal_peft_s_draws() -> None:
    """The same seed gives the numbers that PEFT's layer draws last."""
    peft = pytest.importorskip("peft")
    for base, family, _ in MODULES[:3]:
        for init in (True, "gaussian"):
            config = peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=init)
            layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
            torch.manual_seed(3)
            layer.reset_lora_parameters("default", init)
            if family == "embedding":
                expected = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            else:
                expected = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            torch.manual_seed(3)
            start = start_for(request_for(base, init, family))
            torch.testing.assert_close(start.A, expected[0].detach().flatten(1), rtol=0, atol=0)
            torch.testing.assert_close(start.B, expected[1].detach().flatten(1), rtol=0, atol=0)


@pytest.mark.parametrize(("base", "family", "shape"), MODULES)
def test_false_draws_both(base: nn.Module, family: str, shape: tuple[int, int]) -> None:
    start = start_for(request_for(base, False, family))
    assert torch.count_nonzero(start.A) == start.A.numel()
    assert torch.count_nonzero(start.B) == start.B.numel()


def test_dtype_and_device_are_the_request_s() -> None:
    start = start_for(request_for(nn.Linear(6, 9), True, dtype=torch.bfloat16))
    assert start.A.dtype == start.B.dtype == torch.bfloat16
    meta = nn.Linear(6000, 9000, device="meta")
    for init in (True, False, "gaussian"):
        start = start_for(request_for(meta, init, device=torch.device("meta")))
        assert start.A.is_meta
        assert start.A.shape == (RANK, 6000)
        assert start.B.shape == (9000, RANK)


@pytest.fixture
def own_name() -> object:
    yield "own"
    initializers._registry.pop("own", None)
    INIT_NAMES.discard("own")


def test_a_registered_name_is_a_valid_config_and_is_called(own_name: str) -> None:
    with pytest.raises(ConfigError, match="init_lora_weights"):
        LoraConfig(init_lora_weights=own_name)

    @register_initializer(own_name)
    def ones(request: Request) -> Start:
        out_features, in_features = request.shape
        return Start(torch.ones(request.rank, in_features), torch.ones(out_features, request.rank))

    start = start_for(request_for(nn.Linear(6, 9), own_name, dtype=torch.float16))
    assert start.A.dtype == torch.float16
    assert torch.equal(start.B.float(), torch.ones(9, RANK))


def test_factors_of_another_shape_are_refused(own_name: str) -> None:
    @register_initializer(own_name)
    def transposed(request: Request) -> Start:
        return Start(torch.ones(6, RANK), torch.ones(9, RANK))

    message = r"block.proj: expected factors A \(8, 6\) and B \(9, 8\) from the start 'own', found \(6, 8\)"
    with pytest.raises(AdapterError, match=message):
        start_for(request_for(nn.Linear(6, 9), own_name))


def test_a_name_that_is_no_longer_registered_lists_the_known(own_name: str) -> None:
    register_initializer(own_name)(lambda request: Start(torch.zeros(1), torch.zeros(1)))
    request = request_for(nn.Linear(6, 9), own_name)
    del initializers._registry[own_name]
    with pytest.raises(ConfigError, match=r"expected one of True, gaussian, False.*loftq, found 'own'"):
        start_for(request)
