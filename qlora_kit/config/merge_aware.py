"""What an adapter is trained to be merged into: ``LoraConfig.merge_aware``, understood and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..codecs.codebooks import SCHEMES, STORED_TYPES
from ..errors import closest
from .checks import failure

_KEYS = ("into", "blocksize", "double_quant")
_SAME = "same"


@dataclass(frozen=True)
class MergeAware:
    """A merge to the nearest codes.

    Attributes:
        into: "same" keeps each module's own storage; else a type of ``codecs.codebooks.STORED_TYPES``.
        blocksize: weights that share a scale, "row", or None: as the module has it if it is of that type, else 64.
        double_quant: scales in 8 bits, or None: as the module has it if it is of that type, else no.
    """

    into: str
    blocksize: int | str | None = None
    double_quant: bool | None = None

    @classmethod
    def of(cls, value: Any) -> MergeAware:
        """From what ``LoraConfig.merge_aware`` holds.

        Raises:
            ConfigError: it isn't "same", a storage type, or a dict with one under "into".
        """
        given = {"into": value} if not isinstance(value, Mapping) else value
        for key in given:
            if key not in _KEYS:
                fix = f"did you mean {closest(str(key), _KEYS, count=1)[0]!r}?"
                raise failure("merge_aware", f"a dict with keys among {list(_KEYS)}", value, fix)
        into, blocksize, double_quant = (given.get(key) for key in _KEYS)
        known = (_SAME, *STORED_TYPES)
        into = into.lower() if isinstance(into, str) else into
        if into not in known:
            near = closest(str(into), known, count=1)
            fix = f"did you mean {near[0]!r}?" if near else "pass merge_aware='same', or a type such as 'nf4'"
            raise failure("merge_aware", f"'same' or one of {sorted(STORED_TYPES)}", into, fix)
        whole = isinstance(blocksize, int) and not isinstance(blocksize, bool) and blocksize > 0
        if not (blocksize is None or blocksize == "row" or whole):
            raise failure("merge_aware['blocksize']", "a positive number or 'row'", blocksize, "pass 64, say")
        if not isinstance(double_quant, (bool, type(None))):
            raise failure("merge_aware['double_quant']", "True or False", double_quant, "pass True, or leave it out")
        if into not in SCHEMES and (blocksize is not None or double_quant is not None):
            fix = "leave blocksize and double_quant out"
            raise failure("merge_aware", f"nothing but the storage with {into!r}", value, fix)
        return cls(into, blocksize, double_quant)

    def to_json(self) -> str | dict[str, Any]:
        """The plain value that means this: the storage's name alone where that says all."""
        said = {key: getattr(self, key) for key in _KEYS if getattr(self, key) is not None}
        return self.into if len(said) == 1 else said

    def __str__(self) -> str:
        more = {"blocksize": self.blocksize, "double_quant": self.double_quant}
        return ", ".join([repr(self.into), *(f"{k}={v!r}" for k, v in more.items() if v is not None)])
