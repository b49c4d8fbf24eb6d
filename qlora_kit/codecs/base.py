"""How a base module keeps its weight: what every codec promises.

A codec answers one question, *how is the weight stored?*, as ``read(module) -> float32 (out, in)`` and
``write_(module, weight)``. Merging, initializers, fidelity reports and storage are written once over this
pair; a new storage format is one codec and its registration:

    @register_codec(MyPackedLinear)
    class MyCodec(Codec): ...

Orientation. ``(out, in)`` is the matrix of y = W x. For an embedding that is (dim, vocabulary), the
transpose of its table; a convolution is flattened to (out, in / groups * prod(kernel)).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import CodecError
from .autocast import without_autocast
from .finite import all_finite
from .pieces import row_pieces
from .quantized import Quantized, Quantizer


class Codec:
    """Base of all codecs; stateless, so one instance serves every module of its type.

    Subclasses must give ``name``, ``shape``, ``read`` and ``write_``; the rest has defaults that fit a
    module holding one dense ``weight``.
    """

    name: ClassVar[str]
    #: Whether ``module.weight`` may be cut into pieces and put together again by an engine that knows nothing but
    #: tensors; not where the parameter object carries more than its values.
    can_be_sharded: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        if "snapshot" in vars(cls) and "contents" not in vars(cls):  # a copy will do
            cls.contents = cls.snapshot  # type: ignore[method-assign]

    def reason_against(self, module: nn.Module) -> str | None:
        """Why this codec doesn't hold the matrix of ``module``, which is of a type that it is registered for or of a
        subclass; None if it does. Asked of every module and often, so it has to be quick. In a message it stands in
        brackets after the type."""
        return None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """The logical (out, in), known without touching storage (meta tensors included)."""
        raise NotImplementedError

    def read(self, module: nn.Module) -> Tensor:
        """The weight as a new float32 (out, in) tensor on the module's device; changes nothing."""
        raise NotImplementedError

    def plus(self, module: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        """``read`` plus B (out, rank) @ A (rank, in), both float32, without a second matrix of its size."""
        weight = self.read(module)
        with without_autocast(weight.device):
            return weight.addmm_(B, A)

    def add_(self, module: nn.Module, A: Tensor, B: Tensor) -> None:
        """Store ``plus``. Unlike after ``write_`` the module may be half changed after an error: keep its ``contents``.

        Raises:
            CodecError: a value of the sum isn't finite.
        """
        self.write_(module, self.plus(module, A, B))

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

    def laid_out(self, module: nn.Module, matrix: Tensor) -> Tensor | None:
        """(out, in) ``matrix`` in the layout of ``module.weight``; None where that tensor isn't the matrix."""
        return None

    def matrix_of(self, stored: Tensor) -> Tensor:
        """What ``laid_out`` gave as the (out, in) matrix again."""
        raise NotImplementedError

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

    def take_over_(self, module: nn.Module, weight: Tensor) -> Any:
        """Make ``weight`` the module's own memory, or new memory that holds its values as they are stored, and give
        back what that was: a ``snapshot`` that no one has copied. None, with nothing done, where ``write_`` is needed.

        Raises:
            CodecError: as ``write_``; the module is as it was.
        """
        return None

    def exchange_(self, module: nn.Module, weight: Tensor) -> Any:
        """``write_``, and the ``snapshot`` of what was stored before; ``weight`` may become the module's own memory.

        Raises:
            CodecError: as ``write_``; the module is as it was.
        """
        if (taken := self.take_over_(module, weight)) is not None:
            return taken
        before = self.snapshot(module)
        try:
            self.write_(module, weight)
        except BaseException:
            self.restore_(module, before)
            raise
        return before

    @torch.no_grad()
    def restore_(self, module: nn.Module, snapshot: Any) -> None:
        """Put back what ``snapshot`` copied, bit for bit."""
        module.weight.copy_(snapshot)  # type: ignore[operator]

    def load_(self, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Take from ``state``, a state dict that torch is about to load, what the module keeps of its weight beside
        parameters and buffers (under keys that begin with ``prefix``), and remove that from it. By default nothing.

        Raises:
            CodecError: it is of another format; the module is as it was.
        """

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

    def linear_dtypes(self, module: nn.Module, x: Tensor) -> tuple[torch.dtype, torch.dtype] | None:
        """For who computes y = x W^T + b in the module's stead, with W as ``multiplier`` gives it: the dtype of the
        product and that of y. None, the default, where only the module's own forward knows what it does with ``x``."""
        return None

    def multiplier(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """The (out, in) weight in ``dtype``, to be multiplied at once with inputs of ``to_basis``: the stored tensor
        itself where that will do, else in memory that the next call may overwrite. It isn't to be written to."""
        return self.read(module).to(dtype)

    def to_basis(self, module: nn.Module, x: Tensor) -> Tensor:
        """Inputs (..., in) as ``multiplier`` is multiplied with, whose columns may be in another, orthonormal basis."""
        return x

    def from_basis(self, module: nn.Module, x: Tensor) -> Tensor:
        """The inverse of ``to_basis``: gradients of inputs, and rows of the weight."""
        return x

    def dense_like(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """An unquantized module of the same function in ``dtype``; ``module`` itself where it is dense."""
        return module

    def housed(self, module: nn.Module, linear: nn.Module) -> nn.Module:
        """``linear``, a linear layer that holds a weight of ``module``'s sizes in another storage, as what can take
        ``module``'s place: by default itself, where plain linear layers stand in for all of the kind."""
        if not isinstance(module, nn.Linear):
            linear.source_cls = type(module)  # type: ignore[assignment]
        return linear


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that torch's own linear would compute ``x`` in: autocast's where that is on."""
    casts = autocasts(x) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for ``x``. The meta device, where torch doesn't know the question, has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def described(module: nn.Module) -> str:
    """The module as error messages name it: type and constructor summary."""
    return f"{type(module).__name__}({module.extra_repr()})"


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
    whole = (weight,) if weight.dtype == dtype else (weight[rows].to(dtype) for rows in row_pieces(shape))
    if not all(map(all_finite, whole)):
        raise not_finite(module, dtype)
    return weight


def not_finite(module: nn.Module, dtype: torch.dtype) -> CodecError:
    """What to raise where ``module`` is to store in ``dtype`` what isn't finite there."""
    return CodecError(
        f"{described(module)}.weight: expected values that are finite in {dtype}, found NaN or infinity; "
        "check the adapter's factors for overflow"
    )
