"""Floating-point storage: orientation, dtypes, checks that come before any change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from floating_point_checks import DTYPES, check_on_meta, check_refused_writes, check_round_trip
from torch import nn

from qlora_kit.codecs import codec_for
from qlora_kit.codecs.dense import DenseCodec
from qlora_kit.errors import CodecError, UnsupportedModuleError

MODULES = {
    "dense": lambda: nn.Linear(6, 5),
    "embedding": lambda: nn.Embedding(7, 3),
    "conv": lambda: nn.Conv2d(4, 6, (3, 2), groups=2),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(name: str, dtype: torch.dtype) -> None:
    check_round_trip(MODULES[name](), name, dtype)


def test_read_is_a_copy() -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    codec_for(module).read(module).zero_()
    assert torch.equal(module.weight, before)


def test_orientation_is_that_of_the_product() -> None:
    linear, table = nn.Linear(6, 5, bias=False), nn.Embedding(7, 3)
    x = torch.randn(4, 6)
    torch.testing.assert_close(linear(x), x @ codec_for(linear).read(linear).t())
    one_hot = F.one_hot(torch.tensor([2, 5]), 7).float()
    torch.testing.assert_close(table(torch.tensor([2, 5])), one_hot @ codec_for(table).read(table).t())


@pytest.mark.parametrize(
    ("module", "columns"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), 2 * 3),
        (nn.Conv2d(4, 6, (3, 2)), 4 * 3 * 2),
        (nn.Conv3d(4, 4, 2, groups=4), 8),
    ],
)
def test_convolutions_flatten(module: nn.Module, columns: int) -> None:
    codec = codec_for(module)
    assert codec.shape(module) == (module.out_channels, columns)
    assert torch.equal(codec.read(module), module.weight.detach().reshape(module.out_channels, columns))


@pytest.mark.parametrize("name", MODULES)
def test_refused_writes_change_nothing(name: str) -> None:
    check_refused_writes(MODULES[name]())


def test_a_value_beyond_half_precision_is_refused() -> None:
    module = nn.Linear(2, 2).half()
    with pytest.raises(CodecError, match=r"finite in torch\.float16"):
        codec_for(module).write_(module, torch.full((2, 2), 1e5))


def test_integer_weights_are_refused_by_name() -> None:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(CodecError, match=r"Linear\(in_features=2.*floating-point weight.*torch.int8"):
        DenseCodec().read(module)
    with pytest.raises(UnsupportedModuleError, match=r"proj: expected .*Linear .*torch.int8.*floating-point weight"):
        codec_for(module, "proj")


@pytest.mark.parametrize("name", MODULES)
def test_meta_modules_are_described(name: str) -> None:
    check_on_meta(MODULES[name]())


def test_storage_of_no_codes() -> None:
    linear = nn.Linear(4, 4)
    codec = codec_for(linear)
    assert codec.quantized(linear) is None


def test_exchanging_a_weight_copies_nothing_where_the_memory_is_its_own() -> None:
    linear, new = nn.Linear(6, 4), torch.randn(4, 6)
    codec, before = codec_for(linear), linear.weight.detach().clone()
    address = linear.weight.data_ptr()
    taken = codec.exchange_(linear, new)
    assert torch.equal(taken, before)
    assert linear.weight.data_ptr() == new.data_ptr()
    assert taken.data_ptr() == address
    codec.restore_(linear, taken)
    assert torch.equal(linear.weight, before)


def test_exchanging_a_weight_that_lies_in_others_memory_writes_there() -> None:
    flat = torch.randn(60)
    linear = nn.Linear(6, 4)
    linear.weight = nn.Parameter(flat[10:34].view(4, 6))
    new = torch.randn(4, 6)
    before = codec_for(linear).exchange_(linear, new.clone())
    assert torch.equal(flat[10:34].view(4, 6), new)
    assert not torch.equal(before, new)


def test_exchanging_for_what_is_not_finite_leaves_the_weight() -> None:
    linear = nn.Linear(6, 4)
    before = linear.weight.detach().clone()
    with pytest.raises(CodecError, match="finite"):
        codec_for(linear).exchange_(linear, torch.full((4, 6), float("nan")))
    assert torch.equal(linear.weight, before)
