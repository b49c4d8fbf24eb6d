"""The base under its adapters, saved: with ``save_pretrained`` of the model that was wrapped, as ever.

transformers' own would write the adapted layers under names that no model has (``q_proj.base_layer.weight``), so that
they begin anew when it is loaded, in silence. While adapters are on a model, its ``save_pretrained`` therefore writes
what ``unload()`` would leave: the base's own tensors under their own names, in the dtypes from before a preparation,
with the biases, buffers and whole modules from before training. A base that a start has quantized says so in its config
from then on, so that the folder loads as it is stored; and adapters that belong to it name that folder as their base.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AdapterError
from ..injection.adapted import STANDING_IN, Adapted
from ..layers.rescaled import at_full_size_
from ..naming import StandIn, canonical, unwrapped
from ..training.preparation.float32 import held_in_float32
from .of_transformers import tie_base_

_SAVE = "save_pretrained"


def guard_methods_(adapted: Adapted) -> None:
    """Have the wrapped model's ``save_pretrained`` save, and its ``tie_weights`` tie, the base alone, for as long as
    adapters are on it."""
    root: Any = unwrapped(adapted.root)
    for name, own in zip(STANDING_IN, (save_base, tie_base_), strict=True):
        if hasattr(type(root), name) and name not in vars(root):
            setattr(root, name, partial(own, adapted))


def record_start_(adapted: Adapted, name: str) -> None:
    """After a start that may have quantized the base: have its config say how it is stored."""
    root: Any = unwrapped(adapted.root)
    if adapted.configs[name].init_lora_weights != "loftq" or not hasattr(type(root), _SAVE):
        return
    from ..hf_quantizer import forget_gathering_, record_quantization_

    if getattr(root, "hf_quantizer", None) is None:
        record_quantization_(root)
    else:  # loaded as it is, and so recorded
        forget_gathering_(root)


def save_base(adapted: Adapted, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """``save_pretrained`` of the model under ``adapted``: its own arguments, the base's tensors.

    Raises:
        AdapterError: adapters are merged into the base.
    """
    root: Any = unwrapped(adapted.root)
    if merged := [path for path, layer in adapted.layers().items() if layer.merged_adapters]:
        raise AdapterError(
            f"save_pretrained: expected a base without merged adapters, found some merged (into {merged[0]}, ...); "
            "lora.unmerge_adapter() first, or save the merged model: merge(lora).model.save_pretrained(folder)"
        )
    at_full_size_(root)
    if getattr(root, "_weight_conversions", None):
        from ..hf_quantizer import forget_gathering_

        forget_gathering_(root)
    state = kwargs.pop("state_dict", None)
    if state is None:
        state = base_state(adapted)
    # A model that was loaded quantized is asked for its state, whatever state is passed.
    root.state_dict = lambda *_, **__: state
    try:
        type(root).save_pretrained(root, save_directory, *args, **kwargs)
    finally:
        del root.state_dict
    for name in adapted.backbones:  # on the model that was quantized they would only add error
        place = str(Path(save_directory).resolve())
        adapted.configs[name] = dataclasses.replace(adapted.configs[name], base_model_name_or_path=place, revision=None)


def base_state(adapted: Adapted) -> dict[str, Tensor]:
    """The base's state dict as it would be without adapters; tensors are shared with the model where they can be."""
    root = unwrapped(adapted.root)
    holds = {path: m.holds for path, m in root.named_modules(remove_duplicate=False) if isinstance(m, StandIn)}
    dtypes = {id(tensor): dtype for _, tensor, dtype in held_in_float32(root)}
    kept = {} if adapted.disabled else {f"{path}.bias": value for path, value in adapted.kept_biases.values.items()}
    buffers = adapted.buffers.originals(adapted.root)
    state = {}
    for key, tensor in root.state_dict(keep_vars=True).items():
        own = _own_name(key, holds)
        if own is not None:
            value = kept.get(own, buffers.get(id(tensor), tensor)).detach()
            state[own] = value.to(dtypes.get(id(tensor), value.dtype))
    return state


def _own_name(key: str, holds: dict[str, str]) -> str | None:
    """What the base calls the tensor ``key``; None if it is an adapter's."""
    path, kept = "", []
    inside: str | None = None  # the attribute under which a stand-in holds what it stands for
    for part in key.split("."):
        if inside is None:
            kept.append(part)
        elif part != inside:
            return None
        path = f"{path}.{part}" if path else part
        inside = holds.get(path)
    return canonical(".".join(kept))
