"""State dicts: of one adapter under the keys of its file, and of the base model under its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_files.folder import PREFIX, read_adapter
from ..adapter_files.tensors import adapter_state, load_adapter_state_
from ..errors import StorageError, closest
from ..model.loading import without_mismatched
from ..naming import StandIn, Tree, base_of, unwrapped
from .hub import adapter_folder
from .injecting import manager_of
from .meta import with_memory_, without_memory_
from .model import no_leftover_keys


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter under the keys of an adapter file, as copies on the CPU.

    Args:
        model: wrapped, or bare with layers injected (then the keys lack "base_model.model.").
        state_dict: take the values from this state dict of ``model``, gathered from shards say.
        unwrap_compiled: accepted for PEFT's sake; a compiled model is looked into anyway.
        save_embedding_layers: "auto", True or False; see ``LoraModel.save_pretrained``.

    Raises:
        AdapterError: no adapter of this name.
    """
    model, manager = unwrapped(model), manager_of(model)
    state = adapter_state(manager, adapter_name, state_dict, save_embedding_layers=save_embedding_layers)
    return state if manager is model else {key.removeprefix(PREFIX): value for key, value in state.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Load what ``get_peft_model_state_dict`` gave, all or nothing; the adapter must be there already.

    Args:
        ignore_mismatched_sizes: leave out, with a warning, tensors of another shape than the model's.
        low_cpu_mem_usage: the adapter was injected with it, so its factors have no memory yet and get some here.

    Returns:
        torch's pair of missing and unexpected keys, always empty.

    Raises:
        StorageError: a key is missing, unexpected or mis-shaped; lists them.
    """
    manager = manager_of(model)
    state = {key if key.startswith(PREFIX) else PREFIX + key: value for key, value in peft_model_state_dict.items()}
    filled = with_memory_(manager, adapter_name) if low_cpu_mem_usage else []
    try:
        if ignore_mismatched_sizes:
            state = without_mismatched(state, adapter_state(manager, adapter_name))
        load_adapter_state_(manager, adapter_name, state)
    except BaseException:
        without_memory_(filled)
        raise
    return no_leftover_keys()


def load_peft_weights(
    model_id: str | os.PathLike[str], device: str | torch.device | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """The tensors in an adapter's file, on ``device`` (default: the CPU)."""
    _, state = read_adapter(adapter_folder(model_id, **kwargs))
    return {key: value.to(device or "cpu") for key, value in state.items()}


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own state dict, by its own keys, as if no adapter were in it; the tensors aren't copied."""
    state: dict[str, Any] = {}
    for prefix, module in _own_modules(model):
        module._save_to_state_dict(state, prefix, keep_vars=False)
    return state


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Load what ``get_base_model_state_dict`` gave into the base under its adapters.

    Returns:
        torch's pair of missing and unexpected keys, both empty if ``strict``.

    Raises:
        StorageError: a shape differs; or with ``strict`` a key is missing or unexpected. Nothing is changed.
    """
    own = get_base_model_state_dict(model)
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    unfit = [
        key
        for key in own.keys() & state_dict.keys()
        if torch.is_tensor(own[key]) and own[key].shape != state_dict[key].shape
    ]
    if unfit or (strict and (missing or unexpected)):
        near = {key: closest(key, own, count=1) for key in unexpected[:3]}
        raise StorageError(
            f"set_base_model_state_dict: expected the {len(own)} tensors of the base model, found {len(missing)} "
            f"missing ({missing[:3]}), {len(unexpected)} unexpected ({near}) and {len(unfit)} of another shape "
            f"({unfit[:3]}); pass what get_base_model_state_dict gives, or strict=False to load what there is"
        )
    errors: list[str] = []
    for prefix, module in _own_modules(model):
        module._load_from_state_dict(dict(state_dict), prefix, {}, False, [], [], errors)
    if errors:
        raise StorageError(f"set_base_model_state_dict: expected tensors that fit, found others: {errors[0]}")
    return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)


def _own_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of the base model, with the prefix of its tensors' keys."""
    found = []
    for path, module in Tree(manager_of(model).model).modules.items():
        inner = base_of(module).named_modules() if isinstance(module, StandIn) else [("", module)]
        for name, part in inner:
            whole = ".".join(piece for piece in (path, name) if piece)
            found.append((f"{whole}." if whole else "", part))
    return found
