"""Dequantize -> merge -> requantize, with an account of what was lost (``fidelity``).

One path for every storage: the codec reads a float32 weight, the deltas of all adapters are summed in float32
and added, and one write puts the result where it goes, be it back into the same storage or into a dense
module. Each step leaves its undoing behind, and nothing that can fail comes after the last of them: a merge
happens as a whole or the model is bit for bit as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .codecs import Codec, codec_for, find_codec
from .errors import CodecError, MergeError
from .fidelity import LayerFidelity, MergeReport, fidelity
from .inject import Injection, swap_, with_hooks_of
from .kbit import release_from_float32_
from .layers import AdapterLayer

if TYPE_CHECKING:
    from .model import LoraModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(
    model: LoraModel,
    *,
    adapters: str | Sequence[str] | None = None,
    into: str = "same",
    progressbar: bool = False,
) -> MergeReport:
    """Merge adapters into the base weights of ``model`` and take its adapter layers out.

    What the adapters trained beside their factors (``modules_to_save``, biases) stays in the merged model;
    an adapter that was switched off is merged like any other.

    Args:
        adapters: names to merge, summed; by default the active ones and those that ``merge_adapter`` merged.
        into: "same" keeps each module's storage (a 4-bit layer is requantized); "float32", "bfloat16" and
            "float16" give a dense model, every k-bit module of it dequantized, adapted or not.

    Returns:
        The report; ``report.model`` is the merged base model.

    Raises:
        MergeError: nothing to merge, an unknown name, ``into`` not known, a value that is NaN or infinite (in
            a factor, in a sum, or after the cast to the storage's dtype; the module is named).
            On any error the model is as it was.
    """
    if into != "same" and into not in DTYPES:
        raise MergeError(f"into={into!r}: expected 'same' or one of {sorted(DTYPES)}")
    names = _checked_names(model, adapters)
    dtype = DTYPES.get(into)
    layers = model.adapter_layers()
    _check_layers(layers, names)
    report = MergeReport(model.model, into, names)
    injection = Injection()
    replaced: list[tuple[str, nn.Module]] = []
    try:
        if model._disabled:
            injection.on_undo(model.disable_adapter_layers)
            model.enable_adapter_layers()
        for path, layer in tqdm(layers.items(), desc="merging", disable=not progressbar):
            injection.on_undo(layer.way_back())
            destination, kept = _merge_layer(path, layer, [name for name in names if name in layer.r], dtype)
            replaced.append((path, destination))
            report.layers += kept
        replaced += _trained_copies(model, names, dtype)
        if dtype is not None:
            replaced += _unadapted(model.model, set(layers), dtype)
        for path, module in replaced:
            for alias in model.paths_of(path):
                swap_(model.model, alias, module, injection)
        if dtype is not None:
            _cast_rest_(model.model, dtype, injection)
    except BaseException:
        injection.undo()
        raise
    model._forget_()
    if dtype is not None:
        _declare_dense_(model.model, dtype)
    return report


def merge_in_place_(
    layers: dict[str, AdapterLayer], merges: Mapping[str, Sequence[str]], *, safe: bool = False
) -> None:
    """Merge into each layer's base weight the adapters that ``merges`` has for its path, reversibly; or on any
    error none anywhere."""
    injection = Injection()
    try:
        for path, names in merges.items():
            layer = layers[path]
            injection.on_undo(layer.way_back())
            try:
                layer.merge_(names, safe=safe)
            except (CodecError, MergeError) as error:
                raise MergeError(f"{path}: {error}") from error
    except BaseException:
        injection.undo()
        raise


def _merge_layer(
    path: str, layer: AdapterLayer, names: list[str], dtype: torch.dtype | None
) -> tuple[nn.Module, list[LayerFidelity]]:
    """The module that holds the merged weight, and what it kept (nothing to say of a layer without ``names``)."""
    if not names:
        layer.unmerge_()
        return _destination(layer.codec, layer.base_layer, dtype), []
    base, delta = layer.merged_weight([]), layer.summed_delta(names)
    ideal = base + delta
    _check_finite(path, ideal)
    destination = _destination(layer.codec, layer.base_layer, dtype)
    codec = codec_for(destination, path)
    try:
        if destination is layer.base_layer:
            layer.write_merged_(names, ideal)
        else:
            codec.write_(destination, ideal)
    except CodecError as error:
        raise MergeError(f"{path}: {error} (no layer was changed)") from error
    stored = codec.read(destination)
    _check_finite(path, stored)
    return destination, [fidelity(path, codec.name, base, delta, stored)]


def _destination(codec: Codec, base: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The module to write to: ``base`` itself, or a dense one in ``dtype`` where that differs."""
    if dtype is None:
        return base
    dense = codec.dense_like(base, dtype)
    if dense is not base:
        return with_hooks_of(base, dense)
    if codec.compute_dtype(base) == dtype:
        return base
    return _copied(base).to(dtype)


def _copied(module: nn.Module) -> nn.Module:
    """A copy that shares the hooks of ``module``: they may hold what can't or mustn't be copied."""
    hooks = {id(value): value for name, value in vars(module).items() if "_hooks" in name}
    return copy.deepcopy(module, hooks)


def _trained_copies(model: LoraModel, names: Sequence[str], dtype: torch.dtype | None) -> list[tuple[str, nn.Module]]:
    """What takes the place of each ``modules_to_save``: the copy trained by one of ``names``, in ``dtype`` or
    else in the original's dtypes, or the original."""
    replaced = []
    for path, saved in model.saved_modules().items():
        module = saved.original_module
        chosen = next((name for name in names if name in saved.modules_to_save), None)
        if chosen is not None:
            original = module.state_dict()
            module = _copied(saved.modules_to_save[chosen])
            for key, tensor in module.state_dict(keep_vars=True).items():
                tensor.data = _cast(f"{path}.{key}", tensor, dtype or original[key].dtype)
        replaced.append((path, module))
    return replaced


def _unadapted(model: nn.Module, adapted: set[str], dtype: torch.dtype) -> list[tuple[str, nn.Module]]:
    """Dense replacements of the k-bit modules that no adapter touches."""
    inside = tuple(f"{path}." for path in adapted) or ("\0",)
    replaced = []
    for path, module in model.named_modules():
        codec = find_codec(module)
        if codec is None or path in adapted or path.startswith(inside):
            continue
        dense = codec.dense_like(module, dtype)
        if dense is not module:
            _check_finite(path, dense.weight)  # type: ignore[arg-type]
            replaced.append((path, with_hooks_of(module, dense)))
    return replaced


def _cast_rest_(model: nn.Module, dtype: torch.dtype, injection: Injection) -> None:
    """Bring what is still in another float type into ``dtype``; tied weights stay tied.

    Buffers that aren't saved (rotary frequencies, say) are the model's own business and keep their dtype.
    """
    for key, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state") or not parameter.is_floating_point():
            raise MergeError(
                f"{key}: expected a parameter that can be made dense, found {type(parameter).__name__} of "
                f"{parameter.dtype}; merge into='same', or register a codec whose dense_like dequantizes its module"
            )
    for key, tensor in model.state_dict(keep_vars=True).items():
        if torch.is_tensor(tensor) and tensor.is_floating_point() and tensor.dtype != dtype:
            cast = _cast(key, tensor, dtype)
            injection.on_undo(partial(setattr, tensor, "data", tensor.data))
            tensor.data = cast


def _declare_dense_(model: nn.Module, dtype: torch.dtype) -> None:
    """Take the marks of a quantized model off, and what prepared it for training."""
    release_from_float32_(model)
    config = getattr(model, "config", None)
    if config is not None:
        config.dtype = dtype
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for mark in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, mark, False):
            setattr(model, mark, False)
    for attribute in ("hf_quantizer", "quantization_method", "memory_bill"):
        if attribute in vars(model):
            delattr(model, attribute)


def _checked_names(model: LoraModel, adapters: str | Sequence[str] | None) -> list[str]:
    known = f"the model has {sorted(model.peft_config)}"
    if adapters is None:
        merged = [name for layer in model.adapter_layers().values() for name in layer.merged_adapters]
        names = list(dict.fromkeys([*merged, *model.active_adapters]))
    else:
        names = [adapters] if isinstance(adapters, str) else list(adapters)
    unknown = [name for name in names if name not in model.peft_config]
    if unknown:
        raise MergeError(f"unknown adapter(s) {unknown}; {known}")
    if not names:
        raise MergeError(f"nothing to merge: no adapter is active or named; {known}")
    if len(set(names)) != len(names):
        raise MergeError(f"adapters={names}: a name stands twice, so its delta would be added twice")
    for path, saved in model.saved_modules().items():
        copies = [name for name in names if name in saved.modules_to_save]
        if len(copies) > 1:
            raise MergeError(
                f"adapters {copies} each hold their own copy of {path} (modules_to_save), and the merged model has "
                "room for one; merge one of them"
            )
    return names


def _check_layers(layers: dict[str, AdapterLayer], names: list[str]) -> None:
    """Refuse before anything is written what can be seen before: offloaded weights, factors not finite."""
    for path, layer in layers.items():
        if layer.codec.device(layer.base_layer).type == "meta":
            raise MergeError(
                f"{path}: expected a weight in memory, found one on the meta device (offloaded, or never loaded); "
                "load the model without offloading to merge it"
            )
        for name in names:
            if name in layer.r and not all(torch.isfinite(factor).all() for factor in layer.factors(name)):
                raise MergeError(
                    f"{path}: adapter {name!r} holds NaN or infinite values; reload it or train it again "
                    "(no layer was changed)"
                )


def _check_finite(path: str, weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise MergeError(
            f"{path}: expected a finite merged weight, found NaN or infinite values in {weight.dtype}; check the "
            "adapter for overflow, or merge into a wider dtype (no layer was changed)"
        )


def _cast(path: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor``'s values in ``dtype`` (what isn't a float stays), unless that turns a finite one infinite."""
    if not tensor.is_floating_point():
        return tensor.data
    cast = tensor.data.to(dtype)
    if (cast.isinf() & tensor.data.isfinite()).any():
        raise MergeError(
            f"{path}: a value overflows {dtype}; merge into a wider dtype, such as 'bfloat16' (no layer was changed)"
        )
    return cast
