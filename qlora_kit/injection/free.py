"""Whether modules are free for another adapter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import AdapterError
from ..layers import AdapterLayer, ModulesToSave
from ..naming import base_of, canonical, module_at


def check_free(model: nn.Module, adapted: Sequence[str], saved: Sequence[str], name: str) -> None:
    """Refuse to write over an adapter that is there already, of this name or trained whole.

    Args:
        adapted: paths of the modules that get a branch of adapter ``name``. saved: of those that it trains whole.

    Raises:
        AdapterError: names the module, and whose it is.
    """
    modules = {path: module_at(model, path) for path in (*adapted, *saved)}
    for path in adapted:
        if isinstance(whole := modules[path], ModulesToSave):
            raise AdapterError(
                f"{path}: expected a module that is free to be adapted by {name!r}, found one that is trained "
                f"whole (modules_to_save) by {whole.adapter_names()}; leave it out of one of the configurations"
            )
    for path in saved:
        for inner, part in base_of(modules[path]).named_modules():
            if isinstance(part, (AdapterLayer, ModulesToSave)):
                raise AdapterError(
                    f"{path}: expected a module without adapters inside, to be copied and trained whole by {name!r}, "
                    f"found {part.adapter_names()} at {path}.{canonical(inner)}; name in modules_to_save the parts of "
                    "it that no adapter has, or delete those adapters first"
                )
    for path, module in modules.items():
        if isinstance(module, (AdapterLayer, ModulesToSave)) and name in module.adapter_names():
            raise AdapterError(
                f"{path}: expected no adapter {name!r} yet, found one that an earlier wrapper of this model put "
                "there; go on with that wrapper, unload() it first, or choose another name"
            )
