"""Adapters that are trained for a merge (``LoraConfig.merge_aware``): which layers round, by what the merge would do,
and whether a merge is the one that they are trained for.

A layer computes with rounded weights exactly where that merge would round them: linear layers, but for those whose
weight is read past them, which merging into a type leaves dense. The others compute as ever, since a merge into dense
weights keeps all of a delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..codecs import codec_for
from ..codecs.quantized import Quantized, Quantizer
from ..config.lora import LoraConfig
from ..config.merge_aware import MergeAware
from ..errors import MergeError, TargetError
from ..injection.adapted import Adapted
from ..injection.engine import with_hooks_of
from ..injection.read_past import ReadPast
from ..layers import Rounding, sharding_of
from ..training.preparation.quantize import linear_holding
from .base_choice import quantized_modules
from .task import MergeTask, storage_name


def make_aware_(adapted: Adapted, name: str, config: LoraConfig) -> None:
    """Have the layers of adapter ``name`` compute with the weights that the merge which ``config`` names would leave.

    Raises:
        TargetError: it would round none of them, or one that isn't linear; no layer is changed.
    """
    wanted = config.merged_into
    if wanted is None:
        return
    with adapted.mapped():
        layers, targets = adapted.layers(), _targets(adapted, _task_of(wanted, {name: 1.0}))
    targets = {path: target for path, target in targets.items() if name in layers[path].r}
    if not targets:
        raise TargetError(
            f"merge_aware={config.merge_aware!r}: expected adapted linear layers that this merge rounds to few bits, "
            f"found none among {list(layers)[:5]}; quantize the model first, name a type such as merge_aware='nf4', or "
            "leave it out (to load such an adapter for other storage, pass config= without it)"
        )
    for path in targets:
        if layers[path].family != "linear":
            raise TargetError(
                f"{path}: expected a linear layer to train through its rounding (merge_aware), found "
                f"{type(layers[path].base_layer).__name__}; take it out of target_modules"
            )
        if sharding_of(layers[path].base_layer) is not None:
            raise TargetError(
                f"{path}: expected a layer that this process holds whole to train through its rounding (merge_aware), "
                "found one that several share; leave merge_aware out"
            )
    for path, target in targets.items():  # equal ones may know of different scales, each of its own layer
        layers[path].merge_aware[name] = Rounding(target, holding)


def holding(base: nn.Module, quantized: Quantized) -> nn.Module:
    """The module that a merge leaves in the place of ``base`` to hold ``quantized``: of our own where ``base`` is one
    of its kind already."""
    codec = codec_for(base)
    own = codec.quantizer(base)
    alike = own is not None and (own.quant_type, own.double_quant) == (quantized.quant_type, quantized.double_quant)
    return with_hooks_of(base, linear_holding(base, quantized, packed=alike and codec.name == "packed"))


def storage_for(
    configs: Sequence[LoraConfig], into: Any, blocksize: int | str | None, double_quant: bool | None, *, otherwise: str
) -> tuple[Any, int | str | None, bool | None]:
    """``into``, ``blocksize`` and ``double_quant`` of a merge, with what adapters of ``configs`` are trained for in the
    place of what isn't given; ``otherwise`` where they are trained for none.

    Raises:
        MergeError: nothing is given, and they are trained for different ones.
    """
    trained = list(dict.fromkeys(trained_for(configs)))
    if into is None and len(trained) > 1:
        raise MergeError(
            f"into: expected a storage for adapters that are trained to be merged into different ones "
            f"({' and '.join(map(str, trained))}), found none; pass into='bfloat16', say, or merge one of them"
        )
    if not trained:
        return otherwise if into is None else storage_name(into), blocksize, double_quant
    chosen = trained[0].into if into is None else storage_name(into)
    for wanted in trained:
        if wanted.into == chosen:
            blocksize = wanted.blocksize if blocksize is None else blocksize
            double_quant = wanted.double_quant if double_quant is None else double_quant
    return chosen, blocksize, double_quant


def departures(task: MergeTask, trained: Sequence[MergeAware]) -> list[str]:
    """In what ``task`` departs from the merges that its adapters are ``trained`` for, storage apart."""
    if not trained:
        return []
    found = []
    if task.rounding != "nearest":
        found.append(f"rounding={task.rounding!r}")
    if task.residual_rank:
        found.append(f"residual_rank={task.residual_rank}")
    if task.base != "dequantized":
        found.append(f"base={task.base!r}")
    if any(weight != 1 for weight in task.parts.values()):
        found.append(f"weights={list(task.parts.values())}")
    return found


def departures_in(adapted: Adapted, task: MergeTask) -> list[str]:
    """The same with the storage of each layer, and of the modules beside them."""
    trained = trained_for([adapted.configs[name] for name in task.parts])
    found = departures(task, trained)
    if not trained:
        return found
    targets = _targets(adapted, task)
    own = {
        path: {layer.merge_aware[n].quantizer for n in task.parts if n in layer.merge_aware}
        for path, layer in adapted.layers().items()
    }
    others = [path for path, wanted in own.items() if wanted and wanted != {targets.get(path)}]
    if others:
        found.append(f"{len(others)} layers stored otherwise, {others[0]} for one")
    beside = [
        path
        for path, module in quantized_modules(adapted.root).items()
        if not own.get(path) and task.target(before := codec_for(module).quantizer(module), linear=True) != before
    ]
    if beside:
        found.append(f"{len(beside)} modules without the adapter stored anew, {beside[0]} for one")
    return found


def trained_for(configs: Sequence[LoraConfig]) -> list[MergeAware]:
    """The merges that adapters of ``configs`` are trained for."""
    return [wanted for config in configs if (wanted := config.merged_into) is not None]


def warning_of(trained: Sequence[MergeAware], found: Sequence[str]) -> str:
    """What to say of a merge with ``departures``."""
    return (
        f"merge: the adapters are trained to be merged into {' and '.join(dict.fromkeys(map(str, trained)))} "
        f"(merge_aware), and this merge is another: {'; '.join(found)}. What training has seen is lost in part"
    )


def _task_of(wanted: MergeAware, parts: dict[str, float]) -> MergeTask:
    return MergeTask(parts, wanted.into, blocksize=wanted.blocksize, double_quant=wanted.double_quant)


def _targets(adapted: Adapted, task: MergeTask) -> dict[str, Quantizer]:
    """How ``task`` rounds the adapted layers that it rounds, by path."""
    dense = set(ReadPast(adapted.tree()).dense()) if task.quantizes else set()
    found = {}
    for path, layer in adapted.layers().items():
        own = layer.codec.quantizer(layer.base_layer)
        target = task.target(own, linear=layer.family == "linear" and (own is not None or path not in dense))
        if target is not None:
            found[path] = target
    return found
