"""From a module's type to the layer family that fits it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..codecs.registry import load_on_demand
from ..errors import UnsupportedModuleError
from .base import AdapterLayer
from .sharded.sharded import ShardedLayer
from .sharded.sharding import sharding_of

_registry: dict[type[nn.Module], type[AdapterLayer]] = {}
# By the family of a type, the one for modules of it that are shared out to several processes.
_sharded: dict[type[AdapterLayer], type[AdapterLayer]] = {}
#: By the name of an optional library, the module that registers families for its types, imported at need.
on_demand: dict[str, str] = {}


def register_layer(*types: type[nn.Module]) -> Callable[[type[AdapterLayer]], type[AdapterLayer]]:
    """Class decorator: adapt modules of ``types`` with this family. A later registration replaces an earlier."""

    def register(family: type[AdapterLayer]) -> type[AdapterLayer]:
        for kind in types:
            _registry[kind] = family
        return family

    return register


def register_sharded(family: type[AdapterLayer]) -> Callable[[type[AdapterLayer]], type[AdapterLayer]]:
    """Class decorator: where modules of ``family`` are sharded (``sharded.sharding``), adapt them with this one."""

    def register(sharded: type[AdapterLayer]) -> type[AdapterLayer]:
        _sharded[family] = sharded
        return sharded

    return register


def find_layer_family(module: nn.Module) -> type[AdapterLayer] | None:
    """The layer family of ``module``'s type, most specific registration first, or None. Of a module that is sharded it
    is the one for that, or none."""
    kind = type(module)
    load_on_demand(kind, on_demand)
    family = next((_registry[base] for base in kind.__mro__ if base in _registry), None)
    if family is None or issubclass(family, ShardedLayer):
        return family
    try:
        return family if sharding_of(module) is None else _sharded.get(family)
    except UnsupportedModuleError:
        return None


def layer_family_for(module: nn.Module, path: str = "") -> type[AdapterLayer]:
    """The layer family of ``module``'s type.

    Raises:
        UnsupportedModuleError: none is registered for it, or it is shared out in a way that none can follow; names
            ``path`` and the type.
    """
    family = find_layer_family(module)
    if family is None:
        try:
            sharding_of(module)
        except UnsupportedModuleError as error:
            raise UnsupportedModuleError(f"{path or 'module'}: {error}") from error
        raise UnsupportedModuleError(
            f"{path or 'module'}: expected a module type that can be adapted "
            f"({', '.join(sorted(kind.__name__ for kind in _registry))}), found "
            f"{type(module).__module__}.{type(module).__qualname__}; leave it out of the targets or register "
            "a family with qlora_kit.layers.register_layer"
        )
    return family
