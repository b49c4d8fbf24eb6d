"""The life of named adapters on one model: added, active, switched off, merged, saved, deleted.

Nothing here knows how a weight is stored or how a branch is applied (``codecs``, ``layers``), nor how the
wrapper passes for the model it wraps (``proxy``), nor how files are written (``persistence``, ``storage``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..codecs import protect_storage_
from ..config.lora import LoraConfig
from ..errors import AdapterError, MergeError
from ..initializers import prepared
from ..injection.biases import KeptBiases, bias_parameters
from ..injection.engine import Plan, inject_, make_plan, request_for, swap_
from ..injection.targets import base_of, modules_of, shortest_names
from ..layers import AdapterLayer, ModulesToSave
from ..merging.in_memory import merge, merge_in_place_
from ..preparation.kbit import count_parameters
from .combining import Combining


class LoraModel(Combining):
    """``model`` with adapter ``adapter_name`` injected in place, active and trainable; all else is frozen.

    Args:
        model: any torch model; a transformers model keeps all that it can do.
        config: what to adapt and how; it is copied, never changed.
        adapter_name: any name without a dot.
        adapter_dtype: dtype of the factors. By default float32 on half-precision and k-bit bases (small
            updates vanish in bfloat16) and the base's own dtype elsewhere.

    Attributes:
        model: the base model, adapter layers inside.
        peft_config: the configuration of each adapter by name.
        active_adapters: the names that forward applies, in order.
        plan: what was done for the adapter added last, a printable value.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str = "default",
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model)
        self.peft_config: dict[str, LoraConfig] = {}
        self.active_adapters: list[str] = []
        self.adapter_dtype = adapter_dtype
        self._trainable: list[str] = []
        self._disabled = False
        self._merged_when_disabled: dict[str, list[str]] = {}
        self._kept_biases = KeptBiases()
        self._trained_before = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        self.add_adapter(adapter_name, config)
        protect_storage_(model)  # what isn't adapted too
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)
        self.train(model.training)

    # -- adding, choosing, deleting ------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, config: LoraConfig) -> Plan:
        """Inject another adapter, neither active nor trainable yet; all of it, or on any error nothing.

        Raises:
            AdapterError: the name is taken or can't be one, or two adapters would train the base's biases.
            TargetError: see ``qlora_kit.injection.targets``.
        """
        self._check_new(adapter_name, config)
        plan = make_plan(self.model, config)
        requests = [request_for(self.model, entry, config, self.adapter_dtype) for entry in plan.entries]
        start = prepared(self.model, requests)
        del requests
        injection = inject_(self.model, plan, config, adapter_name, start, dtype=self.adapter_dtype)
        try:
            config = self._recorded(config, plan)
        except BaseException:
            injection.undo()
            raise
        self.peft_config[adapter_name] = config
        self._note_backbone_(adapter_name)
        self.plan = plan
        self._kept_biases.keep(bias_parameters(self.model, config.bias))
        self._apply_state_()
        return plan

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one or several adapters the active ones, and (unless ``inference_mode``) the trainable ones."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._check_known(name)
        for path, module in self.saved_modules().items():
            copies = [name for name in names if name in module.modules_to_save]
            if len(copies) > 1:
                raise AdapterError(
                    f"adapters {copies} each hold their own copy of {path} (modules_to_save), so they can't be "
                    "active together; merge one of them first"
                )
        self.active_adapters = names
        self._trainable = [] if inference_mode else list(names)
        self._apply_state_()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters without changing which ones are active."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._check_known(name)
        others = [name for name in self._trainable if name not in names]
        self._trainable = others + names if requires_grad else others
        self._apply_state_()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Where it was the only active one, the first of the others becomes active."""
        self._check_known(adapter_name)
        merges = {path: layer.merged_adapters for path, layer in self.adapter_layers().items()}
        merged = [path for path, names in {**merges, **self._merged_when_disabled}.items() if adapter_name in names]
        if merged:
            raise AdapterError(f"adapter {adapter_name!r} is merged (into {merged[0]}, ...); unmerge_adapter() first")
        if self.peft_config[adapter_name].bias != "none":
            self._kept_biases.swap_(self.model)
            self._kept_biases.values.clear()
        for module in self._parts():
            module.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        self.backbones.pop(adapter_name, None)
        remaining = [name for name in self.active_adapters if name != adapter_name]
        self._trainable = [name for name in self._trainable if name != adapter_name]
        self.active_adapters = remaining or list(self.peft_config)[:1]
        self._drop_empty_()
        self._apply_state_()

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the list of names where several are active."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters

    # -- switching off and on ------------------------------------------------------------------------------

    def disable_adapter_layers(self) -> None:
        """Compute as the base model does: branches, saved copies, trained biases and merges are set aside."""
        if self._disabled:
            return
        for path, layer in self.adapter_layers().items():
            if layer.merged_adapters:
                self._merged_when_disabled[path] = list(layer.merged_adapters)
                layer.unmerge_()
        self._kept_biases.swap_(self.model)
        self._disabled = True
        self._apply_state_()

    def enable_adapter_layers(self) -> None:
        """Undo ``disable_adapter_layers``."""
        if not self._disabled:
            return
        merge_in_place_(self.adapter_layers(), self._merged_when_disabled)
        self._merged_when_disabled.clear()
        self._kept_biases.swap_(self.model)
        self._disabled = False
        self._apply_state_()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """``with lora.disable_adapter(): ...`` computes as the base model."""
        was_disabled = self._disabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if not was_disabled:
                self.enable_adapter_layers()

    # -- merging and taking out ------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add the named (default: active) adapters to the base weights, keeping what undoes it bit for bit.

        Adapters merged before stay merged, and naming these alone is a MergeError. While any is, forward applies no
        others.
        """
        chosen = self.active_adapters if adapter_names is None else adapter_names
        names = [chosen] if isinstance(chosen, str) else list(chosen)
        for name in names:
            self._check_known(name)
        if not names:
            raise MergeError(f"nothing to merge: no adapter is active or named; the model has {list(self.peft_config)}")
        if self._disabled:
            raise MergeError("adapters are switched off, and so would the merge be; enable_adapter_layers() first")
        layers = self.adapter_layers()
        merge_in_place_(layers, dict.fromkeys(layers, names), safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Put every base weight back as it was before ``merge_adapter``, bit for bit."""
        self._merged_when_disabled.clear()
        for layer in self.adapter_layers().values():
            layer.unmerge_()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> nn.Module:
        """Merge into each module's own storage and return the base model without adapter layers.

        ``qlora_kit.merge`` does the same with a choice of storage and returns what was lost on the way. It
        refuses values that aren't finite; so does this, and ``safe_merge`` is here for PEFT's callers. A delta that
        rounding swallows, which it refuses too, is merged here as PEFT does it, and logged.
        """
        return merge(self, adapters=adapter_names, progressbar=progressbar, force=True).model

    def unload(self) -> nn.Module:
        """Return the base model as it was before the first adapter: its own module objects, biases and flags."""
        self.unmerge_adapter()
        if not self._disabled:
            self._kept_biases.swap_(self.model)
        for path, module in list(modules_of(self.model)):
            if base_of(module) is not module:
                swap_(self.model, path, base_of(module))
        self._forget_()
        return self.model

    def get_base_model(self) -> nn.Module:
        """The wrapped model, adapter layers inside; ``unload()`` gives it without them."""
        return self.model

    # -- looking at it -------------------------------------------------------------------------------------

    def adapter_layers(self) -> dict[str, AdapterLayer]:
        """Every adapter layer by its path in ``model``; one that stands at several paths comes once."""
        return {path: m for path, m in self.model.named_modules() if isinstance(m, AdapterLayer)}

    def saved_modules(self) -> dict[str, ModulesToSave]:
        """Every module with trained copies, by its path in ``model``."""
        return {path: m for path, m in self.model.named_modules() if isinstance(m, ModulesToSave)}

    def paths_of(self, path: str) -> list[str]:
        """All paths in ``model`` where the module at ``path`` stands."""
        module = self.model.get_submodule(path)
        return [other for other, candidate in modules_of(self.model) if candidate is module]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; a packed k-bit weight counts as the weights it holds."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's own; refused while an adapter sits on the embedding or the head."""
        for get in ("get_input_embeddings", "get_output_embeddings"):
            module = getattr(self.model, get)()
            if isinstance(module, (AdapterLayer, ModulesToSave)):
                raise AdapterError(
                    f"resize_token_embeddings: {get}() is adapted, and its adapter has the old size; resize "
                    "before applying the adapter, or merge or unload it first"
                )
        return self.model.resize_token_embeddings(*args, **kwargs)  # type: ignore[operator]

    # -- inside ------------------------------------------------------------------------------------------------

    def _check_known(self, name: str) -> None:
        if name not in self.peft_config:
            raise AdapterError(f"unknown adapter {name!r}; the model has {sorted(self.peft_config)}")

    def _check_new(self, name: str, config: LoraConfig) -> None:
        if not isinstance(name, str) or not name or "." in name or "/" in name or "\\" in name:
            raise AdapterError(
                f"adapter name {name!r}: expected a non-empty string without dots and slashes (it becomes part of "
                "parameter names and the name of a folder)"
            )
        if name in self.peft_config:
            raise AdapterError(f"adapter {name!r} exists already; delete_adapter() it first or choose another name")
        if config.bias != "none" and (other := [n for n, c in self.peft_config.items() if c.bias != "none"]):
            raise AdapterError(
                f"adapter {name!r}: bias={config.bias!r} would train the base's biases, which {other[0]!r} trains "
                "already; set bias='none' for one of them"
            )

    def _recorded(self, config: LoraConfig, plan: Plan) -> LoraConfig:
        """``config`` as it is stored: targets spelled out where the user left them to us."""
        changes: dict[str, Any] = {}
        if config.target_modules is None or config.target_modules == "all-linear":
            paths = [path for entry in plan.entries for path in (entry.path, *entry.aliases)]
            changes["target_modules"] = shortest_names(paths, self.model)
        if config.base_model_name_or_path is None:
            source = getattr(getattr(self.model, "config", None), "_name_or_path", None)
            changes["base_model_name_or_path"] = source or None
        return dataclasses.replace(config, **changes)

    def _apply_state_(self) -> None:
        """Make every layer and every ``requires_grad`` say what the adapters' state is."""
        for parameter in self.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.requires_grad_(False)
        for module in self._parts():
            module.active_adapters = list(self.active_adapters)  # as in PEFT, held by this layer or not
            module.disable_adapters = self._disabled
            for name in self._trainable if not self._disabled else ():
                if name in module.adapter_names():
                    for tensor in module.adapter_tensors(name).values():
                        if isinstance(tensor, nn.Parameter):
                            tensor.requires_grad_(True)
        for name in self._trainable if not self._disabled else ():
            for parameter in bias_parameters(self.model, self.peft_config[name].bias).values():
                parameter.requires_grad_(True)

    def _parts(self) -> list[AdapterLayer | ModulesToSave]:
        return [*self.adapter_layers().values(), *self.saved_modules().values()]

    def _drop_empty_(self) -> None:
        """Give modules back that no adapter uses any more."""
        for path, module in list(modules_of(self.model)):
            if isinstance(module, (AdapterLayer, ModulesToSave)) and not module.adapter_names():
                swap_(self.model, path, base_of(module))

    def _forget_(self) -> None:
        """No adapter is left; what may be trained is what might be before the first one."""
        self.peft_config.clear()
        self.active_adapters, self._trainable = [], []
        self._kept_biases.values.clear()
        self._merged_when_disabled.clear()
        self.backbones.clear()
        self._disabled = False
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.is_floating_point():
                parameter.requires_grad_(name in self._trained_before)


def apply_lora(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = "default",
    *,
    adapter_dtype: torch.dtype | None = None,
) -> LoraModel:
    """Inject a trainable adapter into ``model`` (in place) and return the model wrapped. See ``LoraModel``."""
    return LoraModel(model, config, adapter_name, adapter_dtype=adapter_dtype)
