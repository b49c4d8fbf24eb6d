"""Merges that stay undoable: deltas in the base weights, adapter layers still there with the way back.

Switching adapters off sets such merges aside, and switching them on again brings them back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import CodecError, MergeError
from ..injection.adapted import Adapted
from ..injection.engine import Injection
from ..layers import AdapterLayer
from ..layers.rescaled import at_full_size_
from .task import check_in_memory


def layers_to_merge(adapted: Adapted) -> dict[str, AdapterLayer]:
    """The adapter layers by path, their weights at full size."""
    at_full_size_(adapted.root)
    return adapted.layers()


def merge_in_place_(
    layers: dict[str, AdapterLayer], merges: Mapping[str, Sequence[str]], *, safe: bool = False
) -> None:
    """Merge into each layer's base weight the adapters that ``merges`` has for its path, reversibly; or on any
    error, as where all of them are merged already, none anywhere."""
    held = {(path, name) for path, names in merges.items() for name in names if name in layers[path].r}
    if held and all(name in layers[path].merged_adapters for path, name in held):
        known = sorted({name for _, name in held})
        raise MergeError(f"nothing to merge: {known} are merged already; name others, or unmerge_adapter() first")
    check_in_memory({path: layers[path] for path, names in merges.items() if set(names) & set(layers[path].r)})
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


def unmerge_(adapted: Adapted) -> None:
    """Put every base weight back as it was before anything was merged in place, bit for bit."""
    adapted.set_aside.clear()
    for layer in layers_to_merge(adapted).values():
        layer.unmerge_()


def switch_off_(adapted: Adapted) -> None:
    """Compute as the base model does: branches, saved copies, trained biases and merges are set aside."""
    if adapted.disabled:
        return
    for path, layer in layers_to_merge(adapted).items():
        if layer.merged_adapters:
            adapted.set_aside[path] = list(layer.merged_adapters)
            layer.unmerge_()
    adapted.kept_biases.swap_(adapted.root)
    adapted.disabled = True
    adapted.apply_state_()


def switch_on_(adapted: Adapted) -> None:
    """Undo ``switch_off_``."""
    if not adapted.disabled:
        return
    merge_in_place_(layers_to_merge(adapted), adapted.set_aside)
    adapted.set_aside.clear()
    adapted.kept_biases.swap_(adapted.root)
    adapted.disabled = False
    adapted.apply_state_()
