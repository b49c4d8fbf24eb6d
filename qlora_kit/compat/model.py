"""``PeftModel``: ``LoraModel`` with PEFT's arguments, PEFT's names of parameters, and PEFT's warnings.

In PEFT a ``PeftModel`` holds a ``LoraModel`` that holds the model. Here they are one object:
``model.base_model`` is ``model`` itself, so ``model.base_model.model`` is the wrapped model in both. It also
passes for the wrapped model, hence ``isinstance(model, PeftModel)`` and
``isinstance(model, LlamaForCausalLM)`` hold at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..adapter_files.beside import about, stored_config
from ..adapter_files.card import write_card
from ..adapter_files.folder import PREFIX
from ..adapter_files.tensors import adapter_slots
from ..config import lora as core
from ..errors import AdapterError
from ..injection.engine import Plan
from ..injection.heads import HEADLESS
from .configs import LoraConfig, PeftType
from .hub import adapter_folder
from .lenient import LenientModel, without_idle_patterns
from .meta import to_meta_
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status


class PeftModel(LenientModel):
    """A model with named adapters, under PEFT's names.

    Args:
        model: any torch model.
        peft_config: what to adapt and how; it is copied, never changed.
        adapter_name: any name without a dot.
        autocast_adapter_dtype: train in float32 on half-precision bases; False keeps the model's dtype.
        low_cpu_mem_usage: leave the factors without memory, on the meta device, for a later load to fill.

    Names of parameters begin with "base_model.model.", as PEFT's do.
    """

    held_under = PREFIX.rstrip(".")

    #: The task whose head adapters of this class train whole, whether or not their configuration names it.
    head_of: ClassVar[str | None] = None
    peft_type = PeftType.LORA

    def __init__(
        self,
        model: nn.Module,
        peft_config: core.LoraConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        if not autocast_adapter_dtype and adapter_dtype is None:
            adapter_dtype = _dtype_of(model)
        super().__init__(model, peft_config, adapter_name, adapter_dtype=adapter_dtype)
        if low_cpu_mem_usage:
            to_meta_(self, adapter_name)

    #: The class of each task that has one, filled by ``tasks``.
    of_tasks: ClassVar[dict[str, type[PeftModel]]] = {}

    @classmethod
    def of_task(cls, task_type: str | None) -> type[PeftModel]:
        """The class of a task; ``PeftModel`` where none is given."""
        return PeftModel if task_type is None else cls.of_tasks[task_type]

    # -- adapters --------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: core.LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> Plan:
        """Inject another adapter, with the task's head; not active yet. See ``LoraModel.add_adapter``.

        The last two are as for a new model, and of this adapter alone.
        """
        with self._dtype_of_new(autocast_adapter_dtype):
            live = without_idle_patterns(self.model, self._for_task(peft_config), stacklevel=4)
            plan = super().add_adapter(adapter_name, live)
        if low_cpu_mem_usage:
            to_meta_(self, adapter_name)
        return plan

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths in the base model of the modules with a branch."""
        return list(self.adapter_layers())

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the parameters with a branch of their own, of which there are none here."""
        return []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``adapter_name`` can be written as LoRA: it is."""
        return True

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype, where it says one."""
        return getattr(self.model, "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether forward applies any adapter."""
        return not self.adapted.disabled and bool(self.active_adapters)

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> None:
        """Have the embeddings' output of ``model`` require a gradient, unless it is quantized (and was prepared)."""
        quantized = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
        if any(getattr(model, flag, False) for flag in quantized):
            return
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            table: nn.Module = model.get_input_embeddings()
            table.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))

    @property
    def active_peft_config(self) -> core.LoraConfig:
        """The configuration of the active adapter, of the first where several are."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that any adapter trains whole, or None."""
        names = {name for config in self.peft_config.values() for name in config.modules_to_save or ()}
        return names or None

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of each adapter layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of all adapters together."""
        return get_model_status(self)

    # -- files -----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: core.LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        ignore_mismatched_sizes: bool = False,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """``model`` with a stored adapter, in the class of its task; ``config`` replaces the stored one.

        ``model_id`` is a local folder or a Hub repository. What PEFT's other keywords say (device_map,
        offload_folder, ...) follows from the base model's placement here, and adapters are never held twice, with
        ``low_cpu_mem_usage`` or without.

        Args:
            config: kept as ``peft_config[adapter_name]``, and brought up to date: this very object.
            ignore_mismatched_sizes: stored tensors of another shape than the model's are left out, with a warning.
        """
        folder = adapter_folder(model_id, subfolder, **kwargs)
        stored = LoraConfig.from_pretrained(folder) if config is None else config
        kind = cls.of_task(stored.task_type) if cls is PeftModel else cls
        peft_model = super(PeftModel, kind).from_pretrained(
            model,
            folder,
            adapter_name,
            is_trainable,
            config=stored,
            allow_pickle=allow_pickle,
            adapter_dtype=None if autocast_adapter_dtype else _dtype_of(model),
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
        if config is not None:
            vars(config).update(vars(peft_model.peft_config[adapter_name]))
            peft_model.adapted.configs[adapter_name] = config
        return peft_model

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        *,
        ignore_mismatched_sizes: bool = False,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        check_backbone: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Add a stored adapter, from a local folder or a Hub repository; not active yet.

        Factors go where their base layers are, whatever ``torch_device`` says; the keywords are those of
        ``from_pretrained``.

        Returns what PEFT returns, torch's pair of missing and unexpected keys; here it is always empty, since
        an adapter that doesn't fit is an error.
        """
        folder = adapter_folder(model_id, subfolder, **kwargs)
        with self._dtype_of_new(autocast_adapter_dtype):
            super().load_adapter(
                folder,
                adapter_name,
                is_trainable,
                allow_pickle=allow_pickle,
                check_backbone=check_backbone,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
            )
        return no_leftover_keys()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's for a state of the whole model; one of adapters alone goes to these, strictly."""
        adapters = {slot.full_key for name in self.peft_config for slot in adapter_slots(self.adapted, name)}
        if state_dict.keys() & self.state_dict().keys() - adapters:
            return nn.Module.load_state_dict(self, state_dict, strict, assign)
        return super().load_state_dict(state_dict, strict, assign)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool | None = None,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters; see ``LoraModel.save_pretrained``.

        Raises:
            AdapterError: the caller wants a start subtracted from the weights.
        """
        if path_initial_model_for_weight_conversion is not None:
            raise AdapterError(
                "path_initial_model_for_weight_conversion: expected None, found "
                f"{path_initial_model_for_weight_conversion!r}; no start here changes base weights that the "
                "adapter depends on, so leave it out"
            )
        super().save_pretrained(
            os.fspath(save_directory),
            safe_serialization,
            selected_adapters,
            is_main_process=is_main_process,
            save_embedding_layers=save_embedding_layers,
            **kwargs,
        )

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the README.md of the active adapter, of the first where several are, as ``save_pretrained`` does."""
        folder, name = Path(output_dir), self.active_adapters[0]
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, stored_config(self.adapted, name), about(self.adapted, name))

    # -- inside ----------------------------------------------------------------------------------------

    @contextmanager
    def _dtype_of_new(self, autocast: bool) -> Iterator[None]:
        """Inside the block new factors have the base's own dtype, unless ``autocast``."""
        usual = self.adapted.adapter_dtype
        self.adapted.adapter_dtype = usual if autocast else _dtype_of(self.model)
        try:
            yield
        finally:
            self.adapted.adapter_dtype = usual

    def _for_task(self, config: core.LoraConfig) -> core.LoraConfig:
        if self.head_of is None or config.task_type == HEADLESS:
            return config
        return dataclasses.replace(config, task_type=self.head_of)


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def no_leftover_keys() -> Any:
    """torch's report of a load that left no key over."""
    return torch.nn.modules.module._IncompatibleKeys([], [])
