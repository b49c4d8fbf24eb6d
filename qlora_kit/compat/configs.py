"""PEFT's configuration names: enumerations, ``LoraConfig`` with PEFT's arguments, ``PeftConfig`` as their reader."""

from __future__ import annotations

import enum
import os
from abc import ABC
from typing import Any

from ..config import lora as core
from ..config.peft_json import FOREIGN_DEFAULTS
from ..errors import ConfigError
from .hub import adapter_folder


class PeftType(str, enum.Enum):
    """The kinds of adapter that there are here; equal to their names as strings."""

    LORA = "LORA"


class TaskType(str, enum.Enum):
    """What a base model is for; picks the class that ``get_peft_model`` returns."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class LoraConfig(core.LoraConfig):
    """``qlora_kit.LoraConfig``, taking PEFT's other arguments too as long as they are at PEFT's defaults.

    Scripts and frameworks pass ``use_dora=False`` and the like as a matter of course.

    Raises:
        ConfigError: as ``qlora_kit.LoraConfig``; or an argument asks for something that isn't implemented.
        TypeError: an argument that PEFT doesn't have either.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in FOREIGN_DEFAULTS.keys() & kwargs.keys():
            if (value := kwargs.pop(name)) != FOREIGN_DEFAULTS[name]:
                raise ConfigError(
                    f"{name}: expected {FOREIGN_DEFAULTS[name]!r}, found {value!r}; this part of PEFT isn't "
                    "implemented here: leave it out, or train this adapter with PEFT"
                )
        super().__init__(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> LoraConfig:
        """Read an adapter's configuration from a local folder or, as in PEFT, from a Hub repository."""
        return super().from_pretrained(adapter_folder(directory, subfolder, **hub))  # type: ignore[return-value]


class PeftConfig(ABC):  # noqa: B024 -- for register() below: LoraConfig lies left of this module
    """Reads whatever kind of configuration a folder holds, and is a base class of every kind to ``isinstance``."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any
    ) -> LoraConfig:
        """See ``LoraConfig.from_pretrained``."""
        return LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder, **hub)


PeftConfig.register(core.LoraConfig)


def get_peft_config(config_dict: dict[str, Any]) -> LoraConfig:
    """A configuration from its dictionary form, as ``to_dict()`` gives it."""
    return LoraConfig.from_dict(config_dict)  # type: ignore[return-value]
