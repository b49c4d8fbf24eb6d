"""Packed codes: where each bit is, and that every reader finds it there."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from reference import quantization as ref

from qlora_kit.codecs.blockwise import quantize
from qlora_kit.codecs.codebooks import codebook
from qlora_kit.codecs.packing import pack, packed_bytes, unpack
from qlora_kit.errors import CodecError

every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def codes_of(count: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (count,), dtype=torch.uint8)


@every_width
def test_bytes_are_the_codes_bits_in_order(bits: int) -> None:
    for count in range(41):
        codes = codes_of(count, bits)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8
        assert bytes(packed.tolist()) == ref.pack_bits(codes.tolist(), bits)
        assert packed_bytes(count, bits) == packed.numel()


@every_width
def test_what_was_packed_is_read_back(bits: int) -> None:
    for count in range(41):
        codes = codes_of(count, bits)
        packed = pack(codes, bits)
        assert ref.unpack_bits(bytes(packed.tolist()), bits, count) == codes.tolist()
        assert torch.equal(unpack(packed, bits, count), codes)


@every_width
def test_every_code_survives_in_every_place(bits: int) -> None:
    codes = torch.cat([torch.arange(2**bits).roll(shift) for shift in range(8)]).to(torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, codes.numel()), codes)


@every_width
def test_matrices_are_packed_row_by_row(bits: int) -> None:
    codes = codes_of(7 * 5, bits).view(7, 5)
    assert torch.equal(pack(codes, bits), pack(codes.flatten(), bits))
    assert torch.equal(pack(codes.t(), bits), pack(codes.t().flatten(), bits))


@every_width
def test_packing_keeps_the_codes_and_shares_no_memory_with_them(bits: int) -> None:
    codes = codes_of(24, bits)
    before = codes.clone()
    pack(codes, bits).zero_()
    assert torch.equal(codes, before)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 101])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_first_high_is_bitsandbytes_order(quant_type: str, count: int) -> None:
    weight = torch.randn(1, count)
    expected, _ = quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    codes, _ = quantize(weight, codebook(quant_type), 64)
    found = pack(codes, 4, first_high=True)
    assert found.numel() == expected.numel()
    whole = count // 2  # what fills the last byte of an odd count is nobody's
    assert torch.equal(found[:whole], expected.flatten()[:whole])
    assert torch.equal(found >> 4, expected.flatten() >> 4)


@every_width
def test_sizes_are_whole_groups(bits: int) -> None:
    codes, size = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}[bits]
    for groups in (0, 1, 5):
        assert packed_bytes(groups * codes, bits) == groups * size
        assert packed_bytes(groups * codes + 1, bits) == (groups + 1) * size


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_other_widths_are_refused_by_name(bits: int) -> None:
    message = rf"bits: expected one of \[2, 3, 4, 8\] to pack, found {bits}"
    with pytest.raises(CodecError, match=message):
        packed_bytes(8, bits)
    with pytest.raises(CodecError, match=message):
        pack(torch.zeros(8, dtype=torch.uint8), bits)
    with pytest.raises(CodecError, match=message):
        unpack(torch.zeros(8, dtype=torch.uint8), bits, 8)
