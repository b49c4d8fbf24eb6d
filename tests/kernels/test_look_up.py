"""Look-ups of whole groups of codes: the values that each code has by itself, in any dtype, anywhere in memory."""

from __future__ import annotations

import pytest
import torch
from reference import quantization as ref
from torch import Tensor

from qlora_kit.kernels import look_up
from qlora_kit.kernels.look_up import chunks, group_values, look_up_

every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def packed(codes: Tensor, bits: int) -> Tensor:
    return torch.frombuffer(bytearray(ref.pack_bits(codes.tolist(), bits) or b"\0"), dtype=torch.uint8)


@every_width
@pytest.mark.parametrize("keep", [False, True])
def test_values_of_any_number_of_codes(bits: int, keep: bool) -> None:
    table = torch.randn(2**bits)
    for count in range(41):
        codes = torch.randint(0, 2**bits, (count,))
        found = look_up_(packed(codes, bits), bits, group_values(table, bits, keep=keep), torch.full((count,), 9.0))
        assert torch.equal(found, table[codes])


@every_width
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("offset", [0, 1])
def test_any_dtype_at_any_place(bits: int, dtype: torch.dtype, offset: int) -> None:
    table, codes = torch.arange(2**bits).to(dtype), torch.randint(0, 2**bits, (19,))
    memory = torch.zeros(21, dtype=dtype)
    look_up_(packed(codes, bits), bits, group_values(table, bits), memory[offset : offset + 19])
    assert torch.equal(memory[offset : offset + 19], table[codes])
    assert not memory[:offset].any()
    assert not memory[offset + 19 :].any()


@every_width
def test_a_table_that_changed_is_another(bits: int) -> None:
    table, codes = torch.randn(2**bits), torch.randint(0, 2**bits, (16,))
    for _ in range(2):
        assert torch.equal(
            look_up_(packed(codes, bits), bits, group_values(table, bits), torch.empty(16)), table[codes]
        )
        table.mul_(2)


def test_chunks_begin_at_multiples_and_leave_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look_up, "CHUNK", 100)
    for count, multiple in ((0, 8), (7, 8), (96, 8), (1000, 24), (1000, 768)):
        found = list(chunks(count, multiple, torch.device("cpu")))
        assert all(part.start % multiple == 0 for part in found)
        assert [place for part in found for place in range(part.start, part.stop)] == list(range(count))
