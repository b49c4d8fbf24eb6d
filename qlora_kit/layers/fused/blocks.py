"""Feed-forward blocks whose activations are computed again: down(act(gate(x)) * up(x)), and down(act(up(x))).

A gated block keeps three wide tensors for its backward pass: what goes into the activation, what comes out, and the
other factor. With an adapter on ``down`` it keeps a fourth, their product. All can be made of two of them elementwise,
which costs next to nothing beside the block's products: so these two are kept (``linear.Made``).

A block is known by its structure: modules with two or three linear children, the last as wide inside as the first are
outside, and one activation without parameters or children. What its forward does with them is found out by trying it:
an object of the same type and settings with small linears in their place must give what one of the forms gives. It is
tried once for a type and its settings; no name of a model or of a child plays a part.

The forward of such a module is set on the object, as bitsandbytes and accelerate set theirs, while an adapter stands on
its last linear. It asks at each call whether to do anything but what the type's own does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from ...codecs import codec_for, find_codec
from ..base import AdapterLayer
from .choice import blocks_chosen, watched
from .linear import Made

# What float32 sums in another order differ by, relative to their size.
_ROUNDING = 1e-5
# Sizes of the small linears of a trial: different, and even where halves are taken.
_OUTSIDE, _INSIDE = 5, 6
# Of a block; lists of layers, which have thousands, are gone past.
_MOST_CHILDREN = 8
_IN_PLACE = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class Form:
    """How a block computes.

    Attributes:
        first: the names of the linears that read the block's input, in the order that ``kind`` takes them.
        down: the name of the linear that gives its output.
        activation: the name of the activation.
        kind: a name of ``_KINDS``.
    """

    first: tuple[str, ...]
    down: str
    activation: str
    kind: str

    def made(self, block: nn.Module) -> Made:
        return Made(partial(_KINDS[self.kind], block._modules[self.activation]), len(self.first))


def _gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def _halved(act: Callable[[Tensor], Tensor], both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return act(gate) * up


def _halved_the_other_way(act: Callable[[Tensor], Tensor], both: Tensor) -> Tensor:
    up, gate = both.chunk(2, dim=-1)
    return act(gate) * up


def _ungated(act: Callable[[Tensor], Tensor], up: Tensor) -> Tensor:
    return act(up)


_KINDS: dict[str, Callable[..., Tensor]] = {
    "gated": _gated,
    "halved": _halved,
    "halved the other way": _halved_the_other_way,
    "ungated": _ungated,
}
_tried: dict[tuple[Any, ...], Form | None] = {}


def refit_(block: nn.Module) -> None:
    """Have ``block``, one of whose children has changed, compute by its form, or as its type does where it has none."""
    own: Any = vars(block).get("forward")
    ours = isinstance(own, partial) and own.func is _forward
    form = form_of(block) if own is None or ours else None
    if form is not None and not ours:
        block.forward = partial(_forward, block, form)
    elif form is None and ours:
        del block.forward


def form_of(block: nn.Module) -> Form | None:
    """The form that ``block`` computes by, if an adapter stands on its last linear; None for everything else."""
    children = block._modules
    if len(children) > _MOST_CHILDREN:
        return None
    linears = {name: child for name, child in children.items() if _is_linear(child)}
    others = {name: child for name, child in children.items() if name not in linears}
    active = [name for name, child in others.items() if not _does_nothing(child)]
    if len(linears) not in (2, 3) or len(active) != 1 or not _is_activation(others[active[0]]):
        return None
    down = [name for name, child in linears.items() if isinstance(child, AdapterLayer)]
    settings = (item for item in vars(block).items() if type(item[1]) in (bool, int, float, str, type(None)))
    shapes = tuple((name, _shape(child)) for name, child in linears.items())
    activation = children[active[0]]
    key = (type(block), shapes, tuple(children), tuple(down), type(activation), repr(activation), *settings)
    if key not in _tried:
        candidates = _candidates(dict(shapes), down, active[0])
        _tried[key] = next((form for form in candidates if _computes_by(block, form)), None)
    return _tried[key]


def _candidates(shapes: dict[str, tuple[int, int]], adapted: list[str], activation: str) -> Iterator[Form]:
    for down in adapted:
        outside, inside = shapes[down]
        first = [name for name in shapes if name != down]
        given = {shapes[name] for name in first}
        if len(first) == 2 and given == {(inside, outside)}:
            for order in permutations(first):
                yield Form(order, down, activation, "gated")
        elif len(first) == 1 and given == {(inside, outside)}:
            yield Form((first[0],), down, activation, "ungated")
        elif len(first) == 1 and given == {(2 * inside, outside)}:
            for kind in ("halved", "halved the other way"):
                yield Form((first[0],), down, activation, kind)


@torch.no_grad()
def _computes_by(block: nn.Module, form: Form) -> bool:
    """Whether the type's forward gives what ``form`` does, on an object with small linears in the place of its own."""
    stand_in: Any = object.__new__(type(block))
    vars(stand_in).update(vars(block))
    vars(stand_in).pop("forward", None)
    wide = 2 * _INSIDE if form.kind.startswith("halved") else _INSIDE
    small = {name: _small(_OUTSIDE, wide, i) for i, name in enumerate(form.first)}
    small[form.down] = _small(_INSIDE, _OUTSIDE, 2)
    vars(stand_in).update(_modules={**block._modules, **small}, training=False)
    x = torch.linspace(-2, 2, 6 * _OUTSIDE, device="cpu").sin_().view(2, 3, _OUTSIDE)
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        try:
            found = type(block).forward(stand_in, x)
        except Exception:  # whatever a forward may raise that isn't made for this
            return False
        expected = small[form.down](form.made(stand_in).make(*(small[name](x) for name in form.first)))
    same = isinstance(found, Tensor) and found.shape == expected.shape
    return same and torch.allclose(found, expected, _ROUNDING, _ROUNDING)


def _small(inputs: int, outputs: int, seed: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, device="meta")
    count = inputs * outputs
    weight = torch.arange(1, 1 + count, dtype=torch.float32, device="cpu").add_(7 * seed).sin_().view(outputs, inputs)
    linear.weight = nn.Parameter(weight)
    linear.bias = nn.Parameter(torch.linspace(-1, 1, outputs, device="cpu") * (1 + seed))
    return linear


def _forward(block: Any, form: Form, *args: Any, **kwargs: Any) -> Any:
    down = block._modules[form.down]
    alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
    if not alone or not blocks_chosen(block) or watched(block._modules[form.activation]):
        return type(block).forward(block, *args, **kwargs)
    return down.of_made(form.made(block), [block._modules[name](args[0]) for name in form.first])


def _is_linear(module: nn.Module | None) -> bool:
    if isinstance(module, AdapterLayer):
        return module.family == "linear"
    return module is not None and isinstance(module, nn.Linear) and find_codec(module) is not None


def _shape(module: Any) -> tuple[int, int]:
    return (module.codec if isinstance(module, AdapterLayer) else codec_for(module)).shape(
        module.base_layer if isinstance(module, AdapterLayer) else module
    )


def _does_nothing(module: nn.Module | None) -> bool:
    return module is None or (type(module) in _IN_PLACE and getattr(module, "p", 0.0) == 0.0)


def _is_activation(module: nn.Module | None) -> bool:
    return module is not None and not module._modules and not module._parameters and not module._buffers
