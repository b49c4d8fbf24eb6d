"""PEFT's model classes: ``LoraModel`` with PEFT's arguments, and a trained head where the task calls for one.

In PEFT a ``PeftModel`` holds a ``LoraModel`` that holds the model. Here they are one object:
``model.base_model`` is ``model`` itself, so ``model.base_model.model`` is the wrapped model in both. It also
passes for the wrapped model, hence ``isinstance(model, PeftModel)`` and
``isinstance(model, LlamaForCausalLM)`` hold at once.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import lora as core
from ..errors import AdapterError
from ..injection.engine import Plan
from ..injection.heads import HEADLESS
from ..model.lora_model import LoraModel
from .configs import LoraConfig, PeftType
from .hub import adapter_folder
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status


class PeftModel(LoraModel):
    """A model with named adapters, under PEFT's names.

    Args:
        model: any torch model.
        peft_config: what to adapt and how; it is copied, never changed.
        adapter_name: any name without a dot.
        autocast_adapter_dtype: train in float32 on half-precision bases; False keeps the model's dtype.
        low_cpu_mem_usage: accepted for PEFT's sake; adapters are never held twice here.
    """

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

    # -- adapters --------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: core.LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> Plan:
        """Inject another adapter, with the task's head; not active yet. See ``LoraModel.add_adapter``."""
        return super().add_adapter(adapter_name, self._for_task(peft_config))

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
        subfolder: str | None = None,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """``model`` with a stored adapter, in the class of its task; ``config`` replaces the stored one.

        ``model_id`` is a local folder or a Hub repository. What PEFT's other keywords say (device_map,
        offload_folder, ...) follows from the base model's placement here.
        """
        folder = adapter_folder(model_id, subfolder, **kwargs)
        if config is None:
            config = LoraConfig.from_pretrained(folder)
        kind = peft_class_for(config.task_type) if cls is PeftModel else cls
        return super(PeftModel, kind).from_pretrained(
            model,
            folder,
            adapter_name,
            is_trainable,
            config=config,
            allow_pickle=allow_pickle,
            adapter_dtype=None if autocast_adapter_dtype else _dtype_of(model),
        )

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        check_backbone: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Add a stored adapter, from a local folder or a Hub repository; not active yet.

        Returns what PEFT returns, torch's pair of missing and unexpected keys; here it is always empty, since
        an adapter that doesn't fit is an error.
        """
        folder = adapter_folder(model_id, subfolder, **kwargs)
        super().load_adapter(
            folder, adapter_name, is_trainable, allow_pickle=allow_pickle, check_backbone=check_backbone
        )
        return no_leftover_keys()

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

    # -- inside ----------------------------------------------------------------------------------------

    def _for_task(self, config: core.LoraConfig) -> core.LoraConfig:
        if self.head_of is None or config.task_type == HEADLESS:
            return config
        return dataclasses.replace(config, task_type=self.head_of)


class PeftModelForCausalLM(PeftModel):
    """For task_type="CAUSAL_LM"."""


class PeftModelForSeq2SeqLM(PeftModel):
    """For task_type="SEQ_2_SEQ_LM"."""


class PeftModelForFeatureExtraction(PeftModel):
    """For task_type="FEATURE_EXTRACTION"."""


class PeftModelForSequenceClassification(PeftModel):
    """For task_type="SEQ_CLS": the classification head is trained whole and stored with the adapter."""

    head_of = "SEQ_CLS"


class PeftModelForTokenClassification(PeftModel):
    """For task_type="TOKEN_CLS": the classification head is trained whole and stored with the adapter."""

    head_of = "TOKEN_CLS"


class PeftModelForQuestionAnswering(PeftModel):
    """For task_type="QUESTION_ANS": the span head is trained whole and stored with the adapter."""

    head_of = "QUESTION_ANS"


class PeftMixedModel(PeftModel):
    """PEFT's class for several adapters active at once, which every class here allows: ``set_adapter([...])``."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def peft_class_for(task_type: str | None) -> type[PeftModel]:
    """The class of a task; ``PeftModel`` where none is given."""
    return PeftModel if task_type is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task_type]


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def no_leftover_keys() -> Any:
    """torch's report of a load that left no key over."""
    return torch.nn.modules.module._IncompatibleKeys([], [])
