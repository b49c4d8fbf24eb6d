"""Conditions in the source of a module's methods that its settings decide: ``if self.pretraining_tp > 1``.

Models carry code for checkpoints of another kind, for quantized ones, for tensor parallelism. What stands under a
condition that can't come true doesn't count. Only plain values of the module and of its configuration are looked at,
nothing is called; all else isn't known.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from torch import nn

_UNKNOWN = object()
_PLAIN = (bool, int, float, str, type(None))
# Settings that change from one forward to the next.
_STATES = frozenset({"training", "gradient_checkpointing"})
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def decided(test: ast.expr, module: nn.Module) -> bool | None:
    """What ``test`` is in a method of ``module``; None where its settings don't say."""
    value = _value(test, module)
    return None if value is _UNKNOWN or not isinstance(value, _PLAIN) else bool(value)


def _value(node: ast.expr, module: nn.Module) -> Any:
    handler = _HANDLERS.get(type(node))
    return _UNKNOWN if handler is None else handler(node, module)


def _constant(node: Any, module: nn.Module) -> Any:
    return node.value


def _name(node: Any, module: nn.Module) -> Any:
    return module if node.id == "self" else _UNKNOWN


def _attribute(node: Any, module: nn.Module) -> Any:
    return _stored(_value(node.value, module), node.attr)


def _stored(owner: Any, name: str, default: Any = _UNKNOWN) -> Any:
    """What ``owner`` keeps under ``name``, without running any code of its class; configurations and plain values."""
    if owner is _UNKNOWN or not hasattr(owner, "__dict__") or name in _STATES:
        return _UNKNOWN
    found = vars(owner).get(name, _UNKNOWN)
    if found is _UNKNOWN and default is not _UNKNOWN and not hasattr(type(owner), name):
        return default
    return found if isinstance(found, _PLAIN) or hasattr(found, "to_dict") else _UNKNOWN


def _not(node: Any, module: nn.Module) -> Any:
    value = _value(node.operand, module)
    return not value if isinstance(node.op, ast.Not) and value is not _UNKNOWN else _UNKNOWN


def _bool(node: Any, module: nn.Module) -> Any:
    """One that is false settles an ``and``, one that is true an ``or``."""
    values = [decided(value, module) for value in node.values]
    settles = isinstance(node.op, ast.Or)
    if settles in values:
        return settles
    return _UNKNOWN if None in values else not settles


def _compare(node: Any, module: nn.Module) -> Any:
    left, right = _value(node.left, module), _value(node.comparators[0], module)
    if len(node.ops) > 1 or _UNKNOWN in (left, right):
        return _UNKNOWN
    try:
        return _COMPARISONS[type(node.ops[0])](left, right)
    except TypeError:
        return _UNKNOWN


def _call(node: Any, module: nn.Module) -> Any:
    """``hasattr`` and ``getattr`` with a default."""
    name = getattr(node.func, "id", "")
    if name not in ("hasattr", "getattr") or len(node.args) < 2 or not isinstance(node.args[1], ast.Constant):
        return _UNKNOWN
    owner, asked = _value(node.args[0], module), str(node.args[1].value)
    if name == "getattr":
        default = _value(node.args[2], module) if len(node.args) > 2 else _UNKNOWN
        return _stored(owner, asked, default)
    if owner is _UNKNOWN or not hasattr(owner, "__dict__"):
        return _UNKNOWN
    return asked in vars(owner) or hasattr(type(owner), asked)


_HANDLERS: dict[type[ast.expr], Callable[[Any, nn.Module], Any]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    ast.Attribute: _attribute,
    ast.UnaryOp: _not,
    ast.BoolOp: _bool,
    ast.Compare: _compare,
    ast.Call: _call,
}
