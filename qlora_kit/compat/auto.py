"""From an adapter's folder alone to base model and adapter: the folder's configuration names the base."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..adapter_files.folder import read_shapes
from ..adapter_files.words import stored_words
from ..config import lora as core
from ..errors import ConfigError
from ..injection.ties import words_of
from ..naming import Tree
from .configs import PeftConfig
from .hub import HUB_ARGUMENTS, OF_LOADING, adapter_folder
from .model import PeftModel
from .tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

#: Packages whose classes an adapter's ``auto_mapping`` may name: what is imported is a file's choice.
_ALLOWED = ("transformers", "diffusers", "sentence_transformers", "timm")


class _AutoPeftModel:
    """Never made; see ``from_pretrained``."""

    auto_class: ClassVar[str | None]  # of transformers, which is imported only when a model is loaded
    peft_class: ClassVar[type[PeftModel]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"{type(self).__name__}: expected from_pretrained(folder), found a call; it is never made itself"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: core.LoraConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        *,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that the adapter was made on, then the adapter.

        Args:
            pretrained_model_name_or_path: folder or Hub repository of the adapter.
            config: replaces the stored configuration.
            revision, subfolder: where in a repository the adapter is.
            import_allowlist: packages from which the base model's class may be imported, where the adapter has no task
                and names the class itself.
            kwargs: for the base model's ``from_pretrained``: dtype, device_map, quantization_config, ...

        Raises:
            ConfigError: the adapter is for another task, or doesn't name its base model or the class of it.
        """
        import transformers

        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        ours = {key: kwargs.pop(key) for key in OF_LOADING if key in kwargs}
        folder = adapter_folder(pretrained_model_name_or_path, revision=revision, **hub)
        adapter = folder / subfolder if subfolder else folder
        found = PeftConfig.from_pretrained(adapter) if config is None else config
        cls._check_task(found)
        if not found.base_model_name_or_path:
            raise ConfigError(
                f"{folder}: expected base_model_name_or_path in adapter_config.json, found none; load the base "
                "model yourself and use PeftModel.from_pretrained(model, folder)"
            )
        auto_class = _mapped_class(found, import_allowlist)
        if auto_class is None and cls.auto_class is not None:
            auto_class = getattr(transformers, cls.auto_class)
        if auto_class is None:
            raise ConfigError(
                f"{folder}: expected an auto_mapping with the base model's class in adapter_config.json, found none; "
                "load the base model yourself and use PeftModel.from_pretrained(model, folder)"
            )
        if hasattr(
            auto_class, "_model_mapping"
        ):  # one of transformers', which asks at the terminal where it isn't told
            kwargs.setdefault("trust_remote_code", False)
        model = auto_class.from_pretrained(found.base_model_name_or_path, revision=found.revision, **kwargs)
        _resize_(model, adapter, folder, trusted=bool(kwargs.get("trust_remote_code")))
        return cls.peft_class.from_pretrained(model, adapter, adapter_name, is_trainable, config, **ours)

    @classmethod
    def _check_task(cls, config: core.LoraConfig) -> None:
        if config.task_type is None:
            return
        expected = PeftModel.of_task(config.task_type)
        if expected is not cls.peft_class:
            task = getattr(config.task_type, "value", config.task_type)
            raise ConfigError(
                f"task_type: expected that of {cls.__name__}, found {task!r}; load it with Auto{expected.__name__}"
            )


def _mapped_class(config: core.LoraConfig, allowed: Sequence[str] | None) -> Any:
    """The class that the adapter names for its base model; None where it names a task or nothing.

    Raises:
        ConfigError: its package isn't among those ``allowed``, or has no such class.
    """
    mapping = config.auto_mapping
    if config.task_type is not None or not mapping:
        return None
    module, name = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
    package, known = module.partition(".")[0], _ALLOWED if allowed is None else allowed
    if package not in known and module not in known:
        raise ConfigError(
            f"auto_mapping: expected a class of {list(known)}, found {module}.{name}; if importing that is safe, pass "
            f"import_allowlist=[{package!r}], or load the base model yourself"
        )
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"auto_mapping: expected a class that can be imported, found {module}.{name} ({error}); load the base "
            "model yourself and use PeftModel.from_pretrained(model, folder)"
        ) from error


class AutoPeftModel(_AutoPeftModel):
    """For adapters without a task, whose ``auto_mapping`` names the base model's class."""

    auto_class = None
    peft_class = PeftModel


def _resize_(model: Any, adapter: Path, folder: Path, *, trusted: bool) -> None:
    """Give ``model`` as many words as the stored adapter's own tables have, padding included; or, where it has none,
    as the tokenizer beside it knows: they may have been added for the training."""
    import transformers

    present = words_of(model)
    if present is None:
        return
    stored = stored_words(Tree(model), read_shapes(adapter))
    if stored is not None:
        if stored != present:
            model.resize_token_embeddings(stored, mean_resizing=False)  # the new rows are in the file
    elif (folder / "tokenizer_config.json").is_file():
        tokens = len(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted))
        if tokens > present:
            model.resize_token_embeddings(tokens)


class AutoPeftModelForCausalLM(_AutoPeftModel):
    auto_class = "AutoModelForCausalLM"
    peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_AutoPeftModel):
    auto_class = "AutoModelForSeq2SeqLM"
    peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_AutoPeftModel):
    auto_class = "AutoModelForSequenceClassification"
    peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_AutoPeftModel):
    auto_class = "AutoModelForTokenClassification"
    peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_AutoPeftModel):
    auto_class = "AutoModelForQuestionAnswering"
    peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_AutoPeftModel):
    auto_class = "AutoModel"
    peft_class = PeftModelForFeatureExtraction
