"""How a base module keeps its weight: the codec protocol and the registry from module type to codec.

A codec answers one question, *how is the weight stored?*, as ``read(module) -> float32 (out, in)`` and
``write_(module, weight)``. Merging, initializers, fidelity reports and storage are written once over this
pair; a new storage format is one codec and its registration:

    @register_codec(MyPackedLinear)
    class MyCodec(Codec): ...

The registry is keyed on the module's type and searched along the type's method resolution order, so the
most specific registration wins and a user's entry replaces a built-in one. It never looks at a flag of the
model: a 4-bit linear is found as such in any module tree. Codecs of optional libraries register when a
module of that library is first met, which keeps ``import qlora_kit`` light.

Orientation. ``(out, in)`` is the matrix of y = W x. For an embedding that is (dim, vocabulary), the
transpose of its table; a convolution is flattened to (out, in / groups * prod(kernel)).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import CodecError, UnsupportedModuleError
from .finite import all_finite

if TYPE_CHECKING:
    from .quantized import Quantized, Quantizer

# Entries that are read, checked or compared at a time where a whole second matrix isn't to be held.
PIECE = 1 << 20


class Codec:
    """Base of all codecs; stateless, so one instance serves every module of its type.

    Subclasses must give ``name``, ``shape``, ``read`` and ``write_``; the rest has defaults that fit a
    module holding one dense ``weight``.
    """

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if "snapshot" in vars(cls) and "contents" not in vars(cls):  # a copy will do
            cls.contents = cls.snapshot  # type: ignore[method-assign]

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """The logical (out, in), known without touching storage (meta tensors included)."""
        raise NotImplementedError

    def read(self, module: nn.Module) -> Tensor:
        """The weight as a new float32 (out, in) tensor on the module's device; changes nothing."""
        raise NotImplementedError

    def write_(self, module: nn.Module, weight: Tensor) -> None:
        """Store float32 (out, in) ``weight``, quantizing it the way this module is quantized.

        Raises:
            CodecError: the shape differs or a value isn't finite; the module is as it was.
        """
        raise NotImplementedError

    def pieces(self, module: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """``read``, some rows at a time: the rows and their values, new float32 tensors; all at once by default."""
        weight = self.read(module)
        yield slice(0, weight.shape[0]), weight

    def quantizer(self, module: nn.Module) -> Quantizer | None:
        """How ``write_`` quantizes; None for storage that doesn't, and for one that no quantizer here describes."""
        return None

    def quantized(self, module: nn.Module) -> Quantized | None:
        """The stored codes and scales as data, in the module's own memory where that will do; None where ``quantizer``
        is."""
        return None

    def take_(self, module: nn.Module, quantized: Quantized) -> None:
        """Store codes and scales that were chosen elsewhere, as they are; they must be of ``quantizer(module)``."""
        raise CodecError(
            f"{described(module)}: expected storage that takes codes chosen elsewhere, found {self.name!r}; round to "
            "the nearest code, or give its codec a take_ and a quantizer"
        )

    def release_(self, module: nn.Module) -> None:
        """Let go of the stored weight's memory; ``restore_`` brings it back from a snapshot."""
        module.weight.data = module.weight.data.new_empty(0)  # type: ignore[operator]

    def stored(self, module: nn.Module) -> list[Tensor]:
        """All tensors that the weight is stored in, in an order and layout that don't depend on the platform."""
        return [module.weight.detach()]  # type: ignore[operator]

    def nbytes(self, module: nn.Module) -> int:
        """Bytes of weight storage, scales included."""
        return sum(tensor.nbytes for tensor in self.stored(module))

    def compute_dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype the module computes and would be dequantized in (float32, bfloat16 or float16)."""
        return module.weight.dtype  # type: ignore[return-value]

    def device(self, module: nn.Module) -> torch.device:
        return module.weight.device  # type: ignore[return-value]

    def contents(self, module: nn.Module) -> Any:
        """All that ``write_`` changes, not copied: tensors, or tuples, lists and dictionaries of them."""
        return module.weight.detach()  # type: ignore[operator]

    def snapshot(self, module: nn.Module) -> Any:
        """``contents``, copied, for a bitwise ``restore_``."""
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.contents(module))

    @torch.no_grad()
    def restore_(self, module: nn.Module, snapshot: Any) -> None:
        """Put back what ``snapshot`` copied, bit for bit."""
        module.weight.copy_(snapshot)  # type: ignore[operator]

    def protect_(self, module: nn.Module) -> None:
        """Keep the platform from rewriting the stored weight behind our back; idempotent."""

    def shield_(self, module: nn.Module) -> Any:
        """Hide storage that a cast of the module tree would destroy; a token for ``unshield_``, or None."""
        return None

    def unshield_(self, module: nn.Module, token: Any) -> None:
        """Undo ``shield_``."""

    def forward(self, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base module's output for ``x``; overridden where the platform's own forward is wrong."""
        return module(x, *args, **kwargs)

    def dense_like(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """An unquantized module of the same function in ``dtype``; ``module`` itself where it is dense."""
        return module


_registry: dict[type[nn.Module], Codec] = {}
# Where the codecs of an optional library register themselves, by the library's top-level package.
_on_demand = {"bitsandbytes": "qlora_kit.codecs.bnb", "transformers": "qlora_kit.codecs.conv1d"}


def register_codec(*types: type[nn.Module]) -> Callable[[type[Codec]], type[Codec]]:
    """Class decorator: store modules of ``types`` through this codec; the latest registration wins."""

    def register(codec: type[Codec]) -> type[Codec]:
        instance = codec()
        for kind in types:
            _registry[kind] = instance
        return codec

    return register


def load_on_demand(kind: type, table: dict[str, str]) -> None:
    """Import the handlers of the optional libraries that ``kind`` or its bases come from."""
    for root in {base.__module__.partition(".")[0] for base in kind.__mro__}:
        if root in table:
            importlib.import_module(table[root])


def find_codec(module: nn.Module) -> Codec | None:
    """The codec of ``module``'s type, or None."""
    kind = type(module)
    load_on_demand(kind, _on_demand)
    return next((_registry[base] for base in kind.__mro__ if base in _registry), None)


def codec_for(module: nn.Module, path: str = "") -> Codec:
    """The codec of ``module``'s type.

    Raises:
        UnsupportedModuleError: no codec is registered for it; names ``path`` and the type.
    """
    codec = find_codec(module)
    if codec is None:
        raise UnsupportedModuleError(
            f"{path or 'module'}: expected a module type with a registered codec, found "
            f"{type(module).__module__}.{type(module).__qualname__}; leave it out of the targets or register "
            "a codec with qlora_kit.codecs.register_codec"
        )
    return codec


def protect_storage_(root: nn.Module) -> None:
    """Keep the platform from rewriting any stored weight under ``root``; idempotent."""
    for module in root.modules():
        codec = find_codec(module)
        if codec is not None:
            codec.protect_(module)


@contextmanager
def shielded_storage(root: nn.Module) -> Iterator[None]:
    """Keep packed weights under ``root`` bit for bit through a ``.to(dtype)`` or ``_apply`` inside the block.

    Packed codes may be stored in a tensor that calls itself bfloat16 or float32 (so that sharding libraries
    accept it); a cast would convert those bits as if they were numbers.
    """
    shielded: list[tuple[Codec, nn.Module, Any]] = []
    try:
        for module in root.modules():
            codec = find_codec(module)
            token = None if codec is None else codec.shield_(module)
            if codec is not None and token is not None:
                shielded.append((codec, module, token))
        yield
    finally:
        for codec, module, token in shielded:
            codec.unshield_(module, token)


def described(module: nn.Module) -> str:
    """The module as error messages name it: type and constructor summary."""
    return f"{type(module).__name__}({module.extra_repr()})"


def row_pieces(shape: tuple[int, ...], multiple: int = 1) -> Iterator[slice]:
    """Rows of a matrix, about ``PIECE`` entries at a time, each piece beginning at a multiple of ``multiple`` entries
    in row-major order."""
    rows, width = shape[0], max(1, shape[1])
    unit = multiple // gcd(width, multiple)
    step = max(1, PIECE // (width * unit)) * unit
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def assembled(pieces: Iterator[tuple[slice, Tensor]], shape: tuple[int, int], device: torch.device) -> Tensor:
    """The whole matrix of which ``pieces`` are the rows: float32 ``shape``."""
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    for rows, values in pieces:
        whole[rows] = values
    return whole


def checked_weight(module: nn.Module, weight: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """``weight`` on the device of ``module``'s weight, in its own dtype, once it is known to fit into ``dtype``.

    Raises:
        CodecError: the shape isn't ``shape``, or a value isn't finite in ``dtype``.
    """
    if tuple(weight.shape) != tuple(shape):
        raise CodecError(
            f"{described(module)}.weight: expected a weight of shape {tuple(shape)} (out, in), "
            f"found {tuple(weight.shape)}; pass the whole matrix in (out, in) orientation"
        )
    weight = weight.detach().to(module.weight.device)  # type: ignore[arg-type]
    if not all(all_finite(weight[rows].to(dtype)) for rows in row_pieces(shape)):
        raise CodecError(
            f"{described(module)}.weight: expected values that are finite in {dtype}, found NaN or infinity; "
            "check the adapter's factors for overflow"
        )
    return weight
