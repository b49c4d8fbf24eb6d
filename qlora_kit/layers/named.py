"""Containers of what each adapter has, by the adapter's name, whatever that name is.

torch's own keep their entries as attributes, so they refuse "train", "keys", "type" and every other name of a module's
attribute. Here an entry lies in torch's table of children or parameters and nowhere else: attributes stay what
they are, and state dicts, moves between devices and copies, which read these tables, find it under its plain name. Only
names that torch itself assigns to on every module (``RESERVED``) can't be had: it would find the entry in its way.
"""

from __future__ import annotations

from torch import Tensor, nn


class NamedModules(nn.ModuleDict):
    """A module for each name."""

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module


class NamedParameters(nn.ParameterDict):
    """A parameter for each name."""

    def __setitem__(self, name: str, parameter: Tensor) -> None:
        self._keys[name] = None
        self._parameters[name] = parameter if isinstance(parameter, nn.Parameter) else nn.Parameter(parameter)

    def __getitem__(self, name: str) -> Tensor:
        # In a replica of DataParallel's, plain tensors stand as attributes in the parameters' place.
        replica = name in self._keys and name not in self._parameters
        return (vars(self) if replica else self._parameters)[name]  # type: ignore[return-value]


#: What lies in a container's own ``__dict__``: "training", and torch's private tables.
RESERVED = frozenset(vars(NamedParameters()))
