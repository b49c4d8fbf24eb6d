"""The adapters on one model as a value: what merging, combining, saving and loading need of it, and no more.

``LoraModel`` holds one and is its face. Everything below it is written over this, so nothing below needs the face.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config.lora import LoraConfig
from ..errors import AdapterError
from ..layers import AdapterLayer, ModulesToSave
from ..layers.rescaled import at_full_size_
from ..layers.sharded.megatron.parts import close_parts_
from ..naming import StandIn, Tree, chain, every_module
from .biases import KeptBiases, bias_parameters
from .buffers import MovedBuffers
from .engine import Plan, swap_
from .ties import words_of

#: Methods of transformers' models that others stand in for while adapters are on a model.
STANDING_IN = ("save_pretrained", "tie_weights")


class Adapted:
    """The named adapters in ``root``.

    Attributes:
        root: the model, adapter layers inside.
        adapter_dtype: of factors and trained copies; None is by the base's dtype, see ``LoraModel``.
        configs: the configuration of each adapter by name.
        active: names that forward applies, in order.
        trainable: names whose parameters are trained.
        disabled: whether the model computes as its base does.
        set_aside: what was merged when adapters were switched off, by path.
        kept_biases: the base's biases from before an adapter trained them; while ``disabled``, the trained ones.
        buffers: those that training moves, such as running statistics, by adapter.
        backbones: fingerprints of the quantized bases that LoftQ adapters were started on, by adapter.
        plan: what was done for the adapter added last.
        words: rows of the input embeddings when the model was wrapped; None where it has no such table.
        marks: what trainers had put on the model before the adapters came; see ``training.preparation.trainers``.
        trained_before: names of the parameters that may be trained once no adapter is left.
    """

    def __init__(self, root: nn.Module, adapter_dtype: torch.dtype | None = None) -> None:
        self.root = root
        self.adapter_dtype = adapter_dtype
        self.configs: dict[str, LoraConfig] = {}
        self.active: list[str] = []
        self.trainable: list[str] = []
        self.disabled = False
        self.set_aside: dict[str, list[str]] = {}
        self.kept_biases = KeptBiases()
        self.buffers = MovedBuffers(root)
        self.backbones: dict[str, str] = {}
        self.plan: Plan | None = None
        self.words = words_of(root)
        self.marks: Any = None
        self.trained_before = {n for n, p in root.named_parameters(remove_duplicate=False) if p.requires_grad}
        self._tree: Tree | None = None
        self._listed: list[tuple[str, AdapterLayer | ModulesToSave]] | None = None  # the parts in that

    @contextmanager
    def mapped(self) -> Iterator[Tree]:
        """In the block no module takes another's place, so the model is mapped once for all that is asked."""
        outer = self._tree
        self._tree = outer or Tree(self.root)
        try:
            yield self._tree
        finally:
            self._tree = outer
            if outer is None:
                self._listed = None

    def tree(self) -> Tree:
        """The model's modules by canonical path."""
        return self._tree or Tree(self.root)

    # -- looking at it -------------------------------------------------------------------------------------

    def layers(self, tree: Tree | None = None) -> dict[str, AdapterLayer]:
        """Every adapter layer by its canonical path; one that stands at several paths comes once."""
        return {path: part for path, part in self._parts(tree) if isinstance(part, AdapterLayer)}

    def saved_modules(self, tree: Tree | None = None) -> dict[str, ModulesToSave]:
        """Every module with trained copies, by its canonical path."""
        return {path: part for path, part in self._parts(tree) if isinstance(part, ModulesToSave)}

    def parts(self) -> list[AdapterLayer | ModulesToSave]:
        """All layers and saved modules."""
        return [part for _, part in self._parts(None)]

    def _parts(self, tree: Tree | None) -> list[tuple[str, AdapterLayer | ModulesToSave]]:
        if self._tree is None or tree not in (None, self._tree):
            return list(_parts_in(tree or self.tree()))
        if self._listed is None:
            self._listed = list(_parts_in(self._tree))
        return self._listed

    def bases_of(self, name: str) -> dict[str, nn.Module]:
        """The base modules that adapter ``name`` stands on, by path."""
        return {path: layer.base_layer for path, layer in self.layers().items() if name in layer.r}

    def check_known(self, name: str) -> None:
        """Raise an AdapterError unless there is an adapter ``name``."""
        if name not in self.configs:
            raise AdapterError(f"unknown adapter {name!r}; the model has {sorted(self.configs)}")

    def copies(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Which of ``names`` have trained their own copy of a module (modules_to_save), by its path."""
        held = {
            path: [name for name in dict.fromkeys(names) if name in module.modules_to_save]
            for path, module in self.saved_modules().items()
        }
        return {path: holders for path, holders in held.items() if holders}

    def check_one_copy(self, names: Sequence[str], why: str, error: type[Exception] = AdapterError) -> None:
        """Raise ``error`` where two of ``names`` have each trained a copy of one module, of which ``why`` tells what
        can't be done and what can."""
        for path, holders in self.copies(names).items():
            if len(holders) > 1:
                raise error(
                    f"{path}: expected at most one of the adapters to hold its own trained copy (modules_to_save), "
                    f"found {holders}; {why}"
                )

    # -- changing it ---------------------------------------------------------------------------------------

    def choose_(self, names: Sequence[str], *, trainable: bool) -> None:
        """Make ``names`` the active adapters, and the trainable ones or none."""
        for name in names:
            self.check_known(name)
        self.check_one_copy(names, "they can't be active together, so merge one of them first")
        self.active = list(names)
        self.trainable = list(names) if trainable else []
        self.apply_state_()

    def freeze_(self) -> None:
        """Train nothing, as the first adapter comes. Of the base's parameters, what is trained after that is the
        caller's own choice, and stays as it is while adapters are switched, added and deleted."""
        for module in every_module(self.root):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad and parameter.is_floating_point():
                    parameter.requires_grad_(False)

    def apply_state_(self, names: Collection[str] | None = None) -> None:
        """Make every layer and buffer say what the adapters' state is, and so every ``requires_grad`` of the adapters
        ``names``, of all where None."""
        at_full_size_(self.root)
        training = [] if self.disabled else self.trainable
        stated = list(self.configs) if names is None else names
        for part in self.parts():
            part.active_adapters = list(self.active)  # as in PEFT, held by this layer or not
            part.disable_adapters = self.disabled
            part.set_requires_grad([name for name in stated if name not in training], False)
            part.set_requires_grad([name for name in stated if name in training])
        for name in stated:
            self.train_biases_(name, name in training)
        self.buffers.show_(self.root, [] if self.disabled else self.active)

    def train_biases_(self, name: str, trained: bool) -> None:
        """Train the biases of the base that adapter ``name`` trains, or freeze them."""
        for parameter in bias_parameters(self.root, self.configs[name].bias, name).values():
            parameter.requires_grad_(trained)

    def drop_(self, *, empty: bool) -> None:
        """Give modules back to the model: those that no adapter uses any more (``empty``), or all."""
        for path, module in self.tree().modules.items():
            for part in chain(module) if isinstance(module, StandIn) else ():
                if isinstance(part, (AdapterLayer, ModulesToSave)) and not (empty and part.adapter_names()):
                    swap_(self.root, path, part.get_submodule(part.holds), of=part)
        close_parts_(self.root)

    def forget_(self) -> None:
        """No adapter is left; what may be trained is what might be before the first one."""
        close_parts_(self.root)
        self.configs.clear()
        self.active, self.trainable = [], []
        self.kept_biases.values.clear()
        self.set_aside.clear()
        self.buffers = MovedBuffers(self.root)
        self.backbones.clear()
        self.disabled = False
        for module in every_module(self.root):  # what was put in the place of its own methods while adapters were on it
            for name in STANDING_IN:
                if getattr(vars(module).get(name), "args", (None,))[0] is self:
                    delattr(module, name)
        for name, parameter in self.root.named_parameters(remove_duplicate=False):
            if parameter.is_floating_point():
                parameter.requires_grad_(name in self.trained_before)


def _parts_in(tree: Tree) -> Iterator[tuple[str, AdapterLayer | ModulesToSave]]:
    for path, module in tree.firsts():
        for part in chain(module) if isinstance(module, StandIn) else ():
            if isinstance(part, (AdapterLayer, ModulesToSave)):
                yield path, part


def adapted_of(model: Any) -> Adapted:
    """The adapters of ``model``: a ``LoraModel``, or what it holds."""
    found = model if isinstance(model, Adapted) else getattr(model, "adapted", None)
    if not isinstance(found, Adapted):
        raise AdapterError(
            f"expected a model with adapters (what apply_lora returns), found {type(model).__name__}; call apply_lora, "
            "or LoraModel.from_pretrained, first"
        )
    return found
