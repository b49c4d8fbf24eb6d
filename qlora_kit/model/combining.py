"""Adapters combined into a new one on the model that holds them: ``LoraModel.add_weighted_adapter``.

Only factors are read: how the base keeps its weight, and in how many bits, plays no part, and no start runs, so a
base that LoftQ quantized for the sources stays as it is. The arithmetic is ``lowrank.algebra``'s.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from ..adapter_files.backbone import fingerprint
from ..adapter_files.combined_config import check_apart, combined_config, holder_of
from ..config.checks import check_bool, check_choice
from ..config.lora import LoraConfig
from ..errors import AdapterError
from ..injection.adapted import Adapted
from ..injection.engine import Plan, Request, Start, inject_, make_plan
from ..injection.heads import without_new_head
from ..layers import AdapterLayer, ModulesToSave
from ..lowrank.algebra import Branch, Combined, CombineReport, Recipe, Weights, combine_layers, distance
from ..naming import module_at
from .life import check_new

# A product of two factors, each rounded to its dtype, and the floor of what ``distance`` can tell.
_ROUNDINGS, _FLOOR = 4, 1e-6


def add_weighted_adapter(
    self: Any,
    adapters: Sequence[str],
    weights: Weights,
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    *,
    energy: float | None = None,
    seed: int = 0,
    own_ranks: bool = False,
    check_backbone: bool = True,
) -> CombineReport:
    """Add adapter ``adapter_name``, a combination of ``adapters``; frozen and not active. All of it, or nothing.

    PEFT's method, argument by argument, with its values, but for these differences: scalings of rslora count
    as they are (PEFT is off by the root of the rank); one weight too few and a name that is taken are errors
    (PEFT drops adapters, or does nothing, in silence); a single adapter is combined as asked (PEFT then goes
    over to "linear"); arguments that a type doesn't read are refused; trained copies (``modules_to_save``) that
    one of the sources has come along (PEFT adds untrained ones); and nothing dense is decomposed for "svd".

    The sources may have other ranks, alphas and scalings, and other targets: a module that one of them lacks
    counts as zero there. An adapter that LoftQ started holds the correction of its base: where all sources do,
    weights that sum to 1 keep it.

    Args:
        adapters: names on this model.
        weights: one a source, of either sign; or a mapping from path (its end, or a regular expression) to
            such a list, or a function of the path that gives one.
        combination_type: PEFT's "svd" (the best approximation of the weighted sum), "linear" (cheap, with
            cross terms), "cat" (ranks add up), "ties", "dare_linear", "dare_ties", "magnitude_prune" (on the
            factors) and these with "_svd" (on the deltas); "exact" (the weighted sum in the smallest rank that
            holds it), "knots" and "iso_c". See ``qlora_kit.lowrank.algebra``.
        svd_rank: of the result. None: the largest of the sources', for "svd" and "..._svd"; all that there is,
            for "exact", "knots", "iso_c".
        svd_clamp: quantile in (0.5, 1] at which the factors of the SVD types are cut off. PEFT's is of signed
            entries, so it depends on the signs that its decomposition happens to give; here a sign changes
            nothing.
        svd_full_matrices, svd_driver: accepted for PEFT's sake; they say how a dense decomposition is computed,
            never what it gives.
        density: share of entries that pruning keeps, in (0, 1].
        majority_sign_method: of TIES: "total" or "frequency".
        energy: in place of ``svd_rank``, for "svd" and "exact": in each module the smallest rank that keeps this
            share of the sum's squared norm.
        seed: of DARE's masks; each module's depend on it and the module's path alone.
        own_ranks: let each module keep the rank that it got. PEFT and this toolkit read that; servers know one rank and
            one scale for all modules, so by default factors are filled up with zeros to the largest.
        check_backbone: refuse sources that LoftQ started on another base than the one at hand.

    Returns:
        Each module's rank, captured energy and errors; a table when printed.

    Raises:
        AdapterError: an unknown or taken name, weights that don't fit, merged sources, trained biases, copies
            of the same module, adapters that don't fit together, NaN; before anything changes.
        ConfigError: an argument that is missing, out of range, or without use for the type.
    """
    recipe = Recipe(combination_type, svd_rank, density, majority_sign_method, svd_clamp, energy, seed)
    check_bool("svd_full_matrices", svd_full_matrices)
    if svd_driver is not None:
        check_choice("svd_driver", svd_driver, ("gesvd", "gesvdj", "gesvda"), "leave it out")
    return _combined_(
        self.adapted, adapters, weights, adapter_name, recipe, check_base=check_backbone, own_ranks=own_ranks
    )


@torch.no_grad()
def _combined_(
    adapted: Adapted,
    adapters: Sequence[str],
    weights: Weights,
    name: str,
    recipe: Recipe,
    *,
    check_base: bool = True,
    own_ranks: bool = False,
) -> CombineReport:
    """Add adapter ``name``, combined from ``adapters`` by ``recipe``."""
    names = _sources(adapted, adapters)
    check_new(adapted, name, LoraConfig())
    adapted.check_one_copy(names, "whole modules can't be combined, so leave all but one of these adapters out")
    copies = {path: holders[0] for path, holders in adapted.copies(names).items()}
    layers = {path: layer for path, layer in adapted.layers().items() if set(names) & set(layer.r)}
    check_apart({source: adapted.configs[source] for source in names}, layers)
    _check_unmerged(names, layers, adapted.set_aside)
    of_one_base = _shared_backbone(adapted, names) if check_base else False

    results, report = combine_layers(_branches(layers, names), names, weights, recipe, own_ranks=own_ranks)
    config = combined_config(
        [adapted.configs[source] for source in names], {path: found.rank for path, found in results.items()}
    )
    shared = [path for path in copies if holder_of(path, config) is None]  # by ensure_weight_tying, without their name
    if shared:
        config = replace(config, modules_to_save=[*(config.modules_to_save or ()), *shared])
    plan = make_plan(adapted.root, without_new_head(config))
    _check_plan(plan, results, copies)

    def start(request: Request) -> Start:
        found = results[request.path]
        return Start(found.A, found.B)

    injection = inject_(adapted.root, plan, config, name, start, dtype=adapted.adapter_dtype)
    try:
        for path, source in copies.items():
            wrapper: ModulesToSave = module_at(adapted.root, path)
            trained = wrapper.adapter_tensors(source)
            for key, tensor in wrapper.adapter_tensors(name).items():
                tensor.copy_(trained[key])
            report.copied[path] = source
        _combine_buffers_(adapted, names, name)
        layers = adapted.layers()
        for path, found in results.items():
            _check_registered(path, layers[path], name, found)
        if of_one_base:
            adapted.backbones[name] = fingerprint(adapted.bases_of(name))
    except BaseException:
        injection.undo()
        raise
    adapted.configs[name], adapted.plan = config, plan
    adapted.apply_state_([name])
    return report


def _combine_buffers_(adapted: Adapted, names: Sequence[str], name: str) -> None:
    """Give adapter ``name`` the buffers (running statistics, say) that one of its sources ``names`` moved."""
    moved = {source: found for source in names if (found := adapted.buffers.of(adapted.root, source))}
    if len(moved) > 1:
        warnings.warn(
            f"adapter {name!r}: {sorted(moved)} were each trained with running statistics of their own "
            f"({next(iter(moved[min(moved)]))}, ...), which can't be combined; it has the base model's, so train it a "
            "little, or run a few batches in training mode",
            stacklevel=4,
        )
    elif moved:
        (found,) = moved.values()
        adapted.buffers.moved[name] = {key: tensor.detach().clone() for key, tensor in found.items()}


def _branches(layers: Mapping[str, AdapterLayer], names: Sequence[str]) -> dict[str, dict[int, Branch]]:
    """The sources' branches, by path and by the place of the source among ``names``."""
    return {
        path: {
            place: Branch(A.detach(), B.detach(), layer.scaling[name])
            for place, name in enumerate(names)
            if name in layer.r
            for A, B in [layer.whole_factors(name)]
        }
        for path, layer in layers.items()
    }


def _sources(adapted: Adapted, adapters: Sequence[str]) -> list[str]:
    """The names of the adapters to combine, all of which are there and can be."""
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise AdapterError(
            f"adapters: expected a list with at least one adapter's name, found {adapters!r}; the model has "
            f"{sorted(adapted.configs)}"
        )
    for name in adapters:
        adapted.check_known(name)
        if (bias := adapted.configs[name].bias) != "none":
            raise AdapterError(
                f"adapter {name!r}: expected bias='none', found {bias!r}; trained biases are the base's own and "
                "can't be weighted, so merge this adapter, or train it with bias='none'"
            )
    return list(adapters)


def _shared_backbone(adapted: Adapted, names: list[str]) -> bool:
    """Whether any source was started for the base at hand; refuses those that were for another."""
    known = {name: adapted.backbones[name] for name in names if name in adapted.backbones}
    for name, expected in known.items():
        if (found := fingerprint(adapted.bases_of(name))) != expected:
            raise AdapterError(
                f"adapter {name!r}: expected the quantized base that it was started on (fingerprint "
                f"{expected[:12]}), found another ({found[:12]}), on which its correction is noise; combine "
                "adapters of one base, or pass check_backbone=False to do it all the same"
            )
    return bool(known)


def _check_unmerged(names: list[str], layers: dict[str, AdapterLayer], set_aside: dict[str, list[str]]) -> None:
    for path, layer in layers.items():
        if merged := layer.merged_adapters or set_aside.get(path):
            raise AdapterError(
                f"{path}: expected no adapter merged into the base while {names} are combined, found {merged}; "
                "unmerge_adapter() first"
            )


def _check_plan(plan: Plan, results: dict[str, Combined], copies: dict[str, Any]) -> None:
    """The new configuration must mean exactly the modules that were combined."""
    planned, computed = {e.path: e.rank for e in plan.entries}, {path: r.rank for path, r in results.items()}
    if planned != computed or set(plan.modules_to_save) != set(copies):
        apart = sorted({path for path in {**planned, **computed} if planned.get(path) != computed.get(path)})
        apart += sorted(set(plan.modules_to_save) ^ set(copies))
        raise AdapterError(
            f"{apart[0]}: expected a module that one adapter adapts and none trains whole, found one that their "
            f"configurations disagree about ({len(apart)} such modules); combine adapters whose targets and "
            "modules_to_save don't overlap"
        )


def _check_registered(path: str, layer: AdapterLayer, name: str, expected: Combined) -> None:
    """What the layer will compute is what was computed, up to the rounding of its parameters' dtype."""
    A, B = (factor.detach() for factor in layer.whole_factors(name))
    wanted = Branch(expected.A, expected.B)
    apart = distance([wanted], [1.0], Combined(A * layer.scaling[name], B))
    if not apart <= _ROUNDINGS * torch.finfo(A.dtype).eps + _FLOOR:
        raise AdapterError(
            f"{path}: expected the combined delta from the new adapter's {A.dtype} factors, found one a relative "
            f"{apart:.1e} from it; take another adapter_dtype, or smaller weights"
        )
