"""Feed-forward blocks whose activations are computed again: down(act(gate(x)) * up(x)), and down(act(up(x))).

A gated block keeps three wide tensors for its backward pass: what goes into the activation, what comes out, and the
other factor. With an adapter on ``down`` it keeps a fourth, their product. All can be made of two of them elementwise,
which costs next to nothing beside the block's products: so these two are kept (``linear.Made``).

A block is known by its structure: modules with two or three linear children, the last as wide inside as the first are
outside, and one activation without parameters or children. What its forward does with them is found out by trying it:
an object of the same type and settings with small linears in their place must give what one of the forms gives, in
training and not, without drawing random numbers, writing over what the activation is given, or changing its object. It
is tried once for a type and its settings; no name of a model or of a child plays a part.

The forward of such a module is set on the object, as bitsandbytes and accelerate set theirs, while an adapter stands on
its last linear. It asks at each call whether to do anything but what the type's own does, which is also where settings
have been changed since. A replica of DataParallel, whose attributes are the original's, computes as its type does.
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
from ...naming import base_of
from ..base import AdapterLayer
from .choice import blocks_chosen, watched
from .linear import Made
from .settings import Settings, UnsettledError, settled

# What float32 sums in another order differ by, relative to their size.
_ROUNDING = 1e-5
# Sizes of the small linears of a trial: different, and even where halves are taken.
_OUTSIDE, _INSIDE = 5, 6
# Of a block; lists of layers, which have thousands, are gone past.
_MOST_CHILDREN = 8
_IN_PLACE = (nn.Dropout, nn.Identity)
# What is set on a block.
_OURS = ("forward", "_replicate_for_data_parallel")


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
    if ours and _fits_still(*own.args):
        return
    form = form_of(block) if own is None or ours else None
    if form is not None:
        settings = Settings.of(block, block._modules[form.activation])
        calls = partial(_forward, block, form, settings), partial(_replica, block)
        vars(block).update(zip(_OURS, calls, strict=True))
    elif ours:
        for name in _OURS:
            vars(block).pop(name, None)


def _fits_still(block: nn.Module, form: Form, settings: Settings) -> bool:
    """Whether the linears of ``block`` are in number, place and shape what ``form`` was found with, and its last one an
    adapter: looking for it again, which looks into configurations, would find the same."""
    modules = block._modules
    linears = [name for name, child in modules.items() if _is_linear(child)]
    if {*linears} != {form.down, *form.first} or not isinstance(modules[form.down], AdapterLayer):
        return False
    shapes = {name: _shape(modules[name]) for name in linears}
    return settings.hold(block, modules.get(form.activation)) and form in _candidates(
        shapes, [form.down], form.activation
    )


def form_of(block: nn.Module) -> Form | None:
    """The form that ``block`` computes by, if an adapter stands on its last linear; None for everything else."""
    children = block._modules
    if len(children) > _MOST_CHILDREN or block._parameters or block._buffers:
        return None
    linears = {name: child for name, child in children.items() if _is_linear(child)}
    others = {name: child for name, child in children.items() if name not in linears}
    active = [name for name, child in others.items() if not _does_nothing(child)]
    if len(linears) not in (2, 3) or len(active) != 1 or not _is_activation(others[active[0]]):
        return None
    down = [name for name, child in linears.items() if isinstance(child, AdapterLayer)]
    if not down:
        return None
    shapes = tuple((name, _shape(child)) for name, child in linears.items())
    activation: Any = children[active[0]]
    try:
        settings = settled(block), settled(activation)
    except UnsettledError:
        return None
    key = (type(block), shapes, tuple(children), tuple(down), type(activation), repr(activation), settings)
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
    state = torch.get_rng_state()
    try:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            same = all(_gives_the_same(block, form, training) for training in (True, False))
        return same and torch.equal(state, torch.get_rng_state())
    except Exception:  # whatever a forward may raise that isn't made for this
        return False
    finally:
        torch.set_rng_state(state)


def _gives_the_same(block: nn.Module, form: Form, training: bool) -> bool:
    activation: Any = _stand_in(block._modules[form.activation], training=training)  # type: ignore[arg-type]
    wide = 2 * _INSIDE if form.kind.startswith("halved") else _INSIDE
    small = {name: _small(_OUTSIDE, wide, i) for i, name in enumerate(form.first)}
    small[form.down] = _small(_INSIDE, _OUTSIDE, 2)
    modules = {**block._modules, **small, form.activation: activation}
    stand_in = _stand_in(block, training=training, _modules=modules)
    before = settled(stand_in), settled(activation)
    x = torch.linspace(-2, 2, 6 * _OUTSIDE).sin_().view(2, 3, _OUTSIDE)
    found = type(block).forward(stand_in, x)
    given = [small[name](x) for name in form.first]
    kept = [tensor.clone() for tensor in given]
    expected = small[form.down](form.made(stand_in).make(*given))
    quiet = all(map(torch.equal, given, kept)) and before == (settled(stand_in), settled(activation))
    same = isinstance(found, Tensor) and found.shape == expected.shape
    return quiet and same and torch.allclose(found, expected, _ROUNDING, _ROUNDING)


def _stand_in(module: nn.Module, **changes: Any) -> Any:
    """An object of the type and attributes of ``module``, but for ``changes``."""
    stand_in: Any = object.__new__(type(module))
    vars(stand_in).update({**vars(module), **changes})
    vars(stand_in).pop("forward", None)
    return stand_in


def _small(inputs: int, outputs: int, seed: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, device="meta")
    count = inputs * outputs
    weight = torch.arange(1, 1 + count, dtype=torch.float32, device="cpu").add_(7 * seed).sin_().view(outputs, inputs)
    linear.weight = nn.Parameter(weight)
    linear.bias = nn.Parameter(torch.linspace(-1, 1, outputs, device="cpu") * (1 + seed))
    return linear


def _forward(block: Any, form: Form, settings: Settings, *args: Any, **kwargs: Any) -> Any:
    if not blocks_chosen(block) or not _by_form(block, form, settings, args, kwargs):
        return type(block).forward(block, *args, **kwargs)
    first = [block._modules[name](args[0]) for name in form.first]
    return block._modules[form.down].of_made(form.made(block), first)


def _by_form(block: Any, form: Form, settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether nothing has changed since ``form`` was found, and the call is the one that it is of."""
    modules = block._modules
    activation = modules.get(form.activation)
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not settings.hold(block, activation):
        return False
    parts = {form.activation, form.down, *form.first}
    idle = all(_does_nothing(module) for name, module in modules.items() if name not in parts)
    return idle and isinstance(modules.get(form.down), AdapterLayer) and not watched(activation)


def _replica(block: nn.Module) -> nn.Module:
    """What DataParallel makes of ``block``."""
    replica = type(block)._replicate_for_data_parallel(block)
    for name in _OURS:
        vars(replica).pop(name, None)
    return replica


def _is_linear(module: nn.Module | None) -> bool:
    if isinstance(module, AdapterLayer):
        return module.family == "linear"
    return module is not None and isinstance(module, nn.Linear) and find_codec(module) is not None


def _shape(module: Any) -> tuple[int, int]:
    base = base_of(module)
    return codec_for(base).shape(base)


def _does_nothing(module: nn.Module | None) -> bool:
    return module is None or (type(module) in _IN_PLACE and getattr(module, "p", 0.0) == 0.0)


def _is_activation(module: nn.Module | None) -> bool:
    return module is not None and not module._modules and not module._parameters and not module._buffers
