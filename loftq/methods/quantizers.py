"""Which quantizer an alternation runs with: the one deployed, so that the error which it measures is the error
of the layer that will run."""

from __future__ import annotations

from qlora_kit.codecs.codebooks import TYPES
from qlora_kit.codecs.quantized import Quantizer
from qlora_kit.config.loftq import DEFAULT_TYPES
from qlora_kit.errors import ConfigError, closest


def quantizer_for(
    *,
    bits: int = 4,
    quant_type: str | None = None,
    blocksize: int | str | None = 64,
    double_quant: bool = False,
) -> Quantizer:
    """The quantizer of these options, checked.

    Args:
        bits: 2, 3, 4 or 8; means ``qlora_kit.config.loftq.DEFAULT_TYPES`` of it.
        quant_type: a type of ``qlora_kit.codecs.codebooks.SCHEMES`` or "int8"; stands above ``bits``.
        blocksize: values per scale, or "row" (or None) for one scale a row; int8 has rows whatever it says.
        double_quant: keep the scales in 8 bits, as bitsandbytes' nested quantization does.

    Raises:
        ConfigError: an option isn't in the table or doesn't go with another.
    """
    if quant_type is None:
        if isinstance(bits, bool) or bits not in DEFAULT_TYPES:
            raise ConfigError(
                f"bits: expected one of {list(DEFAULT_TYPES)}, found {bits!r}; pick one of these or pass quant_type"
            )
        quant_type = DEFAULT_TYPES[bits]
    if quant_type not in TYPES:
        raise ConfigError(
            f"quant_type: expected one of {', '.join(TYPES)}, found {quant_type!r}; "
            f"the closest are {closest(str(quant_type), TYPES)}"
        )
    values: int | None
    if blocksize is None or blocksize == "row":
        values = None
    elif isinstance(blocksize, bool) or not isinstance(blocksize, int) or blocksize < 1:
        raise ConfigError(f"blocksize: expected a positive integer or 'row', found {blocksize!r}; pass blocksize=64")
    else:
        values = blocksize
    if quant_type == "int8" and double_quant:
        raise ConfigError("double_quant: expected False with int8, which has one scale a row, found True; leave it out")
    return Quantizer(quant_type, values, double_quant)
