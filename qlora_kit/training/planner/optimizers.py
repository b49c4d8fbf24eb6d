"""What optimizers keep of each parameter beside its gradient.

8-bit states are bitsandbytes': a byte a number and a float32 scale a block, but for tensors under 4,096 numbers, which
stay in float32. Paged ones lie in memory that the driver moves to the host when the card is full, so they are not
counted against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

from torch import Tensor

# bitsandbytes' optimizers: numbers that share a scale, and the size from which 8 bits are taken.
_BLOCK, _LEAST = 256, 4096


def _same(count: int) -> Callable[[Tensor], int]:
    """``count`` copies of the parameter."""
    return lambda p: count * p.nbytes


def _eight_bit(count: int) -> Callable[[Tensor], int]:
    return lambda p: count * (p.numel() + 4 * -(-p.numel() // _BLOCK) if p.numel() >= _LEAST else 4 * p.numel())


def _full(count: int) -> Callable[[Tensor], int]:
    """``count`` float32 numbers for each one."""
    return lambda p: count * 4 * p.numel()


def _factored(p: Tensor) -> int:
    """Adafactor's: a row and a column of squares for each matrix."""
    return 4 * (prod(p.shape[:-1]) + prod((*p.shape[:-2], p.shape[-1])) if p.dim() > 1 else p.numel())


#: Bytes of states of one parameter, by the optimizer's name.
OPTIMIZERS: dict[str, Callable[[Tensor], int]] = {
    "adamw": _same(2),
    "adamw-8bit": _eight_bit(2),
    "adamw-32bit": _full(2),
    "paged-adamw": _full(2),
    "paged-adamw-8bit": _eight_bit(2),
    "lion": _full(1),
    "lion-8bit": _eight_bit(1),
    "paged-lion": _full(1),
    "paged-lion-8bit": _eight_bit(1),
    "adafactor": _factored,
    "sgd-momentum": _same(1),
    "sgd": _same(0),
}


def named(optimizer: str) -> str:
    """The name of ``OPTIMIZERS`` for one of ``training.optimizers``: "paged-adamw" for "paged_adamw_32bit"."""
    hyphens = optimizer.replace("_", "-")
    return hyphens if hyphens in OPTIMIZERS else hyphens.removesuffix("-32bit")


def state_bytes(optimizer: str, parameters: Iterable[Tensor]) -> int:
    """Bytes of states, on the card or in paged memory."""
    return sum(OPTIMIZERS[optimizer](parameter) for parameter in parameters)


def is_paged(optimizer: str) -> bool:
    """Whether the states lie in memory that makes way."""
    return optimizer.startswith("paged")
