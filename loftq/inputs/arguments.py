"""What a module is called with, copied, so that it can be called again with the same; and what a call did to it.

Modules work in place: on the tensors that they are given, on lists and dictionaries that go from block to block, on
caches that their model makes in every forward. So each call gets copies of its own, and what the one call that counts
has done to these is done to the originals when the forward goes on: layers after it find there what they would have
found without the walk, once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Copies:
    """Copies of ``arguments``; what is there under two names is one thing in the copies too.

    Args:
        shared: what stays itself, by ``id``: modules, their weights and configurations.

    Attributes:
        arguments: the copies.
    """

    def __init__(self, arguments: Any, shared: Mapping[int, Any]) -> None:
        self._memo: dict[int, Any] = dict(shared)
        # Original, copy, and where that is a list or a dictionary what it held at first.
        self._made: list[tuple[Any, Any, Any]] = []
        self.arguments = self._of(arguments)

    def _of(self, value: Any) -> Any:
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, tuple):
            parts = [self._of(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, Tensor):
            return self._note(value, value.clone())
        if type(value) is list:
            made = [self._of(part) for part in value]
            return self._note(value, made, list(made))
        if type(value) is dict:
            found = {key: self._of(part) for key, part in value.items()}
            return self._note(value, found, dict(found))
        try:
            made = copy.deepcopy(value, self._memo)
        except Exception:  # whatever it raises: what can't be copied, a generator say, is handed on as it is
            made = value
        return made if made is value else self._note(value, made)

    def _note(self, value: Any, made: Any, held: Any = None) -> Any:
        self._memo[id(value)] = made
        self._made.append((value, made, held))
        return made

    def changes(self) -> Changes:
        """What the call, which is over, has done to its copies."""
        return Changes([(value, made) for value, made, held in self._made if _touched(made, held)])


class Changes:
    """What a call has done in place; empty at first."""

    def __init__(self, pairs: list[tuple[Any, Any]] | None = None) -> None:
        self._pairs = pairs or []

    def settle(self, output: Any) -> Any:
        """Do it to the originals; ``output`` of that call, with the originals where it gives copies back."""
        originals = {id(made): value for value, made in self._pairs if not isinstance(made, Tensor)}
        for value, made in self._pairs:
            if isinstance(made, Tensor):
                value.copy_(made)
            elif type(made) is list:
                value[:] = [originals.get(id(part), part) for part in made]
            elif type(made) is dict:
                value.clear()
                value.update({key: originals.get(id(part), part) for key, part in made.items()})
            else:
                _become(value, made)
        return _replaced(output, originals) if originals else output


def _touched(made: Any, held: Any) -> bool:
    if isinstance(made, Tensor):
        return not made.is_inference() and made._version > 0
    if type(made) is list:
        return len(made) != len(held) or any(a is not b for a, b in zip(made, held, strict=True))
    if type(made) is dict:
        return list(made) != list(held) or any(made[key] is not held[key] for key in held)
    return True  # there is no telling


def _become(value: Any, made: Any) -> None:
    """Take over all that ``made``, an object of the same type, holds."""
    if isinstance(value, list):
        value[:] = made
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(made)
    if hasattr(value, "__dict__"):
        vars(value).clear()
        vars(value).update(vars(made))


def _replaced(output: Any, originals: Mapping[int, Any]) -> Any:
    if id(output) in originals:
        return originals[id(output)]
    if type(output) is tuple:
        return tuple(_replaced(part, originals) for part in output)
    return output
