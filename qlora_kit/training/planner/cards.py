"""GPUs by the names that people have for them: memory, and what their generation can't do.

Bytes are what torch reports as a card's total, which is less than the number on the box: error correction and the
driver have a part. The context that CUDA makes is not off it yet (``CONTEXT``).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ConfigError, closest

GIB = 2**30
#: What is held besides tensors: the context, the workspaces of libraries and what the allocator can't use. Assumed.
CONTEXT = 3 * GIB // 4


@dataclass(frozen=True)
class Card:
    """A GPU, or a share of one.

    Attributes:
        name: "t4".
        memory: bytes in all.
        ampere: of the generation of 2020 or later: it computes in bfloat16 and has flash attention.
    """

    name: str
    memory: int
    ampere: bool = True

    @property
    def usable(self) -> int:
        """Bytes for tensors."""
        return max(0, self.memory - CONTEXT)


_GIB = {
    **{"t4": 14.75, "v100": 15.77, "v100-32": 31.74},
    **{"l4": 22.17, "a10": 22.19, "3090": 23.69, "4090": 23.64, "5090": 31.36, "a6000": 47.4, "l40s": 44.4},
    **{"a100": 79.15, "a100-40": 39.39, "a100-80": 79.15, "h100": 79.1, "h200": 139.7},
}
_BEFORE_AMPERE = ("t4", "v100", "v100-32")
CARDS = {name: Card(name, int(size * GIB), name not in _BEFORE_AMPERE) for name, size in _GIB.items()}
# What else is written before or after a name.
_DECORATION = ("nvidia", "geforce", "rtx", "tesla", "gb", "sxm", "pcie")


def card_named(name: str) -> Card:
    """The card of that name.

    Raises:
        ConfigError: it isn't known; names those that look most like it.
    """
    plain = name.lower().replace("_", "-").replace(" ", "-")
    for word in _DECORATION:
        plain = plain.replace(word, "")
    plain = "-".join(part for part in plain.split("-") if part)
    if plain not in CARDS:
        near = closest(plain, CARDS) or list(CARDS)
        raise ConfigError(f"gpu: expected a GPU that is known here, found {name!r}; pass one of {near}, or memory=SIZE")
    return CARDS[plain]
