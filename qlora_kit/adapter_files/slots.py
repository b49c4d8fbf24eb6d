"""Which tensors of a model are an adapter's, and what its file calls each: those that the file must hold, and those of
the base model that it may hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..injection.adapted import Adapted
from ..injection.biases import bias_parameters, own_parts
from ..layers import ModulesToSave
from ..naming import StandIn, Tree, base_of, canonical, chain
from .folder import PREFIX
from .keys import is_factor_in_model
from .words import table_paths

_MOVED_BY = "moved_by"


@dataclass(frozen=True)
class Slot:
    """A tensor of the model, its key in an adapter's file, and its name in the wrapper's ``state_dict``; whether it is
    the base's own, and only goes along; for a buffer, the adapter that moved it."""

    key: str
    name: str
    tensor: Tensor
    of_base: bool = False
    moved_by: str = ""

    @property
    def full_key(self) -> str:
        """The key in a Trainer's checkpoint, with the adapter's name in it."""
        return f"{self.key}.{_MOVED_BY}.{self.moved_by}" if self.moved_by else PREFIX + self.name.removeprefix("model.")


def adapter_slots(adapted: Adapted, adapter_name: str, tree: Tree | None = None) -> list[Slot]:
    """Every tensor that the file of ``adapter_name`` must hold."""
    adapted.check_known(adapter_name)
    tree = tree or adapted.tree()
    slots = []
    for path, layer in adapted.layers(tree).items():
        if adapter_name in layer.adapter_names():
            for suffix, tensor in layer.adapter_tensors(adapter_name).items():
                container, dot, rest = suffix.partition(".")
                under = "" if tree.modules[path] is layer else f".{ModulesToSave.holds}"
                name = f"model.{path}{under}.{container}.{adapter_name}{dot}{rest}"
                slots.append(Slot(f"{PREFIX}{path}.{suffix}", name, tensor))
    for path, module in adapted.saved_modules(tree).items():
        if adapter_name in module.adapter_names():
            for suffix, value in module.adapter_tensors(adapter_name).items():
                name = f"model.{path}.modules_to_save.{adapter_name}.{suffix}"
                slots.append(Slot(f"{PREFIX}{path}.{suffix}", name, value))
    # While adapters are switched off the trained biases are the kept ones.
    kept = adapted.kept_biases.values if adapted.disabled else {}
    seen: set[int] = set()
    for path, parameter in bias_parameters(tree, adapted.configs[adapter_name].bias, adapter_name).items():
        if id(parameter) not in seen:  # a shared module's bias is stored once, under its first path
            seen.add(id(parameter))
            within = ".base_layer" if own_parts(tree.modules[path], adapter_name) else ""
            under = "".join(f".{link.holds}" for link in chain(tree.modules[path]) if isinstance(link, StandIn))
            slots.append(Slot(f"{PREFIX}{path}{within}.bias", f"model.{path}{under}.bias", kept.get(path, parameter)))
    buffers = adapted.buffers.of(adapted.root, adapter_name)
    return slots + [buffer_slot(name, tensor, adapter_name) for name, tensor in buffers.items()]


def buffer_slot(name: str, tensor: Tensor, adapter_name: str) -> Slot:
    """The place of buffer ``name``, as ``adapter_name`` has it."""
    return Slot(PREFIX + name, f"model.{name}", tensor, moved_by=adapter_name)


def table_slots(adapted: Adapted, adapter_name: str, paths: list[str], tree: Tree) -> list[Slot]:
    """The base's own tensors of the modules at ``paths``, as the file of ``adapter_name`` calls them.

    Not of those that the adapter has a trained copy of, which is there under the same names.
    """
    slots = []
    for path in paths:
        parts = own_parts(tree.modules[path], adapter_name)
        if any(isinstance(part, ModulesToSave) for part in parts):
            continue
        within = ".base_layer" if parts else ""
        under = "".join(f".{link.holds}" for link in chain(tree.modules[path]) if isinstance(link, StandIn))
        for name, tensor in base_of(tree.modules[path]).named_parameters(recurse=False):
            slots.append(Slot(f"{PREFIX}{path}{within}.{name}", f"model.{path}{under}.{name}", tensor, of_base=True))
    return slots


def extra_tensors(adapted: Adapted, bias: str, tree: Tree) -> dict[str, Tensor]:
    """Tensors of the base model that an adapter's file may hold, by their keys there."""
    extras: dict[str, Tensor] = {}
    tables = set(table_paths(tree))
    for path, module in tree.firsts():
        base = base_of(module)
        if path in tables or (isinstance(base, nn.Embedding) and base is not module):
            for within in ("", ".base_layer", ".original_module"):  # by what stood there when it was saved
                for name, tensor in base.named_parameters(recurse=False):
                    extras[f"{PREFIX}{path}{within}.{name}"] = tensor
    if bias == "all":
        own = {canonical(name): tensor for name, tensor in adapted.root.state_dict(keep_vars=True).items()}
        extras.update(
            {PREFIX + name: tensor for name, tensor in own.items() if "bias" in name and not is_factor_in_model(name)}
        )
    return extras
