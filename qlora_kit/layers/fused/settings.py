"""What a module's forward may depend on beside its children: its attributes, as something to compare and to look up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_BY_IDENTITY = (FunctionType, BuiltinFunctionType, type, Enum)
#: Every module's, and what is set on blocks: not settings.
_OF_ANY_MODULE = frozenset({*vars(nn.Module()), "forward", "_replicate_for_data_parallel", "_is_hf_initialized"})
#: A configuration in a module, a dictionary in it, a list in that.
_DEEPEST = 5


class UnsettledError(Exception):
    """An attribute is of a kind whose changes couldn't be noticed."""


def settled(module: nn.Module) -> Any:
    """The attributes of ``module``, configurations among them looked into, as something hashable.

    Raises:
        UnsettledError: there is a tensor, a module, or something else that can't be looked into.
    """
    return tuple((name, _settled(value, _DEEPEST)) for name, value in _own(module))


def _own(module: nn.Module) -> list[tuple[str, Any]]:
    return [item for item in vars(module).items() if item[0] not in _OF_ANY_MODULE]


def _settled(value: Any, depth: int) -> Any:
    if isinstance(value, _BY_IDENTITY) or type(value) in _SIMPLE:
        return type(value), value  # True isn't 1
    if not depth or isinstance(value, (torch.Tensor, nn.Module)):
        raise UnsettledError
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_settled(item, depth - 1) for item in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_settled(item, depth - 1) for item in value)
    items = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
    if items is None:
        raise UnsettledError
    return type(value), tuple((_settled(key, 1), _settled(item, depth - 1)) for key, item in items.items())


@dataclass(frozen=True)
class Settings:
    """The attributes of a block and its activation when its form was found, themselves: cheap to compare with.

    What is changed inside of one of them, a configuration say, isn't noticed."""

    activation: nn.Module
    of_block: tuple[tuple[str, Any], ...]
    of_activation: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, block: nn.Module, activation: Any) -> Settings:
        return cls(activation, tuple(_own(block)), tuple(_own(activation)))

    def hold(self, block: nn.Module, activation: nn.Module | None) -> bool:
        """Whether they are the same still."""
        same = activation is self.activation and _are(self.of_block, vars(block))
        return same and _are(self.of_activation, vars(activation))


def _are(settings: tuple[tuple[str, Any], ...], found: Mapping[str, Any]) -> bool:
    for name, value in settings:
        now = found.get(name, _MISSING)
        if now is not value and not (type(now) is type(value) and type(value) in _SIMPLE and now == value):
            return False
    return True


_MISSING = object()
