"""Make a quantized (or dense) model ready for adapters, with a bill of what its memory holds.

What a frozen base needs before training is little: no parameter that requires a gradient, normalization in
float32, packed weights that the platform can't rewrite behind our back, and activation checkpointing that
works although nothing before the first adapter requires a gradient. All of it is for training, so
``leave_preparation_`` takes it back where the adapters leave: the model is then what it was before.

Why no input gradients. Non-reentrant checkpointing finds the adapters' parameters by itself. Making the
embedding's output require a gradient, as reentrant checkpointing needs, only adds a backward pass through the
layers before the first adapter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...codecs import Codec, protect_storage_, registered_codec
from ...errors import AdapterError
from ...injection.read_past import ReadPast
from ...layers import AdapterLayer, ModulesToSave
from ...layers.sharded.parts import local
from ...layers.sharded.sharding import whole_shape
from ...naming import Tree
from .float32 import held_in_float32, hold_in_float32_, release_from_float32_

NOT_OFFERED = "not offered by the model"
_CHANGED = "_changed_for_training"
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class MemoryBill:
    """Bytes of a model's parameters and buffers by kind; what several modules share is counted once.

    Attributes:
        bytes: kind -> bytes now.
        before: kind -> bytes before ``prepare_model_for_kbit_training``; equal to ``bytes`` otherwise.
        activation_checkpointing: "non-reentrant", "reentrant", "off" or "not offered by the model".
    """

    bytes: dict[str, int]
    before: dict[str, int]
    activation_checkpointing: str = "off"

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}

    def __str__(self) -> str:
        kinds = sorted({*self.before, *self.bytes}, key=lambda kind: -max(self._pair(kind)))
        rows = [(kind, *self._pair(kind)) for kind in kinds]
        rows.append(("total", sum(self.before.values()), self.total))
        width = max(len(kind) for kind, *_ in rows)
        lines = [f"{'kind':{width}}  {'before':>15}  {'after':>15}"]
        lines += [f"{kind:{width}}  {before:>15,}  {after:>15,}" for kind, before, after in rows]
        lines.append(f"activation checkpointing: {self.activation_checkpointing}")
        return "\n".join(lines)

    def _pair(self, kind: str) -> tuple[int, int]:
        return self.before.get(kind, 0), self.bytes.get(kind, 0)


@dataclass
class Preparation:
    """What preparing a model changed that its modules in float32 don't say themselves; it is held by the model.

    Attributes:
        trained: names of the parameters that required a gradient before.
        checkpointing: whether it switched activation checkpointing on.
        input_gradients: whether it made the embeddings' output require a gradient.
    """

    trained: frozenset[str]
    checkpointing: bool = False
    input_gradients: bool = False


def prepare_model_for_kbit_training(
    model: Model,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    cast_embeddings: bool = False,
    cast_head: bool = False,
) -> Model:
    """Freeze ``model`` and make it fit for adapters; in place, and the same object is returned.

    Works on 4-bit, 8-bit and dense models, on storage formats it doesn't know (left as they are), with and
    without transformers. Call it before ``apply_lora``; a second call changes nothing.

    Args:
        model: any torch model.
        use_gradient_checkpointing: recompute activations in the backward pass, where the model offers it.
        gradient_checkpointing_kwargs: for ``torch.utils.checkpoint``; ``use_reentrant=False`` unless given.
        auto_clear_cache: give the memory that casts left free back to the accelerator's driver.
        cast_embeddings: hold the embeddings in float32 too. Worth its memory only if they will be trained.
        cast_head: compute the output head in float32 and return float32 logits.

    Returns:
        ``model``, norms in float32 but for those whose weight or dtype other modules read, with a printable
        ``model.memory_bill`` (see ``MemoryBill``). Merging the adapters or unloading them takes all of it back.

    Raises:
        AdapterError: ``model`` holds adapters already; freezing would take them out of training.
    """
    for path, module in model.named_modules():
        if isinstance(module, (AdapterLayer, ModulesToSave)):
            raise AdapterError(
                f"{path}: expected a model without adapters, found {type(module).__name__}; call "
                "prepare_model_for_kbit_training first and apply_lora on what it returns"
            )
    before = memory_bill(model).bytes
    changed = vars(model).get(_CHANGED)
    if changed is None:
        trained = frozenset(n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
        changed = vars(model)[_CHANGED] = Preparation(trained)
    model.requires_grad_(False)
    tree = Tree(model)
    past = ReadPast(tree)  # kernels want one dtype, and what takes a norm's for its input's would get float32
    chosen = [module for path, module in tree.firsts() if is_norm(module) and past.get(path) is None]
    if cast_embeddings:
        chosen += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = _output_head(model) if cast_head else None
    if head is not None:
        chosen.append(head)
    hold_in_float32_(model, chosen, keep_output=head)
    if auto_clear_cache:
        _clear_cache()
    protect_storage_(model)
    checkpointing = "off"
    if use_gradient_checkpointing:
        checkpointing = checkpoint_activations_(model, dict(gradient_checkpointing_kwargs or {}), changed)
    model.memory_bill = MemoryBill(memory_bill(model).bytes, before, checkpointing)  # type: ignore[assignment]
    return model


def _clear_cache() -> None:
    kind = torch.accelerator.current_accelerator(check_available=True)
    clear = None if kind is None else getattr(getattr(torch, kind.type, None), "empty_cache", None)
    if clear is not None:
        clear()


#: The old name of ``prepare_model_for_kbit_training``.
prepare_model_for_int8_training = prepare_model_for_kbit_training


def leave_preparation_(model: nn.Module) -> set[str]:
    """Take back what preparing ``model`` or a part of it did: casts, activation checkpointing, the bill.

    A float32 module gets its dtype back, bit for bit if it wasn't trained.

    Returns:
        Names of the parameters that required a gradient before; they don't yet again.
    """
    for _, tensor, dtype in list(held_in_float32(model)):
        tensor.data = tensor.data.to(dtype)
    release_from_float32_(model)
    trained: set[str] = set()
    for path, module in model.named_modules():
        changed = vars(module).pop(_CHANGED, None)
        if changed is not None:
            trained.update(f"{path}.{name}".lstrip(".") for name in changed.trained)
            vars(module).pop("memory_bill", None)
            stop_checkpointing_(module, recomputing=changed.checkpointing, input_gradients=changed.input_gradients)
    return trained


def memory_bill(model: nn.Module) -> MemoryBill:
    """What ``model``'s parameters and buffers weigh now, by kind. Changes nothing."""
    bill: dict[str, int] = defaultdict(int)
    seen: set[int] = set()

    def count(tensor: Tensor, kind: str) -> None:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            bill[kind] += local(tensor).nbytes  # what is in this process's memory

    for module in model.modules():
        if isinstance(module, (AdapterLayer, ModulesToSave)):
            for name in module.adapter_names():
                for tensor in module.adapter_tensors(name).values():
                    count(tensor, f"adapters, {_dtype(tensor)}")
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            continue
        weight = module._parameters.get("weight")
        codec = registered_codec(module)
        if codec is not None and weight is not None and _is_packed(codec, module, weight) and id(weight) not in seen:
            # Scales may be buffers, or kept outside parameters and buffers: the codec knows all of them.
            bill["k-bit scales"] += codec.nbytes(module) - weight.nbytes
            count(weight, "k-bit weights")
            stored = codec.stored(module)
            seen.update(id(t) for _, t in _own_tensors(module) if any(t is part for part in stored))
        foreign = weight is None and _holds_codes(module)
        for name, tensor in _own_tensors(module):
            if foreign and name != "bias":
                count(tensor, "k-bit scales" if tensor.is_floating_point() else "k-bit weights")
            else:
                count(tensor, _kind(module, tensor))
    kinds = {kind: nbytes for kind, nbytes in bill.items() if nbytes}
    return MemoryBill(kinds, dict(kinds))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, shared ones once; a packed weight counts as the weights it holds."""
    held: dict[int, int] = {}
    for module in model.modules():
        codec, weight = registered_codec(module), module._parameters.get("weight")
        if codec is not None and weight is not None and _is_packed(codec, module, weight):
            held[id(weight)] = prod(whole_shape(module, codec.shape(module)))
    counts = [(held.get(id(p), p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalization layer: its type is called one, and its weights are vectors."""
    parameters = [p for p in module._parameters.values() if p is not None]
    return "norm" in type(module).__name__.lower() and bool(parameters) and all(p.dim() <= 1 for p in parameters)


# -- kinds of storage ----------------------------------------------------------------------------------------


def _is_packed(codec: Codec, module: nn.Module, weight: Tensor) -> bool:
    """Whether ``weight`` holds codes; several of them may share an element of a type that calls itself float."""
    return not weight.is_floating_point() or local(weight).numel() != prod(codec.shape(module))


def _holds_codes(module: nn.Module) -> bool:
    """Whether a module without a ``weight`` keeps integer matrices beside floating scales (GPTQ, AWQ, ours)."""
    own = [tensor for _, tensor in _own_tensors(module)]
    codes = any(not t.is_floating_point() and t.dim() >= 2 for t in own)
    return codes and any(t.is_floating_point() for t in own)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    named = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in named if tensor is not None]


def _kind(module: nn.Module, tensor: Tensor) -> str:
    if not isinstance(tensor, nn.Parameter):
        return "buffers"
    sort = "norms" if is_norm(module) else "embeddings" if isinstance(module, nn.Embedding) else "dense weights"
    return f"{sort}, {_dtype(tensor)}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _output_head(model: nn.Module) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if head is None:
        raise AdapterError(
            f"cast_head=True: expected a model whose get_output_embeddings() gives its head, found "
            f"{type(model).__name__} without one; leave cast_head at False and cast the module yourself"
        )
    return head


# -- activation checkpointing --------------------------------------------------------------------------------


def checkpoint_activations_(model: nn.Module, kwargs: dict[str, Any], changed: Preparation) -> str:
    """Turn checkpointing on through the model's own interface, the current or the older one.

    Args:
        kwargs: for ``torch.utils.checkpoint``; ``use_reentrant=False`` unless given.
        changed: what is switched on is noted there.

    Returns:
        As ``MemoryBill.activation_checkpointing``.
    """
    kwargs.setdefault("use_reentrant", False)
    if not getattr(model, "supports_gradient_checkpointing", True):
        return NOT_OFFERED
    had_input_grads, was_on = asks_input_gradients(model), checkpoints(model)
    if had_input_grads and hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()  # type: ignore[operator]  # enabling would forget these hooks, not drop them
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)  # type: ignore[operator]
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)  # type: ignore[operator]
    else:
        return NOT_OFFERED
    changed.checkpointing |= not was_on
    asked = asks_input_gradients(model)
    if kwargs["use_reentrant"]:
        changed.input_gradients |= asked and not had_input_grads
    elif asked and not had_input_grads and hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()  # type: ignore[operator]
    if had_input_grads and not asked and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # type: ignore[operator]
    return "reentrant" if kwargs["use_reentrant"] else "non-reentrant"


def stop_checkpointing_(model: nn.Module, *, recomputing: bool, input_gradients: bool) -> None:
    """Turn off the recomputing of activations, and the gradients of the embeddings' output, where asked for."""
    stops = ("activation_checkpointing_disable", "gradient_checkpointing_disable")
    stop: Any = next((getattr(model, name) for name in stops if hasattr(model, name)), None)
    if recomputing and stop is not None:
        stop()
    if input_gradients and hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()  # type: ignore[operator]


def checkpoints(model: nn.Module) -> bool:
    """Whether activations of any module are recomputed."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def asks_input_gradients(model: nn.Module) -> bool:
    """Whether the embeddings' output is made to require a gradient."""
    return hasattr(model, "_require_grads_hook") or bool(getattr(model, "_require_grads_hooks", None))
