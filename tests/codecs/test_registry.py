"""From a module to its codec: by type along the method resolution order, and by what the codec says of the module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.integrations.finegrained_fp8 import FP8Linear

from qlora_kit import LoraConfig, apply_lora, merge, quantize_
from qlora_kit.codecs import codec_for, find_codec, register_codec, registered_codec, registry
from qlora_kit.codecs.dense import DenseCodec
from qlora_kit.errors import LeftOutWarning, MergeError, UnsupportedModuleError


@pytest.fixture(autouse=True)
def _registrations_end_with_the_test() -> Iterator[None]:
    yield
    for kind in [kind for kind in registry._registry if kind.__module__ == __name__]:
        del registry._registry[kind]
    registry._found.clear()


def test_dispatch_is_by_type() -> None:
    assert codec_for(NonDynamicallyQuantizableLinear(2, 2)).name == "dense"
    assert find_codec(nn.ConvTranspose2d(2, 2, 2)) is None
    with pytest.raises(UnsupportedModuleError, match=r"model\.norm: expected .*torch\.nn\..*LayerNorm.*register"):
        codec_for(nn.LayerNorm(2), "model.norm")


def test_a_user_registers_a_codec() -> None:
    class Scaled(nn.Linear):
        pass

    @register_codec(Scaled)
    class ScaledCodec(DenseCodec):
        name = "scaled"

    assert codec_for(Scaled(2, 2)).name == "scaled"
    assert codec_for(nn.Linear(2, 2)).name == "dense"


class Doubled(nn.Linear):
    """Twice what its weight gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_codec_that_does_not_hold_the_matrix_is_none() -> None:
    module = Doubled(2, 2)
    assert registered_codec(module) is registered_codec(nn.Linear(2, 2))
    assert find_codec(module) is None
    with pytest.raises(
        UnsupportedModuleError,
        match=r"model\.out: expected a weight that is the module's matrix, found test_registry\.Doubled \(its forward "
        r"isn't that of torch\.nn.*Linear: it gives something else\); leave it out of the targets or register a codec",
    ):
        codec_for(module, "model.out")


def test_who_registers_a_type_vouches_for_its_forward() -> None:
    class Tripled(Doubled):
        pass

    register_codec(Doubled)(DenseCodec)
    assert find_codec(Doubled(2, 2)) is not None
    assert find_codec(Tripled(2, 2)) is not None, "a subclass with the same forward"

    class Otherwise(Doubled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    assert find_codec(Otherwise(2, 2)) is None


def test_a_later_registration_is_found_by_types_that_were_looked_up_before() -> None:
    module = Doubled(2, 2)
    assert find_codec(module) is None

    @register_codec(Doubled)
    class DoubledCodec(DenseCodec):
        name = "doubled"

    assert codec_for(module).name == "doubled"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), Doubled(8, 8), nn.Linear(8, 2))


def test_all_linear_skips_what_has_no_codec() -> None:
    with pytest.warns(LeftOutWarning, match="1 .*Doubled: its forward isn't that of"):
        lora = apply_lora(net(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert [entry.path for entry in lora.plan.entries] == ["0", "2"]
    x = torch.randn(3, 8)
    expected = lora(x)
    # Float32 products of another order.
    torch.testing.assert_close(merge(lora).model(x), expected, rtol=1e-4, atol=1e-5)
    assert type(quantize_(net(), 4)[1]) is Doubled


def test_a_merge_into_16_bits_does_not_cast_the_codes_of_a_module_that_has_no_codec() -> None:
    model = nn.Sequential(nn.Linear(64, 64), FP8Linear(64, 64, block_size=(32, 32)))
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    with pytest.raises(MergeError, match=r"1\.weight: expected a parameter that can be made dense, found .*float8"):
        merge(lora, into="bfloat16")
    assert type(merge(lora).model[1]) is FP8Linear


@pytest.mark.parametrize("start", [True, "loftq", "gaussian"])
def test_what_is_named_is_refused_before_anything_changes(start: bool | str) -> None:
    model = net()
    before, children = {k: v.clone() for k, v in model.state_dict().items()}, list(model)
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=start)
    for change in (lambda: apply_lora(model, config), lambda: quantize_(model, 4, target_modules=["0", "1"])):
        with pytest.raises(UnsupportedModuleError, match=r"^1: expected a weight .*Doubled .*forward"):
            change()
    assert list(model) == children
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
