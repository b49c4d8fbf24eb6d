"""A live model by the names that its user knows, whatever has been wrapped around its parts.

torch.compile, activation checkpointing, FSDP and DDP put a wrapper in a module's place and hold the module under a
name of their own; adapter layers put themselves there too. A file that says ``layers.0._orig_mod.q_proj`` loads
nowhere else, and a target that doesn't see through a wrapper matches nothing. So a path is *canonical* here: as if no
wrapper stood in it. ``Tree`` maps a model once; all that chooses, saves, loads or merges modules asks it.

A ``StandIn`` (an adapter layer, a trained copy) counts as the one module that it stands for, and isn't entered: a
second adapter finds exactly the names that the first one did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import Any, ClassVar, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .suffixes import Suffixes
from .variants import Variants

T = TypeVar("T")

# Names under which torch's wrappers hold what they wrap; DDP's "module" is too common a name to be told by itself.
_HELD_AS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Closed(nn.Module):
    """A module whose children are how it computes, and none of the user's modules: only ``parts`` are entered."""

    #: Names of children that are modules to be chosen by their paths.
    parts: tuple[str, ...] = ()


class StandIn(Closed):
    """A module that took another's place in the tree and stands for it under its name; one may stand for another."""

    #: The attribute that holds what it stands for.
    holds: ClassVar[str]


def canonical(name: str) -> str:
    """``name``, a path or a key of a state dict, as if no wrapper stood in it."""
    if "._" not in name and name[:1] != "_":
        return name
    return ".".join(part for part in name.split(".") if part not in _HELD_AS)


def held_as(module: nn.Module) -> str | None:
    """The attribute under which a wrapper holds what it wraps; None where ``module`` is none."""
    held = module._modules
    if not held:
        return None
    for name in _HELD_AS:
        if name in held:
            return name
    return "module" if _is_parallel(type(module)) else None  # type: ignore[arg-type]


@cache
def _is_parallel(kind: type[nn.Module]) -> bool:
    return issubclass(kind, (DistributedDataParallel, DataParallel))


def unwrapped(module: nn.Module) -> nn.Module:
    """What ``module`` wraps, or itself."""
    while (name := held_as(module)) is not None:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def chain(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` without wrappers, what it stands for, what that stands for, down to the user's own module."""
    module = unwrapped(module)
    yield module
    while isinstance(module, StandIn):
        module = unwrapped(module._modules[module.holds])  # type: ignore[arg-type]
        yield module


def base_of(module: nn.Module) -> nn.Module:
    """The user's own module behind wrappers, adapter layers and saved copies."""
    *_, base = chain(module)
    return base


def module_at(model: nn.Module, path: str) -> Any:
    """The module at ``path`` of a live model, inside wrappers; a stand-in as it is.

    Raises:
        AttributeError: there is none.
    """
    module = unwrapped(model)
    for name in canonical(path).split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            raise AttributeError(f"{path}: {type(module).__name__} has no module {name!r}")
        module = unwrapped(child)
    return module


def slot(model: nn.Module, path: str, of: nn.Module | None = None) -> tuple[nn.Module, str]:
    """The module that holds the one at ``path``, and under which attribute: its parent, or its innermost wrapper; of a
    chain of stand-ins there the outermost's, or that of the link ``of``."""
    parent, _, name = canonical(path).rpartition(".")
    holder: nn.Module = module_at(model, parent)
    while True:
        child: Any = holder._modules[name]
        inner = held_as(child)
        if inner is None and of is not None and child is not of and isinstance(child, StandIn):
            inner = child.holds
        if inner is None:
            return holder, name
        holder, name = child, inner


def every_module(model: nn.Module) -> list[nn.Module]:
    """All modules of ``model``, inside wrappers and stand-ins too, each once and in no order: ``model.modules()`` in a
    third of the time."""
    found, waiting = {id(model): model}, [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


class Tree:
    """The modules of ``model`` by canonical path, as they are now.

    Attributes:
        model: as it was given.
        modules: every path of the user's model with what is there, root first; a module that stands at several paths
            comes at each.
        paths: all paths where each module is, or a stand-in for it, by its id.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self.paths: dict[int, list[str]] = {}
        self._first: dict[int, str] = {}
        self._answers: dict[Callable[[Tree], Any], Any] = {}
        for path, module in _walk(model, ""):
            self.modules[path] = module
            self._first.setdefault(id(module), path)
            # Each link with a list of its own: the base may stand elsewhere by itself.
            for link in chain(module) if isinstance(module, StandIn) else (module,):
                self.paths.setdefault(id(link), []).append(path)

    @cached_property
    def _variants(self) -> Variants:
        return Variants(unwrapped(self.model))

    @classmethod
    def of(cls, model: nn.Module | Tree) -> Tree:
        """``model``'s tree; a tree as it is."""
        return model if isinstance(model, Tree) else cls(model)

    def once(self, question: Callable[[Tree], T]) -> T:
        """What ``question`` finds in this tree, looked for the first time that it is asked.

        An answer holds names and numbers, no tree and no modules: one that did would keep them all until the garbage
        collector comes by.
        """
        if question not in self._answers:
            self._answers[question] = question(self)
        return self._answers[question]

    @cached_property
    def names(self) -> Suffixes:
        """The paths by all names that mean them, the root's left out."""
        return Suffixes(path for path in self.modules if path)

    def paths_of(self, module: nn.Module) -> list[str]:
        """All paths where ``module``, or a stand-in for it, is."""
        return self.paths.get(id(module), [])

    def first(self, path: str) -> str:
        """The first path of what stands at ``path``."""
        return self._first[id(self.modules[path])]

    def firsts(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) for each module once, at its first path."""
        return ((path, module) for path, module in self.modules.items() if self._first[id(module)] == path)

    def path_of(self, name: str) -> str | None:
        """The path of what a file calls ``name``: under wrappers, in an older release, or with another prefix."""
        name = canonical(name)
        if name in self.modules:
            return name
        variants = [*self._variants(name), name.removeprefix("module.")]
        return next((found for found in variants if found in self.modules), None)


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    yield path, module
    for name, child in module._modules.items():
        if child is not None and (not isinstance(module, Closed) or name in module.parts):
            yield from _walk(child, f"{path}.{name}" if path else name)
