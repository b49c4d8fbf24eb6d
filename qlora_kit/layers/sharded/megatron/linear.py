"""Branches beside Megatron's sharded linears, which give a pair: the output, and the bias that they leave to others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...weight_in_effect import InEffect
from ..collectives import gather_from_group, split_to_group
from ..linear import ShardedLinearAdapter
from ..sharding import Form, Sharding, sharding_of
from .random import own_state


@dataclass(frozen=True)
class Returned:
    """What a module gave: its output, what came with it (None where that was all), and what its weight was multiplied
    with."""

    out: Tensor
    beside: tuple[Any, ...] | None
    multiplied: Tensor

    def again(self, out: Tensor) -> Any:
        """``out`` with what came with the output."""
        return out if self.beside is None else (out, *self.beside)


class MegatronLinear(ShardedLinearAdapter):
    """``lora_A[name].weight`` and ``lora_B[name].weight``, the one of them that is sharded being this rank's part.

    Factors carry the attributes by which Megatron's optimizers tell parts from copies. None of them is marked for the
    sum over sequence-parallel ranks that Megatron makes of norms' gradients after a step: theirs are whole already.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.refuse_rows(kwargs)
        if not (names := self._in_effect):
            return self.codec.forward(self.base_layer, x, *args, **kwargs)
        args, kwargs = _with_own_weight(self.base_layer, args, kwargs)
        found = called(self.base_layer, x, *args, **kwargs)
        out = found.out
        for name in names:
            out = out + self._as_asked(self.branch(found.multiplied, name), args, kwargs).to(out.dtype)
        return found.again(out)

    def _as_asked(self, branch: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``branch`` of all ranks or of this one alone, where the call says so and not the layer."""
        now = kwargs.get("runtime_gather_output", args[1] if len(args) > 1 else None)
        if now is None or now == (self.sharding.gives == "whole"):
            return branch
        return (gather_from_group if now else split_to_group)(branch, -1, self.sharding.group)

    def dropped(self, x: Tensor, dropout: nn.Module, takes: Form) -> Tensor:
        """``x`` after dropout: of what is the same on all ranks drawn from the random state that they share, of parts
        from this rank's own, as Megatron does it. Where it keeps no such states, see the base's."""
        if takes == "whole" or not isinstance(dropout, nn.Dropout):
            return dropout(x)
        with own_state(getattr(self.base_layer, "fused", self.base_layer)) as there:  # of a part, what it is a part of
            return dropout(x) if there else super().dropped(x, dropout, takes)

    def new_factors_(self, name: str, A: Tensor, B: Tensor) -> None:
        super().new_factors_(name, A, B)
        mark_(self.adapter_tensors(name).values(), self.sharding)

    def __setattr__(self, attribute: str, value: Any) -> None:
        if attribute == "sequence_parallel":  # which generation switches off at the head for a while
            setattr(self.base_layer, attribute, value)
            self.sharding = sharding_of(self.base_layer)  # type: ignore[assignment]
        else:
            super().__setattr__(attribute, value)


def called(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Returned:
    """What ``module``, a sharded linear, gives for ``x``. One that is a norm and a linear in one (TransformerEngine's)
    is asked for what the norm gives by the flag that it has for that."""
    flags: Any = module
    asked = getattr(module, "return_layernorm_output", None)
    if asked is None:
        result = module(x, *args, **kwargs)
        return Returned(result[0], tuple(result[1:]), x) if isinstance(result, tuple) else Returned(result, None, x)
    flags.return_layernorm_output = True
    try:
        result = module(x, *args, **kwargs)
    finally:
        flags.return_layernorm_output = asked
    if isinstance(result[0], tuple):  # megatron-core's without a bias to return: (out, normed), None
        (out, normed), bias = result
        return _Nested(out, (bias,), normed) if asked else Returned(out, (bias,), normed)
    out, *beside, normed = result
    beside = [*beside, normed] if asked else beside
    return Returned(out, tuple(beside) if beside else None, normed)


class _Nested(Returned):
    """(out, normed), bias."""

    def again(self, out: Tensor) -> Any:
        return (out, self.multiplied), *(self.beside or ())


def mark_(factors: Iterable[nn.Parameter], sharding: Sharding) -> None:
    """Give A and B, those that are cut, the attributes by which Megatron tells a part from what all ranks have."""
    for parameter, dim in zip(factors, sharding.factor_dims, strict=True):
        if dim is not None:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = dim  # type: ignore[attr-defined]
            parameter.partition_stride = sharding.pieces  # type: ignore[attr-defined]


def _with_own_weight(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The arguments of a call without the layer's own weight among them: read of the layer it holds the branches, which
    are added to the output (a model whose head shares its embedding's values in another stage hands it over so)."""

    def own(value: Any) -> bool:
        return isinstance(value, InEffect) and value.terms.base is base

    return tuple(None if own(a) else a for a in args), {k: None if own(v) else v for k, v in kwargs.items()}
