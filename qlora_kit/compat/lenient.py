"""``LoraModel`` where PEFT warns and goes on: what is merged already, or isn't; layers that were switched by hand;
exclusions that nothing is excluded by."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from ..config.lora import LoraConfig
from ..errors import AdapterError, TargetError
from ..injection.megatron.opening import opened_parts
from ..injection.targets import without_idle
from ..layers.by_hand import warn_merged
from ..model.lora_model import LoraModel
from .errors import PeftWarning

#: Fields in which PEFT passes over names that mean nothing, by how it says so.
_IDLE = {"exclude_modules": PeftWarning, "rank_pattern": RuntimeWarning, "alpha_pattern": RuntimeWarning}


def without_idle_patterns(model: nn.Module, config: LoraConfig, stacklevel: int = 3) -> LoraConfig:
    """``config`` without exclusions, ranks and alphas for modules that ``model`` hasn't, or that aren't targeted; warns
    of them."""
    if not any(getattr(config, field) for field in _IDLE):
        return config
    try:
        with opened_parts(model, config, keep=False):
            found = without_idle(model, config)
    except TargetError:
        return config  # of its targets, which is said where they are used
    live = {field: getattr(found, field) for field in _IDLE}
    for field, kind in _IDLE.items():
        left = _listed(live[field])
        if idle := [name for name in _listed(getattr(config, field)) if name not in left]:
            warnings.warn(f"{field}: nothing that is targeted is meant by {idle}", kind, stacklevel)
    return replace(config, **live)


def _listed(names: Iterable[str] | str | None) -> list[str]:
    return [names] if isinstance(names, str) else sorted(names or ())


class LenientModel(LoraModel):
    """See the module's text."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Where it was the only active one, another becomes active, and a warning says so."""
        active = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        if active == [adapter_name]:
            said = f"{self.active_adapters} are active now" if self.active_adapters else "no adapter is left"
            warnings.warn(f"delete_adapter: {adapter_name!r} was the active adapter; {said}", PeftWarning, stacklevel=2)

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """See ``LoraModel.merge_adapter``; what is merged already is passed over with a warning, as in PEFT."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        layers = self.adapter_layers().values()
        merged = {name for layer in layers for name in layer.merged_adapters}
        if merged and not self.adapted.disabled:
            asked = [name for layer in layers for name in layer.active_adapters] if names is None else names
            names = [name for name in dict.fromkeys(asked) if name not in merged]
            warn_merged(sorted(merged), names)
            if not names:
                return
        super().merge_adapter(names, safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> nn.Module:
        """See ``LoraModel.merge_and_unload``; without names the adapters that the layers apply, chosen by hand or not.

        Raises:
            AdapterError: layers apply different adapters.
        """
        if adapter_names is None:
            chosen = {tuple(layer.active_adapters) for layer in self.adapter_layers().values()}
            if len(chosen) > 1:
                raise AdapterError(
                    f"merge_and_unload: expected layers that apply the same adapters, found {sorted(chosen)}; pass "
                    "adapter_names, or call the model's own set_adapter"
                )
            if chosen != {tuple(self.active_adapters)}:
                adapter_names = [name for names in chosen for name in names]
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def unmerge_adapter(self) -> None:
        """See ``LoraModel.unmerge_adapter``; warns where nothing is merged."""
        if not self.adapted.set_aside and not any(layer.merged for layer in self.adapter_layers().values()):
            warnings.warn("unmerge_adapter: nothing is merged, so nothing was done", PeftWarning, stacklevel=2)
        super().unmerge_adapter()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """See ``LoraModel.disable_adapter``; warns where single layers are switched off, which are on after it."""
        if not self.adapted.disabled and any(part.disable_adapters for part in self.adapted.parts()):
            warnings.warn(
                "disable_adapter: some layers are switched off and others on; all are on after this block",
                PeftWarning,
                stacklevel=3,
            )
        with super().disable_adapter():
            yield
