"""Run something when a library is imported, if ever, without importing it: for registrations with that library.

``import qlora_kit`` has to stay light, and yet a packed model has to load by ``AutoModelForCausalLM.from_pretrained``
alone. So a finder waits in ``sys.meta_path`` for the one module of transformers that holds its registry, lets it
be imported as ever, and then imports ours that registers. It goes away once it has done so, and not before: that a
module is looked for, to see whether it is installed, doesn't mean that it is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def import_after(awaited: str, ours: str) -> None:
    """Import module ``ours`` right after module ``awaited`` is; now if it is there already."""
    if awaited in sys.modules:
        importlib.import_module(ours)
    else:
        sys.meta_path.insert(0, _Waiting(awaited, ours))


class _Waiting(importlib.abc.MetaPathFinder):
    def __init__(self, awaited: str, ours: str) -> None:
        self.awaited, self.ours = awaited, ours
        self.asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.awaited or self.asking:
            return None
        self.asking = True  # others may wait for the same module, and ask in turn
        try:
            others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
            spec = next((found for found in others if found is not None), None)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Following(spec.loader, self)
        return spec


class _Following(importlib.abc.Loader):
    """The module's own loader, and our import after it."""

    def __init__(self, loader: importlib.abc.Loader, waiting: _Waiting) -> None:
        self.loader, self.waiting = loader, waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["loader"], name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        if self.waiting in sys.meta_path:
            sys.meta_path.remove(self.waiting)
            importlib.import_module(self.waiting.ours)
