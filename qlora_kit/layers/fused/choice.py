"""Which form of a linear layer's branch is computed: the plain sum of modules, or one function (``fused``).

The plain form is what a reader expects and what everything can look into. The fused one gives the same to rounding,
and its gradients, for less. Someone who looks into the parts (a hook on the base or a factor, a compiler, a transform
of functorch) or has put others in their place gets the plain form.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module

from ...errors import ConfigError, closest
from ..row_choice import rows_of

KINDS = ("auto", "plain", "fused")
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_chosen = "auto"


class set_branch:  # noqa: N801 - called as a function, as torch.set_grad_enabled is
    """Choose how adapted layers compute, for the whole process: a call, or a ``with`` block that sets it back.

    Args:
        kind: "plain", the readable sum of modules, everywhere; "auto", the default, one function for a layer and for
            the blocks that are known, in training mode and wherever nothing looks into their parts; "fused", the same
            in evaluation mode too where gradients are wanted.

    Raises:
        ConfigError: another kind.
    """

    def __init__(self, kind: str) -> None:
        global _chosen
        if kind not in KINDS:
            meant = "".join(f"; did you mean {near!r}?" for near in closest(str(kind), KINDS, 1))
            raise ConfigError(f"branch: expected one of {list(KINDS)}, found {kind!r}{meant}")
        self._before, _chosen = _chosen, kind

    def __enter__(self) -> None:
        """The choice is made already."""

    def __exit__(self, *error: object) -> None:
        global _chosen
        _chosen = self._before


def chosen_branch() -> str:
    """The kind that ``set_branch`` set."""
    return _chosen


def blocks_chosen(block: nn.Module) -> bool:
    """Whether ``block`` computes by its form; nothing but a training step has anything of it."""
    return _chosen != "plain" and trains(block) and not torch.compiler.is_compiling()


def trains(module: nn.Module) -> bool:
    """Whether ``module`` computes as in a training step. In evaluation it gives the same bits with a gradient wanted
    and without; training does so too, since reentrant checkpointing trains without one and computes again with one."""
    return _chosen == "plain" or module.training or (_chosen == "fused" and torch.is_grad_enabled())


def why_plain(layer: Any, x: Tensor, names: Sequence[str]) -> str | None:
    """Why ``layer``, a linear one, computes ``x`` with the adapters ``names`` in the plain form; None if it needn't.
    Asked in every forward, so the most frequent reasons come first."""
    if _chosen == "plain":
        return "it was chosen"
    if not trains(layer):
        return "it doesn't train"
    if rows_of(layer) is not None:
        return "its rows have adapters of their own"
    if every_module._has_any_global_hook():
        return "every module's calls are told of"
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return "it is traced, and who traces it decides what is kept"
    if type(x) not in _PLAIN_TENSORS or not x.is_floating_point() or forward_ad._current_level >= 0:
        return f"its input is a {type(x).__name__} of {x.dtype}"
    base = layer.base_layer
    if watched(base) or not _calls_its_type(base):
        return "its base has hooks"
    if any(p is not None and p.requires_grad for name, p in base._parameters.items() if name != "bias"):
        return "its base is trained"
    if not layer.cast_input_dtype_enabled:
        return "its weights are cast around each call"
    return _why_plain_parts(layer, names)


def _why_plain_parts(layer: Any, names: Sequence[str]) -> str | None:
    for name in names:
        dropout = layer.lora_dropout[name]
        if type(dropout) not in (nn.Identity, nn.Dropout) or watched(dropout):
            return "its dropout isn't torch's own, or has hooks"
        for factor in (layer.lora_A[name], layer.lora_B[name]):
            if type(factor) not in layer.factor_types or watched(factor):
                return "a factor isn't a linear module, or has hooks"
            if type(factor.weight) not in _PLAIN_TENSORS:
                return f"a factor is a {type(factor.weight).__name__}"
    return None


def watched(module: nn.Module) -> bool:
    """Whether someone is told of ``module``'s calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _calls_its_type(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its type's forward, or one that its codec put there."""
    own: Any = vars(module).get("forward")
    return own is None or (isinstance(own, partial) and own.func.__module__.startswith("qlora_kit.codecs."))
