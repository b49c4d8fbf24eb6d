"""Objects that pass for another library's in ``isinstance``, though neither inherits from the other.

Where an object's type doesn't answer, Python asks the object's ``__class__``, and looks for the type in question in
the method resolution order of what it is given. So a ``__class__`` property may give a class that is made for this
alone: its order names all the types that the object stands for. Nothing is inherited, no order has to be consistent
(as that of a transformers model and a PEFT model couldn't be), the other library isn't changed, and ``type(object)``
is what it was.

Such a class is called as the type that it is named after, since ``copy`` and ``dataclasses`` make objects by
``__class__``.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any


class _Standing(type):
    """The type of classes made by ``standing_for``."""

    stands_for: tuple[type, ...]

    def mro(cls) -> list[type]:
        if "stands_for" not in cls.__dict__:  # a subclass that another library makes of one
            return super().mro()
        orders = [kind.__mro__ for kind in cls.__dict__["stands_for"]]
        return [cls, *dict.fromkeys(kind for order in orders for kind in order if kind is not object), object]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.stands_for[0](*args, **kwargs)


@cache
def in_place_of(kind: type, shown: type, own: type) -> type:
    """``kind``, which a library made on the class ``shown`` that an object passes for, on ``own``, its type.

    So the object gets what the library put before its class, and remains what it is below. Where ``kind`` is not a
    subclass of ``shown`` it is given back as it is.
    """
    if shown is own or shown not in kind.__mro__[1:]:
        return kind
    bases = tuple(own if base is shown else in_place_of(base, shown, own) for base in kind.__bases__)
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, bases, body)


def standing_for(*kinds: type) -> type:
    """A class, always the same, that passes for a subclass of all ``kinds``; named after the first and called as it."""
    return _made(kinds)


@cache
def _made(kinds: tuple[type, ...]) -> type:
    first = kinds[0]
    names = {"__module__": first.__module__, "__qualname__": first.__qualname__, "__doc__": first.__doc__}
    return _Standing(first.__name__, (), {**names, "stands_for": kinds})


def loaded(library: str, name: str) -> type | None:
    """The type ``name`` of ``library`` if that has been imported by someone."""
    found = getattr(sys.modules.get(library), name, None)
    return found if isinstance(found, type) else None


def blank(kind: type) -> Any:
    """An object of ``kind`` without anything in it, for ``__reduce__``: pickle's own way goes by ``__class__``."""
    made: Any = kind
    return made.__new__(made)
