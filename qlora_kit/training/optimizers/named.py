"""Optimizers by name: torch's, and bitsandbytes', whose states are of 8 bits or paged to the CPU when memory is short.

A state of 8 bits takes a quarter of AdamW's 8 bytes a parameter; bitsandbytes keeps tensors of fewer than 4,096 numbers
in 32 bits. So are the states of trained tables of words, most of whose rows seldom get a gradient, as its documentation
advises. Paging is CUDA's: elsewhere bitsandbytes says that it keeps the states where they are.

Of its two AdEMAMix in 32 bits the one that says so in its name makes one first state where the step uses two (0.50.2);
the other, which is in 32 bits by default, makes both and is taken.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...config.checks import failure
from ...errors import ConfigError, closest
from .roles import roles_of

#: torch's.
_OF_TORCH = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "adafactor": "Adafactor"}
#: bitsandbytes', and whether they can be paged.
_FAMILIES = {
    "adamw": ("AdamW", True),
    "adam": ("Adam", True),
    "lion": ("Lion", True),
    "ademamix": ("AdEMAMix", True),
    "sgd": ("SGD", False),
    "rmsprop": ("RMSprop", False),
    "adagrad": ("Adagrad", False),
    "lamb": ("LAMB", False),
    "lars": ("LARS", False),
}
_OF_BITSANDBYTES = {
    f"{'paged_' * paged}{family}_{bits}bit": f"{'Paged' * paged}{kind}{bits}bit"
    for family, (kind, can_be_paged) in _FAMILIES.items()
    for paged in (False, True)[: 1 + can_be_paged]
    for bits in (8, 32)
}
_OF_BITSANDBYTES |= {"ademamix_32bit": "AdEMAMix", "paged_ademamix_32bit": "PagedAdEMAMix"}
_WITH_MOMENTUM = ("SGD", "LARS")
NAMES = (*_OF_TORCH, *_OF_BITSANDBYTES)


def optimizer_class(name: str) -> type[Optimizer]:
    """The optimizer called ``name``: "adamw", "adam", "sgd", "adafactor" of torch; "adamw_8bit", "paged_adamw_8bit",
    "paged_adamw_32bit", "lion_8bit", "ademamix_8bit", ... of bitsandbytes. Spellings of
    ``qlora-kit plan`` mean the same: "paged-adamw-8bit", and "lion" or "paged-adamw" for those of 32 bits.

    Raises:
        ConfigError: none is; names the closest.
    """
    spelled = name.replace("-", "_")
    if spelled in _OF_TORCH:
        return getattr(torch.optim, _OF_TORCH[spelled])
    for found in (spelled, f"{spelled}_32bit"):
        if found in _OF_BITSANDBYTES:
            from bitsandbytes import optim

            return getattr(optim, _OF_BITSANDBYTES[found])
    raise ConfigError(f"optimizer: expected one of {len(NAMES)} names, found {name!r}; closest: {closest(name, NAMES)}")


def made(kind: str | type[Optimizer], model: nn.Module, groups: Iterable[dict[str, Any]], **settings: Any) -> Optimizer:
    """An optimizer of ``groups``, empty ones left out; ``model`` is whose parameters they are."""
    found = optimizer_class(kind) if isinstance(kind, str) else kind
    if found.__module__.partition(".")[0] == "bitsandbytes":
        momentum = settings.get("momentum")
        if found.__name__.startswith(_WITH_MOMENTUM) and not momentum:
            raise failure("momentum", f"a number above 0 ({found.__name__})", momentum, "pass momentum=0.9")
        _keep_tables_in_32_bits(model)
    return found([group for group in groups if group["params"]], **settings)


def _keep_tables_in_32_bits(model: nn.Module) -> None:
    """bitsandbytes asks a register of the process, by a parameter's id, which another may have later."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Embedding) else None
        if weight is not None and weight.requires_grad and id(weight) not in manager.pid2config:
            manager.override_config(weight, "optim_bits", 32)
            weakref.finalize(weight, manager.pid2config.pop, id(weight), None)


def optimizer(
    name: str | type[Optimizer], model: nn.Module, *, lr: float, weight_decay: float = 0.0, **settings: Any
) -> Optimizer:
    """The optimizer ``name`` of all that is trained in ``model``; vectors (biases, norms) don't decay.

    Args:
        name: as ``optimizer_class`` has them, or a class.
        settings: keyword arguments of that class.

    Raises:
        AdapterError: nothing is trained.
        ConfigError: an unknown name; SGD and LARS of bitsandbytes without ``momentum``, which they can't do.
    """
    roles = roles_of(model)
    decaying = [*roles.A, *roles.B, *roles.tables, *roles.matrices]
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": roles.vectors, "weight_decay": 0.0},
    ]
    return made(name, model, groups, lr=lr, **settings)
