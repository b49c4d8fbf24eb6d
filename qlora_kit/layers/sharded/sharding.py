"""How a layer is shared out to the processes of a group, said once for every library: ``Sharding``, by module type.

A matrix W (out, in) is cut along one of its two dimensions, and each rank of a group holds a part:

- *column*: along out. Each rank computes a part of the outputs from whole inputs. Of an adapter, A (r, in) is the same
  on every rank and B (out, r) is cut as W is.
- *row*: along in. Each rank has a part of the inputs, and what the ranks compute are terms of one sum. A is cut, B is
  the same on every rank.

The names are Megatron's and torch's, of y = x W^T. Everything is in the (out, in) orientation of codecs, so a table of
words, whose inputs are one-hot, is a *row* where it is cut by words and a *column* where it is cut by width; a head
that is cut by words is a *column*. There is no third kind.

Around that matrix libraries move activations, and that decides where a branch beside it has to. ``takes`` and ``gives``
say in which of three forms the input comes and the output leaves:

    "whole"     every rank has all of it, and each rank's gradient of it is all of it (not a term of a sum)
    "features"  its last dimension is cut, each rank has its part
    "sequence"  it is cut along ``sequence_dim``, each rank has some of the tokens

So a Megatron column layer is ``takes="sequence" if sequence_parallel else "whole"`` and ``gives="whole" if
gather_output else "features"``; its row layer ``takes="features" if input_is_parallel else "whole"`` and
``gives="sequence" if sequence_parallel else "whole"``; both with ``sequence_dim=0``.

The rules for whoever adds a library:

1. The base keeps its own forward and collectives. The branch (``thin``) begins at what the base is given and ends at
   what the base gives, and tells other ranks tensors of r columns or rows only.
2. The module's codec is about the rank's own part: its shape, ``read`` and ``write_`` are local.
3. ``register_sharding(Type)`` names the function that says how a module of that type is sharded, None if it isn't;
   a module may also carry its ``Sharding`` as an attribute of that name, which goes first.
4. The layer family over it is ``ShardedLinearAdapter`` or ``ShardedEmbeddingAdapter``, registered with
   ``layers.register_layer`` where the type is the library's own. Starts, files and combinations see whole factors;
   the family cuts and gathers them (``parts``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from ...codecs import on_demand
from ...codecs.registry import load_on_demand
from ...errors import AdapterError, UnsupportedModuleError
from .collectives import alone

Kind = Literal["column", "row"]
Form = Literal["whole", "features", "sequence"]

#: What a library may do to the activations around a layer of either kind, and a branch can follow.
_PASSAGES: dict[str, set[tuple[str, str]]] = {
    "column": {(t, g) for t in ("whole", "sequence") for g in ("features", "whole")} | {("sequence", "sequence")},
    "row": {(t, g) for t in ("features", "whole") for g in ("whole", "sequence")},
}


@dataclass(frozen=True)
class Sharding:
    """How one layer is shared out. See the module's text.

    Attributes:
        kind: along which dimension of (out, in) the matrix is cut.
        shape: (out, in) of the whole matrix.
        group: the processes that share it; None is the default group of all, ``ALONE`` this process.
        takes, gives: the forms of input and output.
        sequence_dim: the dimension of tokens in both, where one of the forms is "sequence".
        mesh: a one-dimensional ``DeviceMesh`` over ``group``: factors are then DTensors on it, which torch's
            optimizers, clipping and checkpoints understand. None: they are plain tensors of the rank's part.
        local_output: with a mesh, whether the output is a plain tensor and no DTensor.
        pieces: of how many blocks of the whole each rank has a piece, one after the other: two where gate and up are
            one linear, of which each rank has some of both.
    """

    kind: Kind
    shape: tuple[int, int]
    group: Any = None
    takes: Form = "whole"
    gives: Form = "features"
    sequence_dim: int = 1
    mesh: Any = None
    local_output: bool = True
    pieces: int = 1

    def __post_init__(self) -> None:
        if (self.takes, self.gives) not in _PASSAGES[self.kind]:
            found = sorted(f"{t} -> {g}" for t, g in _PASSAGES[self.kind])
            raise AdapterError(
                f"a {self.kind}-sharded layer: expected inputs and outputs in one of the forms {found}, found "
                f"{self.takes} -> {self.gives}; choose others for this layer in the parallel plan, or leave it out of "
                "the targets"
            )

    @property
    def size(self) -> int:
        """How many processes share the layer."""
        return 1 if alone(self.group) else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This process's place among them."""
        return 0 if alone(self.group) else dist.get_rank(self.group)

    @property
    def dim(self) -> int:
        """The dimension of the (out, in) matrix that is cut."""
        return 0 if self.kind == "column" else 1

    @property
    def factor_dims(self) -> tuple[int | None, int | None]:
        """The dimension of A (r, in) and of B (out, r) that is cut; None for the one that every rank has whole."""
        return (None, 0) if self.kind == "column" else (1, None)

    def __deepcopy__(self, memo: object) -> Sharding:
        return self  # a group of processes isn't copied with a model


Finder = Callable[[Any], Sharding | None]
_finders: dict[type[nn.Module], Finder] = {}
# The nearest along each type's method resolution order, once it was looked for.
_found: dict[type[nn.Module], Finder | None] = {}


def register_sharding(*types: type[nn.Module]) -> Callable[[Finder], Finder]:
    """Decorator: of modules of ``types`` and their subclasses, this function says how they are sharded."""

    def register(finder: Finder) -> Finder:
        for kind in types:
            _finders[kind] = finder
        _found.clear()
        return finder

    return register


def sharding_of(module: nn.Module) -> Sharding | None:
    """How ``module`` is shared out to several processes; None if this one holds all of it.

    Raises:
        UnsupportedModuleError: it is sharded in a way that no branch can follow; says which ways can.
    """
    own = vars(module).get("sharding")
    if isinstance(own, Sharding):
        return own
    kind = type(module)
    if kind not in _found:
        load_on_demand(kind, on_demand)
        _found[kind] = next((_finders[base] for base in kind.__mro__ if base in _finders), None)
    finder = _found[kind]
    return None if finder is None else finder(module)


def whole_shape(module: nn.Module, part: tuple[int, int]) -> tuple[int, int]:
    """(out, in) of what all processes hold of ``module`` together, of which this one's is ``part``."""
    try:
        sharding = sharding_of(module)
    except UnsupportedModuleError:
        return part
    return part if sharding is None else sharding.shape
