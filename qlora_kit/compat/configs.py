"""PEFT's configuration names: enumerations, ``LoraConfig`` with PEFT's fields, ``PeftConfig`` as their reader."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from abc import ABC
from collections.abc import Mapping
from typing import Any

from ..config import lora as core
from ..config.peft_json import FOREIGN_DEFAULTS, WITHOUT_EFFECT, says_nothing
from ..errors import ConfigError
from .foreign import NAMES_OF
from .hub import adapter_folder

#: The release of PEFT whose fields are written, and the version that files name.
PEFT_VERSION = "0.21.2"

#: The kinds of adapter that PEFT has, equal to their names as strings. Here there is LORA.
_enumeration: Any = enum.Enum  # whose members a type checker wants written out
PeftType: Any = _enumeration("PeftType", [(kind, kind) for kind in ("LORA", *NAMES_OF)], type=str, module=__name__)


class TaskType(str, enum.Enum):
    """What a base model is for; picks the class that ``get_peft_model`` returns."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftConfig(ABC):  # noqa: B024 -- for register() below: the core's LoraConfig lies left of this module
    """Reads whatever kind of configuration a folder holds, and is a base class of every kind to ``isinstance``."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> LoraConfig:
        """See ``LoraConfig.from_pretrained``."""
        return LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The fields in an ``adapter_config.json``, as a dictionary and unchecked."""
        with open(path_json_file, encoding="utf-8") as file:
            fields: dict[str, Any] = json.load(file)
        return {name: value for name, value in fields.items() if name != "runtime_config"}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> LoraConfig:
        """The configuration of the kind that ``peft_type`` says, LoRA where it says nothing, from its fields."""
        return LoraConfig.from_dict({"peft_type": "LORA", **kwargs})

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """``kwargs`` as they are; a subclass may change them before a configuration is made."""
        return kwargs

    @property
    def is_prompt_learning(self) -> bool:
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        return False


PeftConfig.register(core.LoraConfig)


@dataclasses.dataclass
class LoraRuntimeConfig:
    """How PEFT computes, never what; nothing of it is implemented here, and none of it is stored."""

    ephemeral_gpu_offload: bool = False

    def __post_init__(self) -> None:
        if self.ephemeral_gpu_offload:
            raise ConfigError(
                "ephemeral_gpu_offload: expected False, found True; starts compute where the base's weight lies, so "
                "leave it out, or load the base onto the GPU"
            )


#: Fields of PEFT's that are read and written but say nothing here, whatever they hold.
_IDLE = {"qalora_group_size": 16, "peft_version": PEFT_VERSION}
#: Taken, and not written: fields of a release that files are hardly left of.
_OF_OLD = ("enable_lora", "merge_weights")
#: Every field of PEFT's that the core doesn't have, with the default that turns it off.
_PEFT_DEFAULTS = {**FOREIGN_DEFAULTS, "corda_config": None, "eva_config": None, "lora_ga_config": None}

#: What there is here in place of a field, for the message that refuses it.
_INSTEAD = {
    "alora_invocation_tokens": "adapters apply to whole rows",
    "arrow_config": "several adapters at once are set_adapter([...]), and one of several add_weighted_adapter",
    "corda_config": "the starts that there are are True, False, 'gaussian' and 'loftq'",
    "eva_config": "the starts that there are are True, False, 'gaussian' and 'loftq'",
    "lora_bias": "the base's biases are trained with bias='lora_only' or 'all'",
    "lora_ga_config": "the starts that there are are True, False, 'gaussian' and 'loftq'",
    "target_parameters": "modules are named in target_modules; parameters without a module can't have a branch yet",
    "trainable_token_indices": "a whole table is trained with modules_to_save",
    "use_dora": "there is plain LoRA, and rank-stabilized scaling by use_rslora",
    "use_qalora": "quantized bases of any kind get plain LoRA, started by 'loftq'",
}

_PeftFields: Any = dataclasses.make_dataclass(
    "_PeftFields",
    [
        *(
            (name, Any, dataclasses.field(default=default, kw_only=True))
            for name, default in {**_PEFT_DEFAULTS, **_IDLE}.items()
            if name not in core.LoraConfig.__dataclass_fields__
        ),
        ("runtime_config", LoraRuntimeConfig, dataclasses.field(default_factory=LoraRuntimeConfig, kw_only=True)),
    ],
)


@dataclasses.dataclass
class LoraConfig(core.LoraConfig, _PeftFields, PeftConfig):
    """``qlora_kit.LoraConfig`` with PEFT's other fields, each of which can be read and must be at PEFT's default. What
    isn't PEFT's (``merge_aware``) is written where it says something.

    Scripts and frameworks pass ``use_dora=False`` and the like as a matter of course. As in PEFT, targets and
    exclusions given as a list become a set, and the types are enumerations (equal to their names as strings).

    Raises:
        ConfigError: as ``qlora_kit.LoraConfig``; or a field asks for something that isn't implemented.
        TypeError: a field that PEFT doesn't have either.
    """

    def __post_init__(self) -> None:
        self._check_peft_fields()
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), list):
                setattr(self, name, set(names))
        self.loftq_config = {} if self.loftq_config is None else self.loftq_config  # type: ignore[assignment]
        self.peft_type = PeftType(self.peft_type)
        self.task_type = None if self.task_type is None else TaskType(self.task_type)

    def _check_peft_fields(self) -> None:
        if self.layers_pattern in ("", [], [""]):  # what PEFT's callers write for none
            self.layers_pattern = None
        for name in _PEFT_DEFAULTS.keys() - core.LoraConfig.__dataclass_fields__.keys():
            value, default = getattr(self, name), _PEFT_DEFAULTS[name]
            if value != default and not says_nothing(value):
                raise ConfigError(
                    f"{name}: expected {default!r}, found {value!r}; this part of PEFT isn't implemented here "
                    f"({_INSTEAD.get(name, 'there is plain LoRA')}): leave it out, or train this adapter with PEFT"
                )
            setattr(self, name, default)

    def to_dict(self) -> dict[str, Any]:
        """Every field of PEFT's as JSON has it, sets sorted; all but ``runtime_config``, as in PEFT."""
        values = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        values.update(super().to_dict())  # which knows how a start is written
        for name in ("runtime_config", *_OF_OLD, *(("merge_aware",) if self.merge_aware is None else ())):
            del values[name]
        plain = {name: getattr(value, "value", value) for name, value in values.items()}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in sorted(plain.items())}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoraConfig:
        """See ``qlora_kit.LoraConfig``."""
        said = {name: value for name, value in data.items() if name not in WITHOUT_EFFECT}
        return super().from_dict(said)  # type: ignore[return-value]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> LoraConfig:
        """Read an adapter's configuration from a local folder or, as in PEFT, from a Hub repository."""
        folder = adapter_folder(pretrained_model_name_or_path, subfolder, **kwargs)
        return super().from_pretrained(folder)  # type: ignore[return-value]

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Write ``adapter_config.json`` into ``save_directory``; ``auto_mapping_dict`` names the base's class in it."""
        mapping = kwargs.pop("auto_mapping_dict", None)
        if kwargs:
            raise TypeError(f"save_pretrained: expected a folder, found {sorted(kwargs)} too; leave them out")
        config = self if mapping is None else dataclasses.replace(self, auto_mapping=mapping)
        super(LoraConfig, config).save_pretrained(save_directory)


def get_peft_config(config_dict: dict[str, Any]) -> LoraConfig:
    """A configuration from its dictionary form, as ``to_dict()`` gives it."""
    return LoraConfig.from_dict(config_dict)
