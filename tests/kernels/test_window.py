"""What codes with memory stand for, against bits taken one by one; packed and not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import quantization
from reference import trellis as ref
from torch import Tensor

from qlora_kit.codecs.packing import pack
from qlora_kit.codecs.trellis.tables import TABLES
from qlora_kit.kernels.look_up_windows import Windows
from qlora_kit.kernels.window import look_up, numbers

# Bits of a code and of memory: the types' own, no memory, parts of a code, and more than two bytes.
KINDS = [(2, 8), (3, 9), (4, 10), (2, 2), (4, 4), (2, 3), (2, 7), (3, 4), (3, 10), (4, 9), (4, 13), (8, 11), (2, 13)]
SHAPES = [(1, 1), (5, 1), (3, 2), (4, 7), (7, 5), (8, 16), (3, 24), (16, 13), (2, 64)]
every_kind = pytest.mark.parametrize(("bits", "memory"), KINDS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def drawn(shape: tuple[int, int], bits: int, memory: int) -> tuple[Tensor, Tensor]:
    return torch.randint(2**bits, shape, dtype=torch.uint8), torch.randn(2**memory)


@every_kind
@every_shape
def test_numbers_are_the_last_bits_of_the_stream(shape: tuple[int, int], bits: int, memory: int) -> None:
    codes, table = drawn(shape, bits, memory)
    expected = [ref.value_numbers(row, bits, memory) for row in codes.tolist()]
    assert numbers(codes, bits, memory).tolist() == expected
    assert np.array_equal(look_up(codes, table, bits).numpy(), ref.look_up(codes.numpy(), table.numpy(), bits))


@every_kind
@every_shape
def test_packed_codes_are_looked_up_the_same(shape: tuple[int, int], bits: int, memory: int) -> None:
    codes, table = drawn(shape, bits, memory)
    expected = look_up(codes, table, bits).view(-1)
    for keep in (False, True):
        windows = Windows(table, bits, shape[1], keep=keep)
        assert torch.equal(windows.look_up_(pack(codes, bits), torch.empty(codes.numel())), expected)
    flags = quantization.pack_bits(codes.flatten().tolist(), bits)
    assert pack(codes, bits).numpy().tobytes() == flags


def test_groups_of_codes_are_looked_up_at_once_where_rows_are_whole_bytes() -> None:
    found = {
        (bits, width): Windows(torch.tensor(TABLES[bits]), bits, width).in_groups
        for bits, width in [(2, 64), (2, 6), (3, 24), (3, 12), (4, 6), (4, 5)]
    }
    assert found == {(2, 64): True, (2, 6): False, (3, 24): True, (3, 12): False, (4, 6): True, (4, 5): False}


def test_a_memory_that_cannot_be_aligned_for_one_element_is_looked_up_too() -> None:
    """Flat output that begins off a multiple of the element that a group is moved as."""
    codes, table = drawn((8, 16), 2, 8)
    room = torch.empty(codes.numel() + 1)
    out = Windows(table, 2, 16).look_up_(pack(codes, 2), room[1:])
    assert torch.equal(out, look_up(codes, table, 2).view(-1))
