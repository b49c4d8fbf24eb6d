"""transformers' ``Conv1D``, stored (in, out)."""

from __future__ import annotations

import pytest
import torch
from floating_point_checks import DTYPES, check_on_meta, check_refused_writes, check_round_trip
from transformers.pytorch_utils import Conv1D

from qlora_kit.codecs import codec_for, find_codec


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype: torch.dtype) -> None:
    check_round_trip(Conv1D(5, 6), "conv1d", dtype)


def test_orientation_is_that_of_the_product() -> None:
    module, x = Conv1D(5, 6), torch.randn(4, 6)
    torch.testing.assert_close(module(x), x @ codec_for(module).read(module).t() + module.bias)


def test_refused_writes_change_nothing() -> None:
    check_refused_writes(Conv1D(5, 6))


def test_meta_modules_are_described() -> None:
    check_on_meta(Conv1D(5, 6))


def test_a_subclass_whose_forward_is_another() -> None:
    class Written(Conv1D):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.bias

    class Negative(Conv1D):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    assert find_codec(Written(5, 6)) is not None
    assert find_codec(Negative(5, 6)) is None
