"""How a low-rank branch is applied: what every adapter layer shares.

An adapter layer takes a base module's place in the tree and holds it as ``base_layer``. It computes

    y = base_layer(x) + sum over active adapters of  s * B (A dropout(x)),     s = alpha / r

and never touches the base weight outside ``merge_`` and ``unmerge_``. All that differs between linear,
embedding and convolution layers is the shape of the two factors and how they meet an input; a family gives
these in ``new_factors_`` and ``branch``. How the base weight is *stored* is the codec's question, so merging,
reading and quantizing are written once, here, for every storage.

Whatever their parameters look like, ``factors`` shows A as (r, in) and B as (out, r), so that s * B @ A is
the codec's (out, in) delta. Attribute and parameter names are PEFT's, and so are the adapter files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..codecs import Codec, codec_for, find_codec
from ..codecs.base import autocasts
from ..codecs.shards.view import is_tensor_parallel
from ..errors import AdapterError, TargetError
from ..lowrank import delta
from ..naming import StandIn
from .as_merged import MergeAwareLayer, Rounding, for_gradients
from .by_hand import AdjustedByHand
from .merged import MergedLayer
from .named import NamedModules
from .row_products import forward_by_rows, rows_of, weight_by_rows
from .weight_in_effect import Branch, InEffect, Sum, weight_in_effect

#: Attributes of a layer's own that change with every merge and switch: none is a tensor's, a module's or the base's.
_OWN = frozenset({"active_adapters", "computes_as_merged", "disable_adapters", "merged_adapters", "_kept", "_unmerged"})


class AdapterLayer(AdjustedByHand, MergedLayer, MergeAwareLayer, StandIn):
    """A base module with any number of named low-rank branches beside it. See the module's text."""

    family: ClassVar[str]
    holds = "base_layer"
    #: Names of the parameter containers that hold the two factors, A's first.
    factor_names: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    #: Of any module type; what it offers beyond nn.Module is between its codec and its family.
    base_layer: Any

    def __init__(self, base_layer: nn.Module, codec: Codec | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.codec = codec or codec_for(base_layer)
        self.codec.protect_(base_layer)
        self.training = base_layer.training
        self.lora_dropout = NamedModules()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.merge_aware: dict[str, Rounding] = {}
        self.computes_as_merged = True
        self._kept = None
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self.start_reports: dict[str, Any] = {}  # what an adapter's start measured, where it did
        self.tied_to: dict[str, str] = {}  # by adapter, the path of the module whose factors its own are
        self.shares_weight = False  # whether another module holds the base's weight parameter too
        self._shared: tuple[nn.Parameter, ...] = ()  # that one, while the base has one of its own to merge into
        self._unmerged: Any = None  # the codec's snapshot of the weight from before merge_
        self._rescaled = 1.0  # by what model code has multiplied the weight, and so the branches

    # -- what a family gives ---------------------------------------------------------------------------

    def new_factors_(self, name: str, A: Tensor, B: Tensor) -> None:
        """Store canonical A (r, in) and B (out, r) as the parameters of adapter ``name``."""
        raise NotImplementedError

    def tie_factors_(self, name: str, source: AdapterLayer) -> None:
        """Take the factors of ``source``, an embedding whose table is this layer's weight, for adapter ``name``."""
        raise TargetError(f"{type(self).__name__}: it can't share an adapter; leave ensure_weight_tying at False")

    def branch(self, x: Tensor, name: str) -> Tensor:
        """s * B (A dropout(x)) for adapter ``name``, in the adapter's dtype."""
        raise NotImplementedError

    def stacked_factors(self, names: Sequence[str]) -> Any:
        """What ``stacked_branches`` needs to compute those of ``names`` in one; None where they are called each by
        itself, which a family needn't change."""
        return None

    def stacked_branches(self, x: Tensor, *factors: Any) -> tuple[Tensor, float]:
        """The branches of several adapters, each of its own part of ``x`` (adapters, inputs, in), and a number that
        they are multiplied with as they are added."""
        raise NotImplementedError

    # -- the life of an adapter --------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        A: Tensor,
        B: Tensor,
        *,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        tied_to: AdapterLayer | None = None,
    ) -> None:
        """Register adapter ``name`` with canonical factors A (r, in) and B (out, r); it isn't active yet.

        With ``tied_to`` that layer's own parameters are its factors, which A and B are views of."""
        out_features, in_features = self.codec.shape(self.base_layer)
        rank = A.shape[0]
        if A.shape != (rank, in_features) or B.shape != (out_features, rank):
            raise AdapterError(
                f"adapter {name!r}: expected A ({rank}, {in_features}) and B ({out_features}, {rank}), "
                f"found A {tuple(A.shape)} and B {tuple(B.shape)}"
            )
        if tied_to is None:
            self.new_factors_(name, A, B)
        else:
            self.tie_factors_(name, tied_to)
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        for container in (*self.factor_names, "lora_dropout"):
            getattr(self, container).train(self.training)
        self.r[name], self.lora_alpha[name], self.use_rslora[name] = rank, alpha, use_rslora
        self.scaling[name] = self._first_scaling(name)

    def delete_adapter(self, name: str) -> None:
        """Forget adapter ``name``; does nothing where this layer doesn't have it."""
        if name in self.merged_adapters:
            raise AdapterError(f"adapter {name!r} is merged into the base weight; unmerge it before deleting it")
        for container in (*self.factor_names, "lora_dropout"):
            entries: Any = self._modules[container]
            if name in entries:
                del entries[name]
        tables = (self.r, self.lora_alpha, self.scaling, self.use_rslora, self.start_reports, self.tied_to)
        for table in (*tables, self.merge_aware):
            table.pop(name, None)
        self.forget_merged_()
        self.active_adapters = [n for n in self.active_adapters if n != name]

    def adapter_names(self) -> list[str]:
        return list(self.r)

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of ``name`` by the suffix they have in an adapter file (no adapter name in it)."""
        tensors = {}
        for container in self.factor_names:
            entry = self._modules[container][name]  # type: ignore[index]
            if isinstance(entry, nn.Module):
                tensors[f"{container}.weight"] = entry.weight
            else:
                tensors[container] = entry
        return tensors  # type: ignore[return-value]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Canonical views A (r, in) and B (out, r) of ``name``'s parameters; gradients flow through them."""
        A, B = self.adapter_tensors(name).values()
        return A.flatten(1), B.flatten(1)

    def whole_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``factors`` of all processes that share this layer, for reading; here they are this one's."""
        return self.factors(name)

    @torch.no_grad()
    def set_factors_(self, name: str, A: Tensor, B: Tensor) -> None:
        """Overwrite ``name``'s factors with canonical A (r, in) and B (out, r) of the same rank."""
        for parameter, value in zip(self.adapter_tensors(name).values(), (A, B), strict=True):
            parameter.copy_(value.view(parameter.shape))

    def delta(self, name: str) -> Tensor:
        """s * B @ A as a float32 (out, in) tensor."""
        A, B = self.factors(name)
        return delta(A.detach(), B.detach(), self.scaling[name])

    def factor_parts(self, name: str) -> dict[str, Any]:
        """Of parameters that are a part of what a file holds, and don't say so themselves as DTensors do: how they are
        cut (``sharded.Sharding``) and along which dimension, by suffix."""
        return {}

    # -- forward ---------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (rows := rows_of(self, kwargs)) is not None:
            return forward_by_rows(self, rows, x, *args, **kwargs)
        names = self._in_effect
        if names:
            self.check_held_whole()
        merged = self.as_merged(names) if names else None
        if merged is None:
            result = self.codec.forward(self.base_layer, x, *args, **kwargs)
            for name in names:
                result = result + self.branch(x, name).to(result.dtype)
            return result
        result = merged.codec.forward(merged.module, x, *args, **kwargs)
        for name in names if torch.is_grad_enabled() else ():
            result = result + for_gradients(self.branch(x.detach(), name)).to(result.dtype)
        return result

    def check_held_whole(self) -> None:
        """Raise an AdapterError if the base was sharded after it was adapted: this layer's factors are whole."""
        if is_tensor_parallel(self._modules["base_layer"]):  # type: ignore[arg-type]
            raise AdapterError(
                f"{type(self.base_layer).__name__}: expected a layer adapted after it was shared out to several "
                "processes, found one that was before; call parallelize_module on the model first and apply_lora then "
                "(save_pretrained and LoraModel.from_pretrained bring a trained adapter over)"
            )

    @property
    def _in_effect(self) -> list[str]:
        """Names of the adapters that forward adds."""
        if self.disable_adapters or self.merged_adapters:
            return []
        return [name for name in self.active_adapters if name in self.r]

    def cast_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` in the adapter's dtype; left alone under autocast, which casts for the product itself."""
        kept = autocasts(x) or not self.cast_input_dtype_enabled
        return x if kept else x.to(dtype)

    # -- standing in for the base module -----------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def weight_branch(self, name: str) -> Branch:
        """A (r, in), B (out, r) and the scaling of ``name``, whose product is a term of the weight that is read."""
        return (*self.factors(name), self.scaling[name])

    def _weight_in_effect(self) -> Tensor:
        """The weight that this layer computes with, for who reads it instead of calling; see ``weight_in_effect``."""
        if (rows := rows_of(self)) is not None:
            return weight_by_rows(self, rows)
        names = self._in_effect
        branches = [self.weight_branch(name) for name in names]
        terms = Sum(self.codec, self.base_layer, self.base_layer.weight, branches, self._rescale_)
        if names and (rounding := self.rounding_in_effect(names)) is not None:
            terms.rounded = partial(self.rounded_weight, rounding, names)
        return weight_in_effect(terms)

    @torch.no_grad()
    def _rescale_(self, factor: float) -> None:
        self.base_layer.weight.mul_(factor)
        self._rescaled *= factor
        self.scaling = {name: scale * factor for name, scale in self.scaling.items()}

    def __setattr__(self, attribute: str, value: Any) -> None:
        if attribute in _OWN:
            object.__setattr__(self, attribute, value)
        elif isinstance(value, InEffect) and value.terms.base is vars(self).get("_modules", {}).get("base_layer"):
            pass  # what writing in place gave back
        elif attribute in ("weight", "bias") and "base_layer" in vars(self).get("_modules", {}):
            setattr(self.base_layer, attribute, value)
        elif attribute == "base_layer" and type(value) is not type(self.__dict__["_modules"].get(attribute, value)):
            self._move_to_(value)
        else:
            super().__setattr__(attribute, value)

    @torch.no_grad()
    def _move_to_(self, base: nn.Module) -> None:
        """Stand on ``base``, which holds the same weight in another storage (what transformers' ``dequantize`` puts
        here): by its codec, frozen if the old one was, and with the weight from before ``merge_`` in its storage."""
        old, codec = self.base_layer, find_codec(base)
        if codec is None or codec is self.codec:  # a wrapper around the old one, say
            super().__setattr__("base_layer", base)
            return
        weight = self.merged_weight(()) if self._unmerged is not None else None
        if not any(parameter.requires_grad for parameter in old.parameters()):
            base.requires_grad_(False)
        super().__setattr__("base_layer", base)
        self.codec = codec
        codec.protect_(base)
        if weight is not None:
            merged = codec.snapshot(base)
            codec.write_(base, weight)
            self._unmerged = codec.snapshot(base)
            codec.restore_(base, merged)

    def __getattr__(self, attribute: str) -> Any:
        """Attributes that model code reads off its own modules (weight, bias, in_features, ...)."""
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            # Private names (accelerate's hooks, say) belong to the base module alone.
            if attribute == "base_layer" or attribute.startswith("_"):
                raise
            return self._weight_in_effect() if attribute == "weight" else getattr(self.base_layer, attribute)

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={r}, alpha={self.lora_alpha[name]:g}" for name, r in self.r.items())
        return f"codec={self.codec.name}, {adapters}"
