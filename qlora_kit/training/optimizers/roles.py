"""What each trained tensor of a model is: a factor A or B, a table's factor, another matrix, or a vector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ...errors import AdapterError
from ...layers import AdapterLayer, EmbeddingAdapter


@dataclass(frozen=True)
class Roles:
    """The parameters of a model that require a gradient, each in one list.

    Attributes:
        A, B: factors, (r, in) and (out, r) in canonical form.
        tables: both factors of adapters on embeddings.
        matrices: all else of two and more dimensions: trained copies.
        vectors: all else: biases, norms.
    """

    A: list[nn.Parameter] = field(default_factory=list)
    B: list[nn.Parameter] = field(default_factory=list)
    tables: list[nn.Parameter] = field(default_factory=list)
    matrices: list[nn.Parameter] = field(default_factory=list)
    vectors: list[nn.Parameter] = field(default_factory=list)


def roles_of(model: nn.Module) -> Roles:
    """The trained tensors of ``model`` by what they are.

    Raises:
        AdapterError: nothing of ``model`` requires a gradient.
    """
    roles = Roles()
    seen: set[int] = set()
    for parameter, role in _told(model, roles):
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            role.append(parameter)
    if not seen:
        raise AdapterError(
            f"{type(model).__name__}: expected parameters that require a gradient, found none; call apply_lora first, "
            "or load the adapter with is_trainable=True"
        )
    return roles


def _told(model: nn.Module, roles: Roles) -> Iterator[tuple[nn.Parameter, list[nn.Parameter]]]:
    """Each parameter with the list that it belongs in; the first time that one comes counts."""
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    # Tables first: a head that shares an embedding's factors has them the other way round.
    for layer in sorted(layers, key=lambda layer: not isinstance(layer, EmbeddingAdapter)):
        places = (roles.tables, roles.tables) if isinstance(layer, EmbeddingAdapter) else (roles.A, roles.B)
        for name in layer.adapter_names():
            for tensor, place in zip(layer.adapter_tensors(name).values(), places, strict=True):
                if isinstance(tensor, nn.Parameter):
                    yield tensor, place
    for parameter in model.parameters():
        yield parameter, roles.vectors if parameter.dim() < 2 else roles.matrices
