"""What is done to a single adapter layer by hand, under PEFT's names: choose, switch off, rescale, merge.

A model's own methods keep all its layers in step; frameworks that inject layers and hold no wrapper (diffusers, and
transformers' own adapter methods) walk the layers and call these. Each is a few lines over what a layer has anyway.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError


class SwitchedByHand:
    """Of adapter layers and trained copies: which adapters apply, and which train."""

    active_adapters: list[str]
    disable_adapters: bool

    def adapter_names(self) -> list[str]:
        raise NotImplementedError

    def adapter_tensors(self, name: str) -> Any:
        raise NotImplementedError

    def _get_available_adapters(self) -> set[str]:
        """PEFT's own name for ``adapter_names``, which those who walk its layers use."""
        return set(self.adapter_names())

    @property
    def _adapters(self) -> set[str]:
        """As above."""
        return set(self.adapter_names())

    def _all_available_adapter_names(self) -> list[str]:
        """As above, sorted."""
        return sorted(self.adapter_names())

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    # PEFT's attributes behind these two, which are set where its own setters do too much.
    @property
    def _active_adapter(self) -> list[str]:
        return self.active_adapters

    @_active_adapter.setter
    def _active_adapter(self, names: str | Sequence[str]) -> None:
        self.active_adapters = [names] if isinstance(names, str) else list(names)

    @property
    def _disable_adapters(self) -> bool:
        return self.disable_adapters

    @_disable_adapters.setter
    def _disable_adapters(self, disabled: bool) -> None:
        self.disable_adapters = disabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Apply ``adapter_names`` and no others, and train them unless ``inference_mode``."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.set_requires_grad([name for name in self.adapter_names() if name not in names], False)
        self.set_requires_grad(names, not inference_mode)
        self.active_adapters = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze those of ``adapter_names`` that this layer has."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            if name in self.adapter_names():
                for tensor in self.adapter_tensors(name).values():
                    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                        tensor.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Apply the active adapters, trainable, or compute as the base does with all of them frozen."""
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            self.set_requires_grad(self.adapter_names(), False)
        self.disable_adapters = not enabled


class AdjustedByHand(SwitchedByHand):
    """Of adapter layers: scalings, deltas and merges as well."""

    # What an adapter layer has; see there.
    base_layer: Any
    codec: Any
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    _rescaled: float
    merged_adapters: list[str]
    factor_names: ClassVar[tuple[str, str]]
    factors: Any
    delta: Any
    merge_: Any
    unmerge_: Any
    #: False: branches take inputs as they come, for whoever casts weights layer by layer around the forward.
    cast_input_dtype_enabled = True

    #: Names of the attributes that hold what else an adapter has, by its name.
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the attributes that hold the factors, by adapter."""
        return self.factor_names

    @property
    def in_features(self) -> int:
        """Width of the inputs: of an embedding its number of rows, of a convolution its channels."""
        return int(self.codec.shape(self.base_layer)[1])

    @property
    def out_features(self) -> int:
        """Width of the outputs: of a convolution its channels."""
        return int(self.codec.shape(self.base_layer)[0])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``adapter_name`` is a matrix added to the weight: all are."""
        return True

    # -- scaling -------------------------------------------------------------------------------------------

    def _first_scaling(self, name: str) -> float:
        rank = self.r[name]
        return self._rescaled * self.lora_alpha[name] / (math.sqrt(rank) if self.use_rslora[name] else rank)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply ``adapter``'s branch by ``scale`` times what its rank and alpha say; nothing where it isn't."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._first_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the present scaling of every active adapter by ``scale``."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the present scaling of every active adapter by ``scale``; None gives back what rank and alpha say."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self._first_scaling(name) if scale is None else self.scaling[name] / scale

    # -- merging -------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s * B @ A in the shape of the base's weight as its module has it, in the factors' dtype.

        Raises:
            AdapterError: this layer has no such adapter.
        """
        if adapter not in self.r:
            raise AdapterError(f"unknown adapter {adapter!r}; this layer has {list(self.r)}")
        return self._laid_out(self.delta(adapter)).to(self.factors(adapter)[1].dtype)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add the deltas of ``adapter_names`` (default: the active ones) to the base weight; see ``merge_``.

        Warns where some are merged already; ``unmerge`` takes all of them out again, bit for bit.

        Raises:
            MergeError: with ``safe_merge`` and a result that isn't finite; the weight is as it was.
            TypeError: a single name where a list is meant.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names: expected a list of names, found {adapter_names!r}; put it into a list")
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name not in self.merged_adapters]
        if self.merged_adapters:
            warn_merged(self.merged_adapters, names)
        self.merge_(names, safe=safe_merge)

    def unmerge(self) -> None:
        """Put the base weight back as it was before ``merge``; warns where nothing is merged."""
        if not self.merged_adapters:
            warnings.warn("unmerge: nothing is merged into this layer, so nothing was done", stacklevel=2)
        self.unmerge_()

    def enable_adapters(self, enabled: bool) -> None:
        """As above; what is merged is taken out of the base before it computes alone."""
        if not enabled:
            self.unmerge_()
        super().enable_adapters(enabled)

    @torch.no_grad()
    def get_base_weight(self) -> Tensor:
        """The base's weight as numbers, whatever its storage: float32, in the shape that its module has it in."""
        return self._laid_out(self.codec.read(self.base_layer))

    def _laid_out(self, matrix: Tensor) -> Tensor:
        """(out, in) ``matrix`` in the layout of the base's weight; as it is where that is made of codes."""
        laid: Tensor | None = self.codec.laid_out(self.base_layer, matrix)
        return matrix if laid is None else laid


def warn_merged(merged: Sequence[str], further: Sequence[str]) -> None:
    """Say that ``merged`` are merged already, and ``further`` are added to them."""
    said = f"{list(further)} are merged beside them" if further else "there is nothing more to merge"
    warnings.warn(f"adapters {list(merged)} are merged already; {said}", stacklevel=3)
