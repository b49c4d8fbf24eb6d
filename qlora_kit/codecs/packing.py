"""Codes of 2, 3, 4 and 8 bits in bytes, without a gap.

The first code of a group is in the lowest bits: 2 bits put 4 codes in a byte; 3 bits put 8 codes in 3 bytes, a
little-endian number of 24 bits; 4 bits put 2 codes in a byte (bitsandbytes has the first in the high half:
``first_high``). A last group that isn't full is filled with zeros.

Unpacking is a look-up of whole groups in a table of their codes; in a table of their values it gives these without the
codes in between, which is how weights are read (``kernels.look_up``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CodecError
from ..kernels.look_up import chunks, group_values, look_up_

# bits -> (codes, bytes) of a group.
GROUPS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}
# Groups of 3 bits that are packed at a time: as numbers they take more memory than the bytes.
_CHUNK = 1 << 16


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take.

    Raises:
        CodecError: bits other than 2, 3, 4 or 8.
    """
    codes, size = _group(bits)
    return -(-count // codes) * size


def pack(codes: Tensor, bits: int, *, first_high: bool = False) -> Tensor:
    """Flat uint8 bytes of ``codes`` (uint8, any shape, row-major, each below 2^bits)."""
    group, _ = _group(bits)
    if codes.is_meta:
        return codes.new_empty(packed_bytes(codes.numel(), bits))
    flat = codes.reshape(-1)
    if flat.numel() % group:
        flat = torch.cat([flat, flat.new_zeros(group - flat.numel() % group)])
    if bits == 8:
        return flat.clone()
    if bits == 4:
        pairs = flat.view(-1, 2)
        low, high = (pairs[:, 1], pairs[:, 0]) if first_high else (pairs[:, 0], pairs[:, 1])
        return torch.bitwise_left_shift(high, 4).bitwise_or_(low)
    if bits == 2:
        quads = flat.view(-1, 4)
        out = quads[:, 3].clone()
        for place in (2, 1, 0):
            out = out.bitwise_left_shift_(2).bitwise_or_(quads[:, place])
        return out
    octets = flat.view(-1, 8)
    bytes_ = torch.empty(len(octets), 3, dtype=torch.uint8, device=flat.device)
    for part, out in zip(octets.split(_CHUNK), bytes_.split(_CHUNK), strict=True):
        number = part[:, 7].int()
        for place in range(6, -1, -1):
            number = number.bitwise_left_shift_(3).bitwise_or_(part[:, place])
        for byte in range(3):
            out[:, byte] = number >> 8 * byte & 0xFF
    return bytes_.reshape(-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of flat bytes, uint8."""
    _group(bits)
    groups = group_values(torch.arange(2**bits, dtype=torch.uint8, device=packed.device), bits, keep=False)
    codes = torch.empty(count, dtype=torch.uint8, device=packed.device)
    for part in chunks(count, 8, packed.device):
        look_up_(packed[part.start * bits // 8 :], bits, groups, codes[part])
    return codes


def _group(bits: int) -> tuple[int, int]:
    if bits not in GROUPS:
        raise CodecError(f"bits: expected one of {list(GROUPS)} to pack, found {bits!r}; pick one of these")
    return GROUPS[bits]
