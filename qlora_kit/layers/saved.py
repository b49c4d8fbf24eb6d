"""Whole modules trained and stored beside the low-rank factors (``modules_to_save``).

The module named stays untouched as ``original_module``; each adapter trains its own copy, and forward goes
to the active adapter's copy, or to the original where none has one. Attribute names are PEFT's.

A copy of half-precision weights is float32, since small updates vanish in a half. It computes in its own dtype, and
what comes before and after it in the model must not notice: floating inputs are widened, and outputs get the dtype that
the original would have given (the inputs', or for a table, whose inputs are whole numbers, its weights'). What autocast
computes in a dtype of its own stays as it comes out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import AdapterError, TargetError
from ..naming import StandIn, base_of, unwrapped
from .by_hand import SwitchedByHand
from .named import NamedModules
from .row_products import call_by_rows, no_one_weight, rows_of
from .rows import Rows
from .weight_in_effect import Sum, computed_later

_HALF = (torch.float16, torch.bfloat16)
_WHOLE = "_dtype_of_whole_copy"


class ModulesToSave(SwitchedByHand, StandIn):
    """``original_module`` and one trainable copy of it for each adapter in ``modules_to_save``.

    The original may be an adapter layer: of other adapters, whose place this is too. Copies are of its base.
    """

    holds = "original_module"
    #: PEFT's names of the attributes that hold what each adapter has.
    adapter_layer_names = ("modules_to_save",)
    other_param_names = ()

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = NamedModules()
        self.tied_to: dict[str, str] = {}  # by adapter, the path of the module whose copy's weight its copy shares
        self.active_adapters: list[str] = []
        self.disable_adapters = False
        self.training = original_module.training

    def add_adapter(
        self, name: str, dtype: torch.dtype | None, path: str = "", *, tied_to: nn.Module | None = None
    ) -> None:
        """Copy the original for adapter ``name``; half-precision weights become ``dtype`` where given.

        Args:
            tied_to: another module's copy, whose weight parameter this copy's is to be.

        Raises:
            TargetError: the module holds quantized weights, which can't be trained.
        """
        base = base_of(self.original_module)
        for key, parameter in base.named_parameters():
            if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
                raise TargetError(
                    f"{path}.{key}: expected a floating-point parameter in modules_to_save, found "
                    f"{parameter.dtype} quantized storage; keep the module out of quantization "
                    "(llm_int8_skip_modules) or adapt it through target_modules"
                )
        tied = {} if tied_to is None else {id(base.weight): tied_to.weight}
        module = copy.deepcopy(base, tied)
        if dtype is not None and any(p.dtype in _HALF for p in module.parameters()):
            module = module.to(dtype)
            for part in module.modules():
                vars(part)[_WHOLE] = dtype
        self.modules_to_save[name] = module

    def delete_adapter(self, name: str) -> None:
        if name in self.modules_to_save:
            del self.modules_to_save[name]
        self.tied_to.pop(name, None)
        self.active_adapters = [n for n in self.active_adapters if n != name]

    def adapter_names(self) -> list[str]:
        return list(self.modules_to_save)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Parameters and buffers of ``name``'s copy by their own names."""
        module = self.modules_to_save[name]
        persistent = set(module.state_dict())
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {key: value for key, value in tensors.items() if key in persistent}

    @property
    def current(self) -> nn.Module:
        """The module that forward goes to; the first of them where rows go to different ones."""
        if (rows := rows_of(self)) is not None:
            return self._of(self._own(rows)[0])
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.modules_to_save:
                    return self.modules_to_save[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (rows := rows_of(self, kwargs)) is not None:
            return call_by_rows(
                self, rows, lambda name, own, named: self._through(self._of(name), own, named), args, kwargs
            )
        return self._through(self.current, args, kwargs)

    def _of(self, name: str) -> nn.Module:
        """The copy of adapter ``name``; the original where it has none."""
        if name in self.modules_to_save:
            return self.modules_to_save[name]
        return self.original_module

    def _own(self, rows: Rows) -> list[str]:
        """The adapters whose copies ``rows`` go to, ``BASE`` for the original."""
        return list(dict.fromkeys(rows.own([] if self.disable_adapters else self.adapter_names())))

    def _through(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``module``, the original or a copy, gives, in the dtypes of the original."""
        expected, own = weights_dtype(base_of(self.original_module)), weights_dtype(module)
        if expected is None or own is None or expected is own:
            return module(*args, **kwargs)
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if _is_floating(leaf)]
        result = inputs[0].dtype if inputs else expected
        args, kwargs = _cast((args, kwargs), {expected, result}, own)
        return _cast(module(*args, **kwargs), {own}, result)

    def __setattr__(self, attribute: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and "original_module" in vars(self).get("_modules", {}):
            setattr(self.current, attribute, value)  # as what is read of it is the current module's
        else:
            super().__setattr__(attribute, value)

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            if attribute in ("original_module", "modules_to_save") or attribute.startswith("_"):
                raise
            found = getattr(self.current, attribute)
            return self._of_all_rows(found) if isinstance(found, nn.Parameter) else found

    def _of_all_rows(self, parameter: nn.Parameter) -> Tensor:
        """``parameter``, or where rows have their own what is like it and can't be computed with."""
        rows = rows_of(self)
        if rows is None or len(self._own(rows)) == 1:
            return parameter
        unknown = Sum(None, self, parameter, (), parameter.mul_, no_one_weight(rows, self))  # type: ignore[arg-type]
        return computed_later(unknown)


class IndexedToSave(ModulesToSave):
    """The same for a module whose parts are read by an index or a name too (``nn.ParameterList``, a ``Sequential`` with
    a forward of its own). Apart, since a module that has a length counts as false where that is 0."""

    @property
    def _one(self) -> nn.Module:
        """The module that parts are taken of.

        Raises:
            AdapterError: rows have different ones.
        """
        rows = rows_of(self)
        if rows is not None and len(self._own(rows)) > 1:
            raise AdapterError(no_one_weight(rows, self))
        return self.current

    def __getitem__(self, key: Any) -> Any:
        return self._one[key]  # type: ignore[index]

    def __len__(self) -> int:
        return len(self.current)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._one)  # type: ignore[call-overload]

    def __contains__(self, key: Any) -> bool:
        return key in self.current  # type: ignore[operator]


def saved_module(module: nn.Module) -> ModulesToSave:
    """``module`` ready for trained copies."""
    kind = IndexedToSave if hasattr(type(base_of(module)), "__getitem__") else ModulesToSave
    return kind(module)


def parts_to_save(module: nn.Module, path: str, *, whole: bool = False) -> Iterator[str]:
    """Where the copies go for ``module`` at ``path`` to be trained whole: there, or where it is only a container, whose
    parts are taken from it by an index, a name or one after the other, at each part that has a state.

    With ``whole`` there too if it can be called: it stands at other places, which its parts would be changed at.
    """
    called = type(module).forward is not nn.Module.forward
    if isinstance(module, StandIn) or not _is_container(module) or (whole and called):
        yield path
        return
    for name, child in module._modules.items():
        if child is not None and base_of(child).state_dict():
            yield from parts_to_save(unwrapped(child), f"{path}.{name}")


def _is_container(module: nn.Module) -> bool:
    forward = type(module).forward
    plain = forward is nn.Module.forward or forward is nn.Sequential.forward
    return plain and bool(module._modules) and not module._parameters and not module._buffers


def weights_dtype(module: nn.Module) -> torch.dtype | None:
    """The floating dtype of ``module``'s parameters, a half where some of them are; None where it has none."""
    found = None
    for parameter in module.parameters():
        if parameter.is_floating_point():
            found = found or parameter.dtype
            if parameter.dtype in _HALF:
                return parameter.dtype
    return found


def whole_copy_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that a trained copy was brought to as a whole, if ``module`` is one or a part of one: what casts within
    the model would cast there has it already, and must keep it."""
    found: torch.dtype | None = vars(module).get(_WHOLE)
    return found


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cast(values: Any, of: set[torch.dtype], dtype: torch.dtype) -> Any:
    """``values`` with their tensors of a dtype in ``of`` brought to ``dtype``, however they are nested."""
    return tree_map(lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.dtype in of else leaf, values)
