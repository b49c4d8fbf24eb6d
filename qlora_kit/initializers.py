"""How an adapter starts: an open registry from ``init_lora_weights`` to a function of the module.

A start is a pair A (rank, in), B (out, rank) in the codec's orientation and, for starts that quantize, the
module to adapt in place of the one that was there. Each start accounts for the scaling itself: what the model
computes is base + scaling * B @ A. A start of one's own is a function and a name:

    @register_initializer("mine")
    def mine(request: Request) -> Start: ...

    LoraConfig(init_lora_weights="mine")

A start that has to see the whole model first, to run text through it say, registers with ``prepare``: that is
called with the model and all requests before the first module, and gives the function of the module. One whose
configuration leaves something to the model registers with ``settle``, which says it in a configuration of its own.

``True`` and ``"gaussian"`` leave the model's function as it is, since one factor is zero. The distributions
are PEFT's (and so Microsoft's loralib's): linear and convolution draw A and zero B; an embedding zeros A, the
factor that is looked up, and draws B from a standard normal.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .config.lora import INIT_NAMES, LoraConfig
from .errors import AdapterError, ConfigError, closest
from .injection.engine import Plan, Request, Start, make_plan
from .injection.ranks import capped
from .naming import Tree

Initializer = Callable[[Request], Start]
Prepare = Callable[[nn.Module, Sequence[Request]], Initializer]
Settle = Callable[[nn.Module, LoraConfig, Plan], LoraConfig]
_registry: dict[bool | str, Initializer] = {}
_preparations: dict[bool | str, Prepare] = {}
_settlements: dict[bool | str, Settle] = {}
# Starts that decompose the weight, which has no more than min(out, in) singular values.
_bounded: set[bool | str] = set()
# Starts that live in packages above this one, imported when first asked for.
_on_demand = {"loftq": "loftq.starts.whole_model"}
INIT_NAMES.update(_on_demand.keys())


def register_initializer(
    name: bool | str, *, prepare: Prepare | None = None, settle: Settle | None = None, bounded: bool = False
) -> Callable[[Initializer], Initializer]:
    """Decorator: ``LoraConfig(init_lora_weights=name)`` starts adapters with this function, or where ``prepare`` is
    given with the one that it returns for a model. ``settle`` gives the configuration that a model's plan makes of one.
    A ``bounded`` start gets no rank above a weight's min(out, in).

    A later registration of a name replaces the earlier one.
    """

    def register(function: Initializer) -> Initializer:
        _registry[name] = function
        _preparations.pop(name, None)
        _settlements.pop(name, None)
        _bounded.discard(name)
        if bounded:
            _bounded.add(name)
        if prepare is not None:
            _preparations[name] = prepare
        if settle is not None:
            _settlements[name] = settle
        if isinstance(name, str):
            INIT_NAMES.add(name)
        return function

    return register


def planned(model: nn.Module | Tree, config: LoraConfig) -> tuple[LoraConfig, Plan]:
    """``config`` as it can be carried out on ``model``, and the plan of it; changes nothing.

    Raises:
        ConfigError: no start of that name, or of a rank that no module has.
        TargetError, UnsupportedModuleError: see ``qlora_kit.injection.targets``.
    """
    tree = Tree.of(model)
    plan = make_plan(tree, config)
    _known(config.init_lora_weights)
    if (settle := _settlements.get(config.init_lora_weights)) is not None:
        config = settle(tree.model, config, plan)
    return capped(tree, config, plan) if config.init_lora_weights in _bounded else (config, plan)


def prepared(model: nn.Module, name: bool | str, requests: Iterable[Request]) -> Initializer:
    """The function that starts ``requests``, all by the start ``name``, in ``model``; see ``start_for``. They are made
    for a start that looks at all of them before the first."""
    _known(name)
    wanted = list(requests) if name in _preparations else []
    if not wanted:
        return start_for
    function = _preparations[name](model, wanted)
    return lambda request: _checked(function(request), request)


def start_for(request: Request) -> Start:
    """The start that ``request.config.init_lora_weights`` names, in the request's dtype and on its device.

    Raises:
        ConfigError: no start of that name; lists the known ones.
        AdapterError: a registered start returned factors of another shape.
    """
    return _checked(_known(request.config.init_lora_weights)(request), request)


def _known(name: bool | str) -> Initializer:
    if name not in _registry and name in _on_demand:
        importlib.import_module(_on_demand[str(name)])
    if name not in _registry:
        known = [str(key) for key in [*_registry, *_on_demand]]
        raise ConfigError(
            f"init_lora_weights: expected one of {', '.join(known)}, found {name!r}; nearest: "
            f"{closest(str(name), known)}, or add it with qlora_kit.initializers.register_initializer"
        )
    return _registry[name]


def _checked(start: Start, request: Request) -> Start:
    out_features, in_features = request.shape
    expected = (request.rank, in_features), (out_features, request.rank)
    found = tuple(start.A.shape), tuple(start.B.shape)
    if found != expected:
        raise AdapterError(
            f"{request.path}: expected factors A {expected[0]} and B {expected[1]} from the start "
            f"{request.config.init_lora_weights!r}, "
            f"found {found[0]} and {found[1]}; return them in the codec's (out, in) orientation"
        )
    start.A = start.A.detach().to(request.device, request.dtype)
    start.B = start.B.detach().to(request.device, request.dtype)
    return start


@register_initializer(True)
def zero_start(request: Request) -> Start:
    """One factor zero, the other as torch would draw that layer's own weight."""
    A, B = _empty(request)
    if request.family == "embedding":
        return Start(nn.init.zeros_(A), nn.init.normal_(B))
    return Start(_kaiming_(A), nn.init.zeros_(B))


@register_initializer("gaussian")
def gaussian_start(request: Request) -> Start:
    """A normal with standard deviation 1 / rank and B zero; an embedding starts as with True."""
    if request.family == "embedding":
        return zero_start(request)
    A, B = _empty(request)
    return Start(nn.init.normal_(A, std=1 / request.rank), nn.init.zeros_(B))


@register_initializer(False)
def random_start(request: Request) -> Start:
    """Both factors random: the model's function changes at once. For tests and debugging."""
    A, B = _empty(request)
    if request.family == "embedding":
        return Start(nn.init.normal_(A), nn.init.normal_(B))
    return Start(_kaiming_(A), _kaiming_(B))


def _empty(request: Request) -> tuple[Tensor, Tensor]:
    # Drawn in float32 whatever the adapter's dtype, so that the distribution doesn't depend on it.
    out_features, in_features = request.shape
    A = torch.empty(request.rank, in_features, dtype=torch.float32, device=request.device)
    B = torch.empty(out_features, request.rank, dtype=torch.float32, device=request.device)
    return A, B


def _kaiming_(factor: Tensor) -> Tensor:
    # The fan-in of a convolution's factor is in * prod(kernel), which is its flattened width.
    return nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
