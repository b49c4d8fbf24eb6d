"""Whole modules trained and stored beside the low-rank factors (``modules_to_save``).

The module named stays untouched as ``original_module``; each adapter trains its own copy, and forward goes
to the active adapter's copy, or to the original where none has one. Attribute names are PEFT's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..errors import TargetError
from ..naming import StandIn, base_of
from .named import NamedModules


class ModulesToSave(StandIn):
    """``original_module`` and one trainable copy of it for each adapter in ``modules_to_save``.

    The original may be an adapter layer: of other adapters, whose place this is too. Copies are of its base.
    """

    holds = "original_module"

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = NamedModules()
        self.active_adapters: list[str] = []
        self.disable_adapters = False
        self.training = original_module.training

    def add_adapter(self, name: str, dtype: torch.dtype | None, path: str = "") -> None:
        """Copy the original for adapter ``name``; half-precision weights become ``dtype`` where given.

        Raises:
            TargetError: the module holds quantized weights, which can't be trained.
        """
        base = base_of(self.original_module)
        for key, parameter in base.named_parameters():
            if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
                raise TargetError(
                    f"{path}.{key}: expected a floating-point parameter in modules_to_save, found "
                    f"{parameter.dtype} quantized storage; keep the module out of quantization "
                    "(llm_int8_skip_modules) or adapt it through target_modules"
                )
        module = copy.deepcopy(base)
        if dtype is not None and any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters()):
            module = module.to(dtype)
        self.modules_to_save[name] = module

    def delete_adapter(self, name: str) -> None:
        if name in self.modules_to_save:
            del self.modules_to_save[name]
        self.active_adapters = [n for n in self.active_adapters if n != name]

    def adapter_names(self) -> list[str]:
        return list(self.modules_to_save)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Parameters and buffers of ``name``'s copy by their own names."""
        module = self.modules_to_save[name]
        persistent = set(module.state_dict())
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {key: value for key, value in tensors.items() if key in persistent}

    @property
    def current(self) -> nn.Module:
        """The module that forward goes to."""
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.modules_to_save:
                    return self.modules_to_save[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.current
        inputs = next((a for a in args if torch.is_tensor(a)), None)
        weight = next(module.parameters(), None)
        # A float32 copy of a half-precision head gets the half-precision activations of the model before it.
        if (
            inputs is not None
            and weight is not None
            and inputs.is_floating_point()
            and inputs.dtype != weight.dtype
            and not torch.is_autocast_enabled(inputs.device.type)
        ):
            args = tuple(a.to(weight.dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in args)
            return module(*args, **kwargs).to(inputs.dtype)
        return module(*args, **kwargs)

    def __setattr__(self, attribute: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and "original_module" in vars(self).get("_modules", {}):
            setattr(self.current, attribute, value)  # as what is read of it is the current module's
        else:
            super().__setattr__(attribute, value)

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            if attribute in ("original_module", "modules_to_save") or attribute.startswith("_"):
                raise
            return getattr(self.current, attribute)
