"""Which of a checkpoint's tensors are which of a model's: the one answer for all that reads a model from its folder.

A tensor is known by its name in *the model*, which is usually built on the meta device from config.json. A checkpoint
may hold it under that name, with or without the backbone's prefix, under a name of an older release
(``naming.variants``), or as if a wrapper of torch.compile or the like stood in it. A module that stands in several
places has one name, by its first path; of parameters of different modules that are tied, each has its own, and a
checkpoint often holds one of them. A quantized weight is several tensors (codes, scales, tables), which are gathered
under the weight's name.

What is left over is listed: experts that are stored one by one, buffers that models no longer keep, the head of another
class. Whether that is copied, left out or refused is the caller's to say.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from ..errors import StorageError
from ..naming import Tree, Variants, canonical
from .quantized_tensors import PARTS


class StoredNames:
    """The names of ``model``, and where they are among those of a checkpoint.

    Args:
        model: its parameters may be on the meta device.
        names: of the stored tensors.
        quantized: whether some of them may be parts of quantized weights.

    Attributes:
        first: for every path of the model, the first path of the module there.
        known: for every name in the model's state, the same by its module's first path.
        stored: stored names, by the model's.
        parts: of quantized weights, all stored names by their names in the module, by the weight's name in the model.
        twice: stored names of tensors that ``stored`` has under another, by the model's.
        foreign: stored names that the model doesn't have.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] = (), *, quantized: bool = False) -> None:
        self.model = model
        self.variants = Variants(model)
        tree = Tree(model)
        self.first = {path: tree.first(path) for path in tree.modules}
        self.known = {name: self._by_first_path(name) for name in model.state_dict()}
        self.stored: dict[str, str] = {}
        self.parts: dict[str, dict[str, str]] = {}
        self.twice: dict[str, str] = {}
        left = [stored for stored in names if not self._place(stored)]
        self.foreign = [stored for stored in left if not (quantized and self._gather(stored))]

    def name_of(self, name: str) -> str | None:
        """The model's name for what a checkpoint or an adapter calls ``name``; None if it has none."""
        return next((self.known[variant] for variant in self.variants(canonical(name)) if variant in self.known), None)

    def path_of(self, path: str) -> str | None:
        """The model's first path of the module that an adapter calls ``path``; None if it has none."""
        path = canonical(path)
        found = next((self.first[p] for p in self.variants.of_prefix(path) if p and p in self.first), None)
        weight = self.name_of(f"{path}.weight") if found is None else None
        return found if weight is None else weight.removesuffix(".weight")

    def weight_of(self, path: str) -> str | None:
        """The stored name of the weight of the module that an adapter calls ``path``; None if there is none."""
        return self.stored.get(f"{self.path_of(path)}.weight")

    def output_name(self, name: str) -> str:
        """What a checkpoint should call the model's ``name``: the same, or what this one calls it where transformers
        has a renaming, which it reverses on saving."""
        stored = self.stored.get(name, name)
        if self.variants.renamed(stored) != stored:
            return stored
        own = next((self.known[variant] for variant in self.variants.of_prefix(stored) if variant in self.known), None)
        return name if own == name else stored

    def missing(self, given: Iterable[str] = ()) -> list[str]:
        """Parameters of the model that no stored tensor is, nor one of ``given``, nor what is tied to one of these:
        transformers would make them anew."""
        made = {known for stored in self.foreign for n in self.variants.made_of(stored) if (known := self.known.get(n))}
        there = {*self.stored, *given, *made}
        for group in self.ties():
            if there.intersection(group):
                there.update(group)
        ignored = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        names = dict.fromkeys(self.known.get(name, name) for name, _ in self.model.named_parameters())
        return [name for name in names if name not in there and not any(re.search(p, name) for p in ignored)]

    def check_whole(self, folder: Path, given: Iterable[str] = ()) -> None:
        """Refuse a checkpoint, in ``folder``, from which weights are ``missing``.

        Raises:
            StorageError: names them.
        """
        if missing := self.missing(given):
            raise StorageError(
                f"{folder}: expected all weights of a {type(self.model).__name__}, found {len(missing)} "
                f"missing ({', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}); finish the download, or, if "
                "the model was saved without them, load and save it with transformers, which makes them"
            )

    def ties(self) -> list[list[str]]:
        """Groups of names that one parameter has in the model."""
        return tied_groups(self.model, self.known)

    def _by_first_path(self, name: str) -> str:
        path, _, local = name.rpartition(".")
        return f"{self.first.get(path, path)}.{local}" if path else name

    def _place(self, stored: str) -> bool:
        name = self.name_of(stored)
        if name is None:
            return False
        if self.stored.get(name) == name:  # of several, its own name is the best
            self.twice[stored] = name
        else:
            if name in self.stored:
                self.twice[self.stored[name]] = name
            self.stored[name] = stored
        return True

    def _gather(self, stored: str) -> bool:
        part = part_of(stored)
        weight = part and self.name_of(f"{stored.removesuffix(part)}weight")
        if not part or weight not in self.stored:
            return False
        self.parts.setdefault(weight, {"weight": self.stored[weight]})[part] = stored
        return True


def part_of(stored: str) -> str:
    """Which part of a quantized weight ``stored`` is the name of, by its name in the module; "" if of none."""
    return next((part for part in PARTS if stored.endswith(f".{part}")), "")


def tied_groups(model: nn.Module, known: Mapping[str, str]) -> list[list[str]]:
    """Names that one parameter of ``model`` has, if several; ``known`` maps each name to its module's first."""
    groups: dict[int, dict[str, None]] = defaultdict(dict)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)][known.get(name, name)] = None
    return [list(names) for names in groups.values() if len(names) > 1]


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another one's too, and the first of that one's names."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied
