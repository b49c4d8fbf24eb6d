"""From an adapter's folder alone to base model and adapter: the folder's configuration names the base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from ..adapter_files.folder import read_shapes
from ..adapter_files.words import stored_words, words_of
from ..config import lora as core
from ..errors import ConfigError
from ..naming import Tree
from .configs import PeftConfig
from .hub import HUB_ARGUMENTS, adapter_folder
from .tasks import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    peft_class_for,
)


class _AutoPeftModel:
    """Never instantiated; see ``from_pretrained``."""

    auto_class: ClassVar[str]  # of transformers, which is imported only when a model is loaded
    peft_class: ClassVar[type[PeftModel]]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: core.LoraConfig | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that the adapter was made on, then the adapter.

        Args:
            pretrained_model_name_or_path: folder or Hub repository of the adapter.
            config: replaces the stored configuration.
            revision, subfolder: where in a repository the adapter is.
            kwargs: for the base model's ``from_pretrained``: dtype, device_map, quantization_config, ...

        Raises:
            ConfigError: the adapter is for another task, or doesn't name its base model.
        """
        import transformers

        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        folder = adapter_folder(pretrained_model_name_or_path, revision=revision, **hub)
        adapter = folder / subfolder if subfolder else folder
        config = PeftConfig.from_pretrained(adapter) if config is None else config
        if config.task_type is not None and (expected := peft_class_for(config.task_type)) is not cls.peft_class:
            fix = f"load it with Auto{expected.__name__}"
            raise ConfigError(f"task_type: expected that of {cls.__name__}, found {config.task_type!r}; {fix}")
        if not config.base_model_name_or_path:
            raise ConfigError(
                f"{folder}: expected base_model_name_or_path in adapter_config.json, found none; load the base "
                "model yourself and use PeftModel.from_pretrained(model, folder)"
            )
        auto_class = getattr(transformers, cls.auto_class)
        model = auto_class.from_pretrained(config.base_model_name_or_path, revision=config.revision, **kwargs)
        _resize_(model, adapter, folder)
        return cls.peft_class.from_pretrained(model, adapter, adapter_name, is_trainable, config)


def _resize_(model: Any, adapter: Path, folder: Path) -> None:
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
        tokens = len(transformers.AutoTokenizer.from_pretrained(folder))
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
