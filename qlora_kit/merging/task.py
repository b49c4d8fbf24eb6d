"""What ``merge`` is asked for, checked before anything is written: which adapters, weighted how, into what."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_files.tensors import adapter_slots
from ..codecs.codebooks import STORED_TYPES
from ..codecs.finite import all_finite
from ..codecs.quantized import Quantizer
from ..codecs.shards.tensors import engine_of
from ..errors import MergeError, closest
from ..injection.adapted import Adapted
from ..injection.biases import bias_parameters
from ..layers import AdapterLayer, ModulesToSave, sharding_of
from ..layers.sharded.together import all_or_none
from .requantize import WAYS, target_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What else these are called, in scripts and on command lines.
_ALIASES = {
    **dict.fromkeys(("fp32", "f32", "float", "single"), "float32"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("bf16", "bfloat"), "bfloat16"),
}
BASES = ("dequantized", "original", "auto")


def storage_name(storage: Any) -> Any:
    """The name that this toolkit has for a dtype or a storage: "bfloat16" of ``torch.bfloat16``, "torch.bfloat16" and
    "bf16", "nf4" of "NF4". What it doesn't know stays as it is."""
    if not isinstance(storage, (str, torch.dtype)):
        return storage
    name = str(storage).removeprefix("torch.").lower()
    name = _ALIASES.get(name, name)
    return name if name in ("same", *DTYPES, *STORED_TYPES) else storage


@dataclass(frozen=True)
class MergeTask:
    """What is asked for.

    Attributes:
        parts: the weight of each adapter by name.
        into: "same", a dtype's name, or a k-bit type; see ``storage_name``.
        rounding, residual_rank, residual_dtype, blocksize, double_quant: of k-bit layers; see ``merge``.
        base: "dequantized", "original" or "auto".
        original: the folder of the 16-bit weights, where one is needed.
        account: whether layers are measured whose numbers decide nothing.
        trained: whether it is the merge that the adapters are trained for, which keeps all that matters of them.
        least_retained: share of the deltas below which requantizing is refused, if it ``refuses`` at all.
    """

    parts: dict[str, float]
    into: str = "same"
    rounding: str = "nearest"
    residual_rank: int = 0
    base: str = "dequantized"
    original: Path | None = None
    blocksize: int | str | None = None
    double_quant: bool | None = None
    least_retained: float = 0.5
    refuses: bool = True
    residual_dtype: torch.dtype | None = None
    account: bool = True
    trained: bool = False

    def __post_init__(self) -> None:
        if self.into not in ("same", *DTYPES, *STORED_TYPES):
            raise MergeError(
                f"into={self.into!r}: expected 'same' or one of {sorted(DTYPES)}, or a type of few bits such as 'nf4', "
                f"'int8', 'nf3' or 'nf2'; the closest are {closest(str(self.into), (*DTYPES, *STORED_TYPES))}"
            )
        for name, value, known in (("rounding", self.rounding, WAYS), ("base", self.base, BASES)):
            if value not in known:
                raise MergeError(f"{name}={value!r}: expected one of {list(known)}; pass {name}={known[0]!r}")
        rank = self.residual_rank
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise MergeError(f"residual_rank={rank!r}: expected a whole number of at least 0; pass residual_rank=8")
        idle = {"rounding": (self.rounding, "nearest"), "residual_rank": (rank, 0)}
        odd = [name for name, (value, at_rest) in idle.items() if value != at_rest]
        if self.dtype is not None and odd:
            expected = " and ".join(f"{name}={idle[name][1]!r}" for name in odd)
            found = " and ".join(repr(idle[name][0]) for name in odd)
            raise MergeError(
                f"into={self.into!r}: expected {expected}, since nothing is rounded to few bits, found {found}; leave "
                f"{' and '.join(odd)} out, or merge into 'same' or a k-bit type"
            )
        size = self.blocksize
        if not (size is None or size == "row" or (isinstance(size, int) and not isinstance(size, bool) and size > 0)):
            raise MergeError(f"blocksize={size!r}: expected a positive number or 'row'; pass blocksize=64")

    @property
    def dtype(self) -> torch.dtype | None:
        """What the whole model is to be in, if it is to be dense."""
        return DTYPES.get(self.into)

    @property
    def quantizes(self) -> bool:
        """Whether dense modules are to be stored in few bits."""
        return self.into != "same" and self.dtype is None

    def rounds(self, layer: AdapterLayer, *, stays_dense: bool = False) -> bool:
        """Whether ``layer``'s merged weight is rounded to few bits, unless its module ``stays_dense`` if it is now."""
        own = layer.codec.quantizer(layer.base_layer)
        return self.target(own, linear=layer.family == "linear" and not stays_dense) is not None

    def target(self, own: Quantizer | None, *, linear: bool) -> Quantizer | None:
        """How a module is to be quantized that is stored as ``own`` now (None: dense); None if it isn't to be."""
        if self.dtype is not None:
            return None
        if self.into == "same" or not linear:
            return own
        return target_of(own, self.into, self.blocksize, self.double_quant)


def chosen_parts(
    adapted: Adapted, adapters: str | Sequence[str] | None, weights: Sequence[float] | Mapping[str, float] | None
) -> dict[str, float]:
    """The weight of each adapter to merge: all that ``merge_adapter`` merged and the active ones if none is named.

    Raises:
        MergeError: nothing to merge, unknown or repeated names, weights that don't fit, or two trained copies of one
            module.
    """
    known = f"the model has {sorted(adapted.configs)}"
    if adapters is None:
        merged = [name for layer in adapted.layers().values() for name in layer.merged_adapters]
        names = list(dict.fromkeys([*merged, *adapted.active]))
    else:
        names = [adapters] if isinstance(adapters, str) else list(adapters)
    unknown = [name for name in names if name not in adapted.configs]
    if unknown:
        raise MergeError(f"unknown adapter(s) {unknown}; {known}")
    if not names:
        raise MergeError(f"nothing to merge: no adapter is active or named; {known}")
    if len(set(names)) != len(names):
        raise MergeError(f"adapters={names}: a name stands twice, so its delta would be added twice")
    adapted.check_one_copy(names, "the merged model has room for one, so merge one of them", MergeError)
    parts, copies = _weighted(names, weights), adapted.copies(names)
    for name, weight in parts.items():
        whole = [path for path, holders in copies.items() if name in holders]
        if weight != 1 and (whole or adapted.configs[name].bias != "none"):
            what = f"a trained copy of {whole[0]}" if whole else "trained biases"
            raise MergeError(
                f"adapter {name!r}: expected weight 1 for an adapter with {what}, which can't be weighted, found "
                f"{weight}; leave its weight at 1"
            )
    return parts


def _weighted(names: list[str], weights: Sequence[float] | Mapping[str, float] | None) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(names, 1.0)
    given: dict[str, Any] = dict(weights) if isinstance(weights, Mapping) else dict(zip(names, weights, strict=False))
    if set(given) != set(names) or len(weights) != len(names):
        raise MergeError(
            f"weights={weights!r}: expected a number for each of the adapters {names}, found {len(weights)}; pass a "
            "list in their order, or a dictionary by name"
        )
    for name, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise MergeError(f"weights: expected a finite number for {name!r}, found {weight!r}")
    if not any(given.values()):
        raise MergeError(f"nothing to merge: every weight is 0; leave weights out, or use unload(), for {names}")
    return {name: float(given[name]) for name in names}


def original_folder(root: nn.Module, base: str, original: str | os.PathLike[str] | None) -> Path | None:
    """The folder of the 16-bit weights, if ``base`` needs one: ``original``, or the one that the model came from.

    Raises:
        MergeError: none is named, or it isn't there.
    """
    if base not in ("original", "auto"):
        return None
    source = original or getattr(getattr(root, "config", None), "_name_or_path", None)
    if not source or not Path(source).is_dir():
        raise MergeError(
            f"base={base!r}: expected the folder with the 16-bit safetensors of this model, found "
            f"{str(source or '')!r}; pass original=FOLDER"
        )
    return Path(source)


def check_in_memory(layers: Mapping[str, AdapterLayer]) -> None:
    """Raise a MergeError unless the weights under ``layers``, by path, are there to be merged into."""
    for path, layer in layers.items():
        if (engine := engine_of(layer)) is not None:
            raise MergeError(
                f"{path}: expected whole weights in this process, found them sharded by {engine}; save the adapter "
                "(save_pretrained, on every rank) and merge it in one process: merge(LoraModel.from_pretrained(base, "
                "folder)), or from files larger than memory with qlora-kit merge"
            )
        if layer.codec.device(layer.base_layer).type == "meta":
            raise MergeError(
                f"{path}: expected a weight in memory, found one on the meta device (offloaded, or never loaded); "
                "load the model without offloading to merge it, or merge the files (qlora-kit merge)"
            )


def check_layers(adapted: Adapted, task: MergeTask, force: bool) -> None:
    """Refuse before anything is written what can be seen before: offloaded weights, factors not finite, a base that an
    adapter wasn't made for."""
    layers = adapted.layers()
    shared = next((layer.base_layer for layer in layers.values() if sharding_of(layer.base_layer) is not None), None)
    if shared is not None:  # one process may find in its part what others don't
        with all_or_none(shared):
            _check_layers(adapted, layers, task, force)
    else:
        _check_layers(adapted, layers, task, force)


def _check_layers(adapted: Adapted, layers: Mapping[str, AdapterLayer], task: MergeTask, force: bool) -> None:
    check_in_memory(layers)
    _check_sharded(layers, task)
    for path, layer in layers.items():
        for name in task.parts:
            if name in layer.r and not all(map(all_finite, layer.factors(name))):
                raise MergeError(
                    f"{path}: adapter {name!r} holds NaN or infinite values; reload it or train it again "
                    "(no layer was changed)"
                )
    started = [name for name in task.parts if name in adapted.backbones]
    if task.base == "original" and started and not force:
        raise MergeError(
            f"base='original': expected adapters that don't make up for the rounding of their base, found {started}, "
            "which LoftQ started: on the original weights their correction is an error; merge into the dequantized "
            "base, measure both with base='auto', or pass force=True"
        )


def _check_sharded(layers: Mapping[str, AdapterLayer], task: MergeTask) -> None:
    """Of layers that several processes share each merges its part, which says nothing of what looks at whole ones."""
    asked = {"into": task.into, "rounding": task.rounding, "residual_rank": task.residual_rank, "base": task.base}
    odd = [f"{name}={value!r}" for name, value in asked.items() if value not in ("same", "nearest", 0, "dequantized")]
    found = {path: sharding_of(layer.base_layer) for path, layer in layers.items()}
    shared = {path: how for path, how in found.items() if how is not None and how.size > 1}
    if task.dtype is not None and all(how.mesh is None for how in shared.values()):  # dense parts of the same
        odd = [each for each in odd if not each.startswith("into=")]
    if odd and shared:
        raise MergeError(
            f"{next(iter(shared))}: expected a merge into the same storage, to the nearest codes, of a layer that "
            f"several processes share, found {', '.join(odd)}; leave that out, or save the adapter and merge it in one "
            "process (qlora-kit merge)"
        )


def check_consumed(
    adapted: Adapted,
    parts: Mapping[str, float],
    layers: Mapping[str, AdapterLayer],
    copies: Mapping[str, ModulesToSave],
) -> None:
    """Refuse to leave a tensor of an adapter behind."""
    for name in parts:
        held: list[Any] = [layer for layer in layers.values() if name in layer.r]
        held += [saved for saved in copies.values() if name in saved.modules_to_save]
        taken = {_whose(tensor) for module in held for tensor in module.adapter_tensors(name).values()}
        taken |= {id(bias) for bias in bias_parameters(adapted.root, adapted.configs[name].bias, name).values()}
        taken |= {_whose(buffer) for buffer in adapted.buffers.of(adapted.root, name).values()}
        left = [slot.key for slot in adapter_slots(adapted, name) if _whose(slot.tensor) not in taken]
        if left:
            raise MergeError(
                f"adapter {name!r}: expected every tensor of it to go into the merged model, found {len(left)} that "
                f"wouldn't, {left[0]} for one; unload() other wrappers of this model first"
            )


def _whose(tensor: Tensor) -> int:
    """What tells a parameter, also by the view that another layer has of it."""
    return id(tensor if tensor._base is None else tensor._base)
