"""What an adapter layer answers when its ``weight`` is read: the matrix that it computes with.

Not all code calls its modules. ``nn.MultiheadAttention`` hands ``out_proj.weight`` to a function of torch's, Mamba
multiplies by ``dt_proj.weight``, a decoding step takes ``conv1d.weight``, kernels and chunked losses take the weights
of projections and heads. Answered with the base's parameter, all of these would compute without the adapter, in
training and in eval, and a merge would change what they give. So the answer is

    W + sum over active adapters of  s * B A,

in the layout, dtype and device of the base's own weight, with gradients to the factors (and to W where that is
trained). Dropout isn't applied: there is no input here that it could be applied to. Of a layer that computes with the
weight as it will be merged (``as_merged``) it is that weight, with the same gradients.

Most who read a weight want its dtype, device or shape only, some of them in each forward, and the product of a head
takes gigabytes. So it is computed when the first function of torch gets the answer (``InEffect``). Until then the
answer has one element, NaN, seen as the whole matrix: code that reads memory behind torch's back gets nothing that
looks right. Its place in autograd's graph it has from the start, since an ``autograd.Function`` takes tensors as they
are. A compiler and functorch trace what is computed, so they get the sum at once.

Writing to a sum can't reach what is summed, and would be lost. Scaling by a number can be done to W and to s alike, as
RWKV does to its layers for inference; all else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..codecs import Codec
from ..codecs.autocast import without_autocast
from ..errors import AdapterError
from .as_merged import for_gradients

#: Canonical A (r, in) and B (out, r), and the scaling s.
Branch = tuple[Tensor, Tensor, float]

# Properties whose value is made of the matrix; all others are about it.
_MADE_OF_IT = frozenset({"T", "mT", "H", "mH", "real", "imag"})
_ABOUT_IT = frozenset({"size", "dim", "numel", "nelement", "stride", "get_device", "is_floating_point", "__len__"})
_SCALINGS: dict[str, Callable[[float], float]] = {
    "mul_": lambda number: number,
    "__imul__": lambda number: number,
    "div_": lambda number: 1 / number,
    "__itruediv__": lambda number: 1 / number,
}


@dataclass
class Sum:
    """What a weight in effect is made of.

    Attributes:
        codec, base: how ``base`` keeps ``weight``.
        weight: the base's own.
        branches: of the active adapters.
        rescale_: multiplies the layer by a number, base and branches.
        rounded: gives what the sum is rounded to, float32 (out, in), where the layer computes with that.
        unknown: why there is no one weight, where rows have adapters of their own; its dtype and shape there are.
    """

    codec: Codec
    base: nn.Module
    weight: Tensor
    branches: Sequence[Branch]
    rescale_: Callable[[float], None]
    unknown: str = ""
    rounded: Callable[[], Tensor] | None = None
    computed: bool = False

    def value(self) -> Tensor:
        """The weight in effect; gradients flow to the factors and to ``weight``.

        Raises:
            AdapterError: it is ``unknown``.
        """
        if self.unknown:
            raise AdapterError(self.unknown)
        with without_autocast(self.weight.device):
            delta = sum(s * (B @ A) for A, B, s in self.branches)
            laid_out = self.codec.laid_out(self.base, delta)  # type: ignore[arg-type]
            assert laid_out is not None
            if self.rounded is None:
                return (self.weight + laid_out).to(self.weight.dtype)
            rounded: Any = self.codec.laid_out(self.base, self.rounded())
            return (rounded + for_gradients(laid_out)).to(self.weight.dtype)


def weight_in_effect(terms: Sum) -> Tensor:
    """What ``terms`` sum up to, in the layout, dtype and device of ``terms.weight``: see the module's text. That itself
    where nothing is added to it, and where it isn't the matrix."""
    codec, base = terms.codec, terms.base
    if not terms.branches or codec.laid_out(base, torch.empty(codec.shape(base), device="meta")) is None:
        return terms.weight
    plain = type(terms.weight) in (Tensor, nn.Parameter)
    if not plain or torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed():
        return terms.value()
    return computed_later(terms)


def computed_later(terms: Sum) -> Tensor:
    """What ``terms`` sum up to, computed when it is worked with."""
    factors = [factor for A, B, _ in terms.branches for factor in (A, B)]
    answer = _Placeholder.apply(terms, terms.weight, *factors).as_subclass(InEffect)
    vars(answer)["terms"] = terms
    return answer


def _transformed() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


class _Placeholder(torch.autograd.Function):
    """A tensor without values at the place of the sum in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, terms: Sum, weight: Tensor, *factors: Tensor) -> Tensor:
        ctx.terms = terms
        ctx.save_for_backward(*factors)
        return torch.full((), float("nan"), dtype=weight.dtype, device=weight.device).expand(weight.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (gradient,), factors = grad_outputs, ctx.saved_tensors
        found: list[Tensor] = []
        for A, B, (_, _, s) in zip(factors[::2], factors[1::2], ctx.terms.branches, strict=True):
            matrix = ctx.terms.codec.matrix_of(gradient).to(A.dtype)
            found += [s * (B.T @ matrix), s * (matrix @ A.T)]
        return None, gradient, *found


class InEffect(Tensor):
    """A weight in effect that is computed when torch first works with it. Its dtype, device and shape cost nothing."""

    terms: Sum

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        found = getattr(func.__self__, "__name__", "") if name in ("__get__", "__set__") else name
        if name == "__get__" and found == "data":
            return args[0].without_graph()
        if found in _ABOUT_IT or (name == "__get__" and found not in _MADE_OF_IT):
            return super().__torch_function__(func, types, args, kwargs)
        given = [*args, *kwargs.values()]  # functions of torch.nn.init hand all on by name
        if given and isinstance(given[0], cls) and (name == "__set__" or _in_place(name)):
            return given[0].write_(found, *given[1:])
        if isinstance(kwargs.get("out"), cls):
            kwargs["out"].write_(f"{name}(out=...)")
        args, kwargs = tree_map_only(cls, cls.plain, (args, kwargs))
        return func(*args, **kwargs)

    def plain(self) -> Tensor:
        """The same as a plain tensor, computed."""
        with torch._C.DisableTorchFunctionSubclass():
            if not self.terms.computed:
                with torch.no_grad():
                    self.data = self.terms.value()
                self.terms.computed = True
            return self.as_subclass(Tensor)

    def without_graph(self) -> Tensor:
        """What ``data`` is of a tensor: the values, out of autograd's sight."""
        with torch._C.DisableTorchFunctionSubclass():
            answer = self.detach().as_subclass(InEffect)
        vars(answer)["terms"] = self.terms
        return answer

    def write_(self, what: str, *values: Any) -> Any:
        """Do ``what``, a function in place or an assignment, to what this is the sum of.

        Raises:
            AdapterError: it can't be done there.
        """
        if what in ("requires_grad", "requires_grad_"):
            self.terms.weight.requires_grad_(*values)
        elif what in _SCALINGS and len(values) == 1 and isinstance(values[0], (int, float)):
            self.terms.rescale_(_SCALINGS[what](values[0]))
        else:
            raise AdapterError(
                f"weight.{what}: expected a weight that is stored, found that of an adapter layer, which is computed: "
                f"its base's plus the adapters'; write to base_layer.weight, or call unload() first"
            )
        return self

    def __getattr__(self, attribute: str) -> Any:
        return getattr(vars(self)["terms"].weight, attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        owner: Any = self if hasattr(Tensor, attribute) else self.terms.weight
        super(InEffect, owner).__setattr__(attribute, value) if owner is self else setattr(owner, attribute, value)


def _in_place(name: str) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return name.endswith("_")
