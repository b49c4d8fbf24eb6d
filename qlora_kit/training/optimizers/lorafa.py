"""LoRA-FA: A stays as it was drawn, B alone is trained (Zhang et al., arXiv 2308.03303).

With A frozen a layer needs A x for its backward and not x, and half of the optimizer's states are gone. What B can't
reach is made up for in its gradient. With W = W0 + s B A and G the gradient by W, B's is s G A'. A step D of B moves
W by s D A, and the D for which that is nearest to G is

    D = (1/s) G A' (A A')^-1 = (1/s^2) (s G A') (A A')^-1,

B's gradient times the inverse of an r x r matrix that never changes. It is taken for B's gradient in the step of
whatever optimizer does the rest (AdamW in PEFT's).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import AdapterError, ConfigError
from ...layers import AdapterLayer
from ...layers.sharded.parts import local, placed_as
from .named import optimizer
from .roles import roles_of


def lora_fa_(
    model: nn.Module, name: str | type[Optimizer] = "adamw", *, lr: float, weight_decay: float = 0.0, **settings: Any
) -> Optimizer:
    """Freeze A in all trained adapters of ``model``, and return the optimizer ``name`` (as in ``optimizer``) of the
    rest, which steps along B's projected gradient.

    Gradients are as backward left them again after each step. What is trained besides the factors is trained as ever.
    ``set_adapter`` would let A require a gradient again; it would still not be trained.

    Raises:
        AdapterError: no adapter is trained.
        ConfigError: an unknown name; or at ``step(closure)``, which would make new gradients within the step.
    """
    pairs = [pair for module in model.modules() if isinstance(module, AdapterLayer) for pair in _pairs(module)]
    if not pairs:
        roles_of(model)
        raise AdapterError(f"{type(model).__name__}: expected a trained adapter, found none; call set_adapter(name)")
    before = [pair.A for pair in pairs if pair.A.requires_grad]
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        found = optimizer(name, model, lr=lr, weight_decay=weight_decay, **settings)
    except BaseException:
        for parameter in before:
            parameter.requires_grad_(True)
        raise
    found.register_step_pre_hook(_Projection(pairs).begin)
    found.register_step_post_hook(_restore)
    return found


class _Pair:
    """The factors of one adapter in one layer."""

    def __init__(self, layer: AdapterLayer, name: str) -> None:
        self.layer, self.name = layer, name
        self.A, self.B = layer.adapter_tensors(name).values()
        self._inverse: tuple[int, Tensor] | None = None

    @property
    def inverse(self) -> Tensor:
        """(A A')^-1 in float32, worked out again if A was written to."""
        if self._inverse is None or self._inverse[0] != self.A._version or self._inverse[1].device != self.A.device:
            A = self.layer.whole_factors(self.name)[0].detach().double()
            self._inverse = (self.A._version, torch.linalg.pinv(A @ A.T, hermitian=True).float())
        return self._inverse[1]

    def projected(self) -> Tensor:
        """B's gradient for the step, in its shape and dtype."""
        gradient = self.B.grad
        assert gradient is not None
        own = local(gradient)  # rows of B may be shared out to several processes
        scaled = own.flatten(1).float() @ self.inverse / self.layer.scaling[self.name] ** 2
        projected = scaled.view(own.shape).to(own.dtype)
        return projected if own is gradient else placed_as(gradient, projected)


def _pairs(layer: AdapterLayer) -> list[_Pair]:
    """Those whose B is trained; factors that are another layer's are that one's."""
    names = [name for name in layer.adapter_names() if name not in layer.tied_to]
    return [pair for pair in (_Pair(layer, name) for name in names) if pair.B.requires_grad]


_KEPT = "_gradient_of_backward"


class _Projection:
    def __init__(self, pairs: list[_Pair]) -> None:
        self.pairs = pairs

    @torch.no_grad()
    def begin(self, _: Optimizer, args: Any, kwargs: Any) -> None:
        if any(callable(argument) for argument in (*args[1:], *kwargs.values())):
            raise ConfigError(
                "step(closure): expected gradients that are there before the step, since LoRA-FA projects them; call "
                "backward() first, and step() without a closure"
            )
        for pair in self.pairs:
            if pair.B.grad is not None:
                vars(pair.B)[_KEPT] = pair.B.grad
                pair.B.grad = pair.projected()


def _restore(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if _KEPT in vars(parameter):
                parameter.grad = vars(parameter).pop(_KEPT)
