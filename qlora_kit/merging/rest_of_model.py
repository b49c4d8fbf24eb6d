"""What a merge does to the model beside its adapted layers: whole trained modules, the dtype of the rest, and what the
model and its config say of how it is stored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.spill import Spill, set_data_
from ..errors import MergeError
from ..injection.adapted import Adapted
from ..injection.engine import Injection, swap_
from ..naming import StandIn, Tree, base_of, every_module, module_at
from ..training.preparation.float32 import held_in_float32
from .fidelity import checked_cast
from .task import MergeTask
from .unsaved_buffers import of_another_dtype

_MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
_RECORDS = ("configs", "active", "trainable", "disabled", "set_aside", "backbones", "plan")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_ADAPTER_FLAGS = ("active_adapters", "disable_adapters", "scaling")
_ATTRIBUTES = ("hf_quantizer", "quantization_method")


def keep_state_(face: nn.Module, adapted: Adapted, undo: Injection) -> None:
    """Note what the adapters and the modules of the model and its ``face`` say of themselves (adapters, modes, hooks,
    biases), to be put back as it is now once the modules are."""
    held = [_held(adapted, name) for name in _RECORDS]
    modules = every_module(adapted.root)
    modes = [(m, m.training) for m in (face, *modules) if isinstance(m, nn.Module) and "training" in vars(m)]
    for module in (face, *modules) if isinstance(face, nn.Module) else modules:
        # Of hooks only those that are there: a merge adds none. torch.compile's wrapper has some of these from inside.
        attributes = vars(module)
        held += [_held(module, name) for name in _HOOKS if attributes.get(name)]
        if isinstance(module, StandIn):
            held += [_held(module, name) for name in _ADAPTER_FLAGS if name in vars(module)]
    kept = adapted.kept_biases.values
    held.append((adapted.kept_biases, "values", kept, copy.copy(kept)))
    biases: list[Any] = [base_of(module_at(adapted.root, path)).bias for path in kept]
    values = [None if bias is None else bias.detach().clone() for bias in biases]
    trainable = [(p, p.requires_grad) for m in modules for p in m._parameters.values() if p is not None]

    def restore() -> None:
        for holder, name, value, content in held:
            if isinstance(value, dict):  # others may hold it
                value.clear()
                value.update(content)
            setattr(holder, name, value if isinstance(value, dict) else content)
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for bias, before in zip(biases, values, strict=True):
                if bias is not None:
                    bias.copy_(before)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)

    undo.on_undo(restore)


def _held(holder: Any, name: str) -> tuple[Any, str, Any, Any]:
    """The record ``name`` of ``holder``, and what is in it now."""
    value = vars(holder)[name]
    return holder, name, value, value.copy() if isinstance(value, (dict, list)) else value


def put_trained_copies_(adapted: Adapted, task: MergeTask, undo: Injection) -> None:
    """In the place of each ``modules_to_save`` the copy trained by one of the merged, in the dtype asked for or else in
    the original's dtypes; or the original."""
    tree = Tree(adapted.root)
    for path, saved in adapted.saved_modules(tree).items():
        module = saved.original_module
        chosen = next((name for name in task.parts if name in saved.modules_to_save), None)
        if chosen is not None:
            original = module.state_dict()
            module = _copied(saved.modules_to_save[chosen])
            for key, tensor in module.state_dict(keep_vars=True).items():
                tensor.data = checked_cast(f"{path}.{key}", tensor, task.dtype or original[key].dtype)
        for alias in tree.paths_of(saved):
            swap_(adapted.root, alias, module, undo)


def _copied(module: nn.Module) -> nn.Module:
    """A copy that shares the hooks of ``module``: they may hold what can't or mustn't be copied."""
    hooks = {id(value): value for name, value in vars(module).items() if "_hooks" in name}
    return copy.deepcopy(module, hooks)


def cast_rest_(model: nn.Module, dtype: torch.dtype, spill: Spill, undo: Injection) -> None:
    """Bring what is still in another float type into ``dtype``; tied weights stay tied.

    Buffers that aren't saved get the dtype that they have in a model loaded in ``dtype``, see ``unsaved_buffers``.
    """
    for key, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state") or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise MergeError(
                f"{key}: expected a parameter that can be made dense, found {type(parameter).__name__} of "
                f"{parameter.dtype}; merge into='same', or register a codec whose dense_like dequantizes its module"
            )
    for key, tensor in model.state_dict(keep_vars=True).items():
        if torch.is_tensor(tensor) and tensor.is_floating_point() and tensor.dtype != dtype:
            _cast_(key, tensor, dtype, spill, undo)
    for key, buffer, own in of_another_dtype(model, dtype):
        _cast_(key, buffer, own, spill, undo)


def narrow_held_(model: nn.Module, spill: Spill, undo: Injection) -> None:
    """Give what preparation holds in float32 for training the dtype it had."""
    for key, tensor, dtype in held_in_float32(model):
        _cast_(key, tensor, dtype, spill, undo)


def _cast_(key: str, tensor: Tensor, dtype: torch.dtype, spill: Spill, undo: Injection) -> None:
    cast, before = checked_cast(key, tensor, dtype), spill.keep(tensor.data)
    undo.on_undo(partial(set_data_, tensor, before))
    tensor.data = cast


def forget_loading_(model: nn.Module, undo: Injection) -> None:
    """Drop the steps by which transformers gathered quantized weights while it loaded them."""
    if getattr(model, "_weight_conversions", None):
        from ..hf_quantizer import forget_gathering_

        undo.on_undo(partial(setattr, model, "_weight_conversions", forget_gathering_(model)))


def declare_storage_(model: nn.Module, task: MergeTask, undo: Injection) -> None:
    """Make the model and its config say how the weights are stored now."""
    config = getattr(model, "config", None)
    for holder in (model, config):
        if holder is not None:
            before = dict(vars(holder))
            undo.on_undo(partial(_put_back_, holder, before))
    if config is not None:
        if task.dtype is not None:
            config.dtype = task.dtype
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for mark in _MARKS:
        if getattr(model, mark, False):
            setattr(model, mark, False)
    for attribute in _ATTRIBUTES:
        if attribute in vars(model):
            delattr(model, attribute)
    if task.dtype is None and hasattr(model, "save_pretrained"):
        from ..hf_quantizer import record_quantization_

        record_quantization_(model)


def _put_back_(holder: Any, before: Mapping[str, Any]) -> None:
    vars(holder).clear()
    vars(holder).update(before)
