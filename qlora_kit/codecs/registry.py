"""From a module to its codec: by the module's type, and by what the codec says of the module itself.

A registration stands for a type and its subclasses: it is searched for along the method resolution order, so the most
specific one wins and a user's entry replaces a built-in one. It never looks at a flag of the model: a 4-bit linear is
found as such in any module tree. The codec found then says whether it holds this module's matrix
(``Codec.reason_against``); a subclass or an instance that keeps something else has no codec until one is registered for
its type. Codecs of optional libraries register when a module of that library is first met, which keeps
``import qlora_kit`` light.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import UnsupportedModuleError
from .base import Codec
from .shards.view import is_tensor_parallel, shard_codec

_registry: dict[type[nn.Module], Codec] = {}
# The first type with a codec along each type's method resolution order, once it was looked for.
_found: dict[type[nn.Module], type[nn.Module] | None] = {}
#: By the name of an optional library, the module that registers codecs for its types, imported at need.
on_demand: dict[str, str] = {}


def register_codec(*types: type[nn.Module]) -> Callable[[type[Codec]], type[Codec]]:
    """Class decorator: store modules of ``types`` through this codec; the latest registration wins."""

    def register(codec: type[Codec]) -> type[Codec]:
        instance = codec()
        for kind in types:
            _registry[kind] = instance
        _found.clear()
        return codec

    return register


def load_on_demand(kind: type, table: dict[str, str]) -> None:
    """Import the handlers of the optional libraries that ``kind`` or its bases come from, and have a module that knows
    types by their names alone, in a function ``meet``, look at it."""
    for root in {base.__module__.partition(".")[0] for base in kind.__mro__}:
        if root in table and (meet := getattr(importlib.import_module(table[root]), "meet", None)) is not None:
            meet(kind)


def registered_type(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The type whose codec stands for ``kind``: itself, or the nearest of its bases that has one."""
    if kind not in _found:
        load_on_demand(kind, on_demand)
        _found[kind] = next((base for base in kind.__mro__ if base in _registry), None)
    return _found[kind]


def registered_codec(module: nn.Module) -> Codec | None:
    """The codec of ``module``'s type, whether or not it holds the matrix of this module: for counting and protecting
    what is stored."""
    kind = registered_type(type(module))
    codec = None if kind is None else _registry.get(kind)
    return codec if codec is None or not is_tensor_parallel(module) else shard_codec(codec)


def find_codec(module: nn.Module) -> Codec | None:
    """The codec of ``module``'s type; None without one, or if that says that it doesn't hold this module's matrix."""
    codec = registered_codec(module)
    return None if codec is None or codec.reason_against(module) is not None else codec


def codec_for(module: nn.Module, path: str = "") -> Codec:
    """The codec of ``module``'s type.

    Raises:
        UnsupportedModuleError: none is registered for it, or it doesn't hold this module's matrix; names ``path``, the
            type and the reason.
    """
    codec = registered_codec(module)
    reason = None if codec is None else codec.reason_against(module)
    if codec is None or reason is not None:
        expected = "a module type with a registered codec" if codec is None else "a weight that is the module's matrix"
        raise UnsupportedModuleError(
            f"{path or 'module'}: expected {expected}, found {type(module).__module__}.{type(module).__qualname__}"
            f"{'' if reason is None else f' ({reason})'}; leave it out of the targets or register a codec with "
            "qlora_kit.codecs.register_codec"
        )
    return codec


def protect_storage_(root: nn.Module) -> None:
    """Keep the platform from rewriting any stored weight under ``root``; idempotent."""
    for module in root.modules():
        codec = registered_codec(module)
        if codec is not None:
            codec.protect_(module)


@contextmanager
def shielded_storage(root: nn.Module) -> Iterator[None]:
    """Keep packed weights under ``root`` bit for bit through a ``.to(dtype)`` or ``_apply`` inside the block.

    Packed codes may be stored in a tensor that calls itself bfloat16 or float32 (so that sharding libraries
    accept it); a cast would convert those bits as if they were numbers.
    """
    shielded: list[tuple[Codec, nn.Module, Any]] = []
    try:
        for module in root.modules():
            codec = registered_codec(module)
            token = None if codec is None else codec.shield_(module)
            if codec is not None and token is not None:
                shielded.append((codec, module, token))
        yield
    finally:
        for codec, module, token in shielded:
            codec.unshield_(module, token)
