"""A check that training reaches the adapters.

A frozen base fails silently: with reentrant checkpointing, a weight repacked for inference, or a batch that
bypasses a module, the loss is finite, nothing raises, and the adapter stays where it started.
``check_gradients`` looks, and says which adapters no gradient reached and why that may be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdapterError
from ...injection.buffers import buffers_kept
from ...layers import AdapterLayer, ModulesToSave


@dataclass(frozen=True)
class GradientReport:
    """The norm of the gradient that reached each trainable adapter, keyed "path (adapter)"."""

    norms: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        low, high = min(self.norms.values()), max(self.norms.values())
        return f"gradients reach all {len(self.norms)} trainable adapters (norms {low:.2e} to {high:.2e})"


def check_gradients(model: nn.Module, **inputs: Any) -> GradientReport:
    """Make sure that gradients reach every trainable adapter of ``model``.

    ``check_gradients(model)`` reads the gradients that a backward pass has left. ``check_gradients(model,
    **batch)`` runs one of its own, in training mode, and leaves gradients, modes, buffers and random state as they
    were. At the usual start B = 0 and A's gradient is exactly zero, so an adapter is judged by its tensors together.

    Args:
        inputs: keyword arguments of the forward. The loss is the output's ``loss`` where it has one (give
            ``labels``), and the mean square of the first output tensor otherwise.

    Raises:
        AdapterError: no adapters, none trainable, or no (or no finite) gradient at some of them, with likely causes.
    """
    adapters = _trainable_tensors(model)
    if inputs:
        with _undisturbed(model):
            loss = _loss(model(**inputs))
            if loss.requires_grad:  # if not, no gradient arrives anywhere, and the report below says so
                loss.backward()
            norms = {key: _gradient_norm(tensors) for key, (_, tensors) in adapters.items()}
    else:
        norms = {key: _gradient_norm(tensors) for key, (_, tensors) in adapters.items()}
    lost = [key for key, norm in norms.items() if not 0 < norm < float("inf")]
    if lost:
        raise AdapterError(_explanation(adapters, norms, lost))
    return GradientReport(norms)


def _trainable_tensors(model: nn.Module) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """The adapter layer and the tensors of each adapter that requires gradients, by "path (adapter)"."""
    found = 0
    trainable: dict[str, tuple[nn.Module, list[Tensor]]] = {}
    root = getattr(model, "model", model) if hasattr(model, "peft_config") else model
    for path, module in root.named_modules():
        if isinstance(module, (AdapterLayer, ModulesToSave)):
            for name in module.adapter_names():
                found += 1
                tensors = [t for t in module.adapter_tensors(name).values() if t.requires_grad]
                if tensors:
                    trainable[f"{path} ({name})"] = (module, tensors)
    if not found:
        raise AdapterError(
            f"check_gradients: expected a model with adapters, found {type(model).__name__} without any; "
            "call apply_lora first"
        )
    if not trainable:
        raise AdapterError(
            f"check_gradients: expected a trainable adapter, found {found} frozen ones; call set_adapter(name), "
            "load with is_trainable=True, and prepare the model before apply_lora rather than after"
        )
    return trainable


def _gradient_norm(tensors: list[Tensor]) -> float:
    squares = [t.grad.double().square().sum().item() for t in tensors if t.grad is not None]
    return sum(squares) ** 0.5


def _explanation(
    adapters: Mapping[str, tuple[nn.Module, list[Tensor]]], norms: Mapping[str, float], lost: list[str]
) -> str:
    some = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    layers = [adapters[key][0] for key in lost]
    missing = all(tensor.grad is None for key in lost for tensor in adapters[key][1])
    if any(norms[key] != norms[key] or norms[key] == float("inf") for key in lost):
        cause = "a value overflowed: train in bfloat16 or with a loss scaler, or lower the learning rate"
    elif any(isinstance(layer, AdapterLayer) and layer.merged for layer in layers):
        cause = "they are merged into the base weight: call unmerge_adapter()"
    elif any(getattr(layer, "disable_adapters", False) for layer in layers):
        cause = "the adapters are disabled: call enable_adapter_layers()"
    elif len(lost) < len(adapters):
        cause = (
            "others are reached, so these took no part in the loss: a module that this batch doesn't use (an "
            "expert, a second tower), an inactive adapter, or a gradient that underflowed in float16"
        )
    elif missing:
        cause = (
            "no backward pass was run or zero_grad() came after it (pass a batch: check_gradients(model, **batch)); "
            "the forward ran under torch.no_grad(); or checkpointing is reentrant (use_reentrant=False)"
        )
    else:
        cause = "the loss doesn't depend on the adapters (all labels -100?), or it underflowed in float16"
    return f"no usable gradient at {len(lost)} of {len(adapters)} trainable adapters: {some}. Likely cause: {cause}"


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is not None:
        return loss
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
    first = next(value for value in values if isinstance(value, Tensor))
    return first.float().square().mean()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Training mode and empty gradients inside; modes, gradients, buffers and random state as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = {p.device.index for p, _ in gradients if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(d for d in devices if d is not None)), buffers_kept(model):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            model.train()
            with torch.enable_grad():
                yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, training in modes:
                module.training = training
