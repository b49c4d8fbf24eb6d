"""How the methods of a class use the modules that it holds, from their source: who is called, whose weight is read.

    self.dt_proj.weight @ x                       the matrix of dt_proj is read past it
    x.to(self.wo.weight.dtype)                    the dtype of wo's weight is
    self.wo(x)                                    wo is called
    for block in self.blocks:
        block.attention.output.weight.div_(2)     the matrix of blocks.*.attention.output is

Names that are given to modules and weights are followed, loops over lists of modules too, ``getattr`` with a name, and
functions that are handed a module. What can't be followed isn't seen: a weight that is passed on in a container, code
without source. Nothing is imported or run, so it does as well for a model on the meta device. A class is read once; of
most no source is looked at, since their compiled methods have no word of weights.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from .conditions import decided

#: A path of attributes from the module; "*" for any child of a list.
Path = tuple[str, ...]

# What few bits change of a weight, besides its values: they are stored as integers in another shape.
_FORM = frozenset({"dtype", "shape", "size", "ndim", "dim", "numel", "element_size", "itemsize", "nbytes"})
# What they don't change, or is asked with them in mind.
_PLACE = frozenset({"device", "get_device"})
_HARMLESS = frozenset({"is_cuda", "is_meta", "requires_grad", "grad", "SCB", "CB", "quant_state", "bnb_quantized"})
_QUESTIONS = frozenset({"isinstance", "hasattr", "id", "type", "len", "callable"})
# Methods that make, start, tie, store and clip weights, and compute nothing.
_ASIDE = ("__init__", "_init", "init_", "reset_", "tie_", "_tie", "resize_", "_resize", "load_", "_load", "save_")
_CLIPS = "clip_"  # what an optimizer did
# Code below the parent's: a function that is handed a module, one that this hands it to, and one more.
_DEPTH = 3


@dataclass(frozen=True)
class Use:
    """One place in the source.

    Attributes:
        conditions: what it stands under, with whether that is to be true.
        returned_by: the method that only hands on what it looks at; what it is for is with who calls that.
    """

    conditions: tuple[tuple[ast.expr, bool], ...] = ()
    returned_by: str | None = None

    def happens(self, module: nn.Module) -> bool:
        """Whether it may in a forward of ``module``, by its settings."""
        return all(decided(test, module) in (wanted, None) for test, wanted in self.conditions)


@dataclass
class Uses:
    """What methods do with the modules below their own, by path.

    Attributes:
        values: they work with the matrix. writes: in place. forms: they ask its dtype, shape. places: its device.
        calls: they call the module.
        complete: whether all methods have a source.
    """

    values: dict[Path, list[Use]] = field(default_factory=dict)
    writes: dict[Path, list[Use]] = field(default_factory=dict)
    forms: dict[Path, list[Use]] = field(default_factory=dict)
    places: dict[Path, list[Use]] = field(default_factory=dict)
    calls: dict[Path, list[Use]] = field(default_factory=dict)
    complete: bool = True


def reads_of(module: nn.Module) -> Uses:
    """What the methods of ``module`` do with the modules that it holds; nothing where none reads a weight."""
    kind: Any = type(module)
    return _read(kind, _forward_of(module), True)


def calls_of(module: nn.Module) -> Uses:
    """As ``reads_of``, also where none reads a weight."""
    kind: Any = type(module)
    return _read(kind, _forward_of(module), False)


@cache
def names_in(kind: Any) -> frozenset[str]:
    """All names of attributes in the methods of ``kind``."""
    return frozenset(name for method in _methods(kind) for name in _names(method.__code__))


def _forward_of(module: nn.Module) -> FunctionType | None:
    """The forward of this instance or its class, behind what hooks have put around it."""
    forward = inspect.unwrap(vars(module).get("forward", type(module).forward))
    forward = getattr(forward, "__func__", forward)
    return forward if isinstance(forward, FunctionType) else None


@cache
def _read(kind: Any, forward: FunctionType | None, if_reading: bool) -> Uses:
    found, methods = Uses(), list(_methods(kind))
    if forward is not None and forward not in methods:  # set on the instance, in the place of its class's
        methods = [forward, *(method for method in methods if method.__name__ != "forward")]
    if not if_reading or any(map(_reads_weights, methods)):
        for method in methods:
            _Reader(found, kind, method, {"self": ()}).read()
    return found


def _methods(kind: type) -> Iterator[FunctionType]:
    """The methods that objects of ``kind`` have, those that are overridden where the overriding one calls them, less
    those that compute nothing; what every module or every model of transformers has knows no child by name."""
    seen: set[str] = set()
    for above in kind.__mro__:
        module = above.__module__
        if above in (nn.Module, object) or (module.startswith("transformers.") and ".models." not in module):
            continue
        for name, value in vars(above).items():
            value = getattr(value, "fget", None) or getattr(value, "func", None) or value
            method = inspect.unwrap(value) if callable(value) else None
            if isinstance(method, FunctionType) and name not in seen and not name.startswith((*_ASIDE, _CLIPS)):
                yield method
            if not isinstance(method, FunctionType) or "super" not in method.__code__.co_names:
                seen.add(name)


def _reads_weights(function: FunctionType) -> bool:
    """Whether ``function``, or one that it calls by name, has the word "weight"; a look at its compiled code."""
    names = set(_names(function.__code__))
    if "weight" in names:
        return True
    found = [function.__globals__.get(name) for name in names]
    found += [vars(module).get(name) for module in found if isinstance(module, ModuleType) for name in names]
    return any(isinstance(other, FunctionType) and "weight" in set(_names(other.__code__)) for other in found)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant


@cache
def _parsed(function: FunctionType) -> ast.FunctionDef | None:
    """The source of ``function``; None where there is none, or it isn't that of one function."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    node = tree.body[0] if tree.body else None
    return node if isinstance(node, ast.FunctionDef) else None


@cache
def _gives_back(function: FunctionType) -> bool:
    """Whether ``function`` returns its first argument, and nothing else: one that is there for its types, say."""
    node = _parsed(function)
    returned = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return)] if node else []
    return bool(returned) and {getattr(value, "id", None) for value in returned} == {*function.__code__.co_varnames[:1]}


class _Reader:
    """Reads one function.

    Args:
        found: takes what is seen.
        kind: the class whose methods are read.
        known: which names are which modules.
        under: the conditions of the call that led here.
        depth: how far functions that are handed a module are followed.
    """

    def __init__(
        self,
        found: Uses,
        kind: type,
        function: FunctionType,
        known: Mapping[str, Path],
        under: Use = Use(),
        depth: int = _DEPTH,
    ) -> None:
        self.found, self.kind, self.function, self.under, self.depth = found, kind, function, under, depth
        self.known = dict(known)
        self.above: dict[ast.AST, ast.AST] = {}

    def read(self) -> None:
        node = _parsed(self.function)
        if node is None:
            self.found.complete = False
            return
        # Names first, twice for those of names further down in a loop: an order of statements isn't followed.
        for _ in range(2):
            for inner in ast.walk(node):
                self._learn(inner)
        self.above = {child: parent for parent in ast.walk(node) for child in ast.iter_child_nodes(parent)}
        for inner in ast.walk(node):
            self._note(inner)

    def path_of(self, node: ast.AST | None) -> Path | None:
        """Which module or weight ``node`` is; None if it is something else."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            return _below(self.path_of(node.value), node.attr)
        if isinstance(node, ast.Subscript):
            index = node.slice.value if isinstance(node.slice, ast.Constant) else None
            known = isinstance(index, str) or (isinstance(index, int) and index >= 0)
            path = self.path_of(node.value)
            return None if _is_weight(path) else _below(path, str(index) if known else "*")
        if isinstance(node, ast.Call):
            name, values = _call(node)
            if name == "getattr" and len(values) > 1 and isinstance(values[1], ast.Constant):
                return _below(self.path_of(values[0]), str(values[1].value))
            if values and (path := self.path_of(values[0])) is not None:
                function, bound = self._called(node.func)
                return path if not bound and isinstance(function, FunctionType) and _gives_back(function) else None
        return None

    def _learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            self._name(node.targets[0], node.value)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
            self._name(node.target, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            self._name_each(node.target, node.iter)

    def _name(self, target: ast.AST, value: ast.AST | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=False):
                self._name(one, its)
        elif isinstance(target, ast.Name) and (path := self.path_of(value)) is not None:
            self.known[target.id] = path

    def _name_each(self, target: ast.AST, over: ast.AST) -> None:
        """In ``for target in over``, where that is a list of modules, or several at a time."""
        name, values = _call(over)
        if name == "enumerate" and isinstance(target, ast.Tuple) and values:
            self._name_each(target.elts[-1], values[0])
        elif name == "zip" and isinstance(target, ast.Tuple):
            for one, its in zip(target.elts, values, strict=False):
                self._name_each(one, its)
        elif name == "reversed" and values:
            self._name_each(target, values[0])
        elif name in ("values", "children") and isinstance(over, ast.Call) and isinstance(over.func, ast.Attribute):
            self._name_each(target, over.func.value)
        elif name == "items" and isinstance(over.func, ast.Attribute) and isinstance(target, ast.Tuple):  # type: ignore[attr-defined]
            self._name_each(target.elts[-1], over.func.value)  # type: ignore[attr-defined]
        elif isinstance(target, ast.Name) and (path := _below(self.path_of(over), "*")) is not None:
            self.known[target.id] = path

    def _note(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            if (path := self.path_of(node.func)) and not _is_weight(path):
                self.found.calls.setdefault(path, []).append(self._use(node))
            self._follow(node)
        path = self.path_of(node) if isinstance(node, (ast.Attribute, ast.Name, ast.Call)) else None
        if path is not None and _is_weight(path):
            for uses in self._uses(node, self.above.get(node)):
                uses.setdefault(path[:-1], []).append(self._use(node))

    def _use(self, node: ast.AST) -> Use:
        """The conditions that ``node`` stands under in this function, and those that led to it."""
        conditions, asked = list(self.under.conditions), self.above.get(node)
        returned = isinstance(asked, ast.Attribute) and isinstance(self.above.get(asked), ast.Return)
        while (parent := self.above.get(node)) is not None:
            if isinstance(parent, (ast.If, ast.IfExp)) and node is not parent.test:
                body = parent.body if isinstance(parent.body, list) else [parent.body]
                conditions.append((parent.test, node in body))
            node = parent
        return Use(tuple(conditions), self.function.__name__ if returned else None)

    def _uses(self, node: ast.AST, parent: ast.AST | None) -> list[dict[Path, list[Use]]]:
        """Where it is noted what is done to a weight, which is ``node``; nowhere if it is nothing that matters."""
        name, values = _call(parent)
        if isinstance(parent, ast.Attribute):
            return self._uses_of(parent.attr)
        if name == "getattr" and len(values) > 1:
            return self._uses_of(str(getattr(values[1], "value", "")))
        named = parent.targets[0] if isinstance(parent, ast.Assign) else getattr(parent, "target", None)
        if isinstance(named, ast.Name):  # whose uses count
            return []
        identity = isinstance(parent, ast.Compare) and all(isinstance(o, (ast.Is, ast.IsNot)) for o in parent.ops)
        stored = isinstance(getattr(node, "ctx", None), ast.Store)
        return [] if identity or stored or name in _QUESTIONS else [self.found.values]

    def _uses_of(self, attribute: str) -> list[dict[Path, list[Use]]]:
        if attribute in _HARMLESS or attribute.startswith("_is_"):
            return []
        if attribute in (*_FORM, *_PLACE):
            return [self.found.forms if attribute in _FORM else self.found.places]
        in_place = attribute.endswith("_") and not attribute.endswith("__")
        return [self.found.values, self.found.writes] if in_place else [self.found.values]

    def _follow(self, call: ast.Call) -> None:
        """Read a function or method that is handed a module, or this one itself."""
        handed = {n: p for n, value in enumerate(call.args) if (p := self.path_of(value)) is not None}
        named = {k.arg: p for k in call.keywords if k.arg and (p := self.path_of(k.value)) is not None}
        if not self.depth or not (handed or named):
            return
        function, bound = self._called(call.func)
        if not isinstance(function, FunctionType):
            return
        names = function.__code__.co_varnames[bound : function.__code__.co_argcount]
        known = {names[n]: path for n, path in handed.items() if n < len(names)} | named
        own = {"self": ()} if bound else {}
        _Reader(self.found, self.kind, function, {**own, **known}, self._use(call), self.depth - 1).read()

    def _called(self, node: ast.expr) -> tuple[Any, int]:
        """The function that ``node`` names: of this file, of a library, of the class; whether it is bound to self."""
        scope = self.function.__globals__
        if isinstance(node, ast.Name):
            return inspect.unwrap(found) if callable(found := scope.get(node.id)) else None, 0
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            return None, 0
        if self.known.get(node.value.id) == ():
            method = inspect.getattr_static(self.kind, node.attr, None)
            bound = not isinstance(method, staticmethod)
            return inspect.unwrap(method) if callable(method) else None, int(bound)
        owner = scope.get(node.value.id)
        found = vars(owner).get(node.attr) if isinstance(owner, ModuleType) else None
        return inspect.unwrap(found) if callable(found) else None, 0


def _call(node: ast.AST | None) -> tuple[str, list[ast.expr]]:
    """The last name of what ``node`` calls, and its arguments."""
    if not isinstance(node, ast.Call):
        return "", []
    return getattr(node.func, "id", getattr(node.func, "attr", "")), node.args


def _below(path: Path | None, name: str) -> Path | None:
    return None if path is None or _is_weight(path) else (*path, name)


def _is_weight(path: Path | None) -> bool:
    return bool(path) and path[-1] == "weight"  # type: ignore[index]


def _harmless(attribute: str) -> bool:
    return attribute in _HARMLESS or attribute.startswith("_is_")
