"""What transformers' models do to their own modules, under adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..errors import AdapterError
from ..injection.adapted import Adapted
from ..injection.ties import end_tables
from ..layers import AdapterLayer, ModulesToSave
from ..naming import StandIn, base_of, unwrapped


def dequantize(self: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' ``dequantize`` of the base under its adapters; what it puts there is frozen as what was there."""
    trained = {name for name, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    self.model.dequantize(*args, **kwargs)
    for name, parameter in self.model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point():
            parameter.requires_grad_(name in trained)
    return self


def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The base model's own; refused while an adapter sits on the embedding or the head."""
    ends = ("get_input_embeddings", "get_output_embeddings")
    for get, module in zip(ends, end_tables(self.model), strict=True):
        if isinstance(module, (AdapterLayer, ModulesToSave)):
            raise AdapterError(
                f"resize_token_embeddings: {get}() is adapted, and its adapter has the old size; resize "
                "before applying the adapter, or merge or unload it first"
            )
    return self.model.resize_token_embeddings(*args, **kwargs)


def tie_base_(adapted: Adapted, *args: Any, **kwargs: Any) -> None:
    """transformers' ``tie_weights`` of the model under ``adapted``: its own arguments, the base's own modules.

    It asks modules for their parameters by name, which adapter layers don't have, and puts what it finds into others:
    a trained copy of one would be made of the base's table there, or the base's table be lost.
    """
    root: Any = unwrapped(adapted.root)
    with ExitStack() as stack:
        for layer in adapted.layers().values():
            stack.enter_context(layer.sharing())
        stack.enter_context(_without_stand_ins(root))
        type(root).tie_weights(root, *args, **kwargs)


@contextmanager
def _without_stand_ins(model: nn.Module) -> Iterator[None]:
    """In the block ``model`` has the modules in its tree that adapters stand in for."""
    every = [(module._modules, name, child) for module in model.modules() for name, child in module._modules.items()]
    hidden = [
        (held, name, child)
        for held, name, child in every
        if child is not None and isinstance(unwrapped(child), StandIn)
    ]
    try:
        for held, name, child in hidden:
            held[name] = base_of(child)
        yield
    finally:
        for held, name, child in hidden:
            held[name] = child
