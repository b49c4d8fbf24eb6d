"""LoraConfig and LoftQConfig: plain values, checked when they are made, read from and written to PEFT's JSON.

A config is never changed by the code that reads it: what is resolved later (targets from an architecture,
ranks from patterns) lives in the plan, not here. Fields have PEFT's names and defaults, so that a script and
an ``adapter_config.json`` mean the same here as there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..checkpoints.files import json_object, write_atomically
from ..compat.neighbours.passing import blank, loaded, standing_for
from ..errors import ConfigError, closest
from .checks import check_bool, check_choice, check_int, check_names, check_positive, check_regex, failure
from .loftq import LoftQConfig
from .merge_aware import MergeAware
from .peft_json import STARTS_ELSEWHERE, fields_from_json

CONFIG_NAME = "adapter_config.json"

# Names that ``init_lora_weights`` may hold besides True and False; ``register_initializer`` adds to it.
INIT_NAMES: set[str] = {"gaussian", "loftq"}

# PEFT's names of what the base model is for.
TASK_TYPES = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")

# Written even at their defaults: readers other than PEFT ask for them.
_ALWAYS_WRITTEN = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules")


@dataclass
class LoraConfig:
    """Which modules get an adapter, of what rank and scaling, and how it starts.

    Attributes:
        r: rank of the adapters.
        target_modules: a list of names (a path, or the end of one after a dot), a regular expression that a
            whole path must match, "all-linear", or None for the architecture's usual ones and, in layers that have
            none of these, what stands in their place. Sets are sorted.
        lora_alpha: the branch is multiplied by alpha / r, or by alpha / sqrt(r) with ``use_rslora``.
        lora_dropout: probability of dropping an input of the branch in training, in [0, 1).
        fan_in_fan_out: PEFT's mark for weights stored (in, out). Read and kept; here the module's type tells.
        bias: which of the base model's biases are trained: "none", "all" or "lora_only".
        use_rslora: rank-stabilized scaling (Kalajdzievski 2023).
        modules_to_save: names of modules that are trained whole and stored with the adapter.
        init_lora_weights: True, False (both factors random), "gaussian", "loftq" or a registered name.
        layers_to_transform: only layers of these indices; for target lists.
        layers_pattern: name of the module list that the indices count in.
        rank_pattern, alpha_pattern: other ranks and alphas by path, end of a path, or regular expression.
        megatron_config, megatron_core: arguments of Megatron's TransformerConfig, and the name of the library it is in.
            Neither is needed, as Megatron's modules say how they are shared out; arguments that are given must be
            those of the model, and a name other than "megatron.core" is that of a fork, whose types are then known.
        loftq_config: a LoftQConfig, or a dict of its fields; made where the start is "loftq".
        exclude_modules: names or a regular expression, taken out of the targets.
        task_type: one of PEFT's task names, or None. A new adapter for "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS" also
            trains the model's head whole, as if ``modules_to_save`` named it.
        inference_mode: True in stored adapters: load them frozen.
        base_model_name_or_path, revision: the model that the adapter belongs to.
        auto_mapping: PEFT's record of a custom base class; kept as it is.
        ensure_weight_tying: where the tables of words at a model's two ends are one weight, an adapter on one of them
            (or a trained copy, in ``modules_to_save``) is on both, as one. Without it each has its own or none.
        peft_type: always "LORA".
        merge_aware: train what will be merged: forward computes with the weight as it will be after merging, rounded by
            the storage's own rounding, and gradients go straight through that, so that a merge loses nothing. "same" is
            a merge that keeps each module's few bits; "nf4", "int8", "signed2" and the like are types to merge into;
            {"into": "signed2", "blocksize": 64, "double_quant": True} says more. Only here; PEFT computes without.

    Raises:
        ConfigError: a field has a value that can't work; names it, the value and the fix.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    loftq_config: LoftQConfig | None = None
    exclude_modules: list[str] | str | None = None
    task_type: str | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_type: str = "LORA"
    ensure_weight_tying: bool = field(default=False, kw_only=True)
    merge_aware: str | dict[str, Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_targets()
        self._check_start()
        self._check_labels()
        self._check_merge_aware()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # Trainers take a configuration that is one of PEFT's, where that is there to ask.
        theirs = loaded("peft", "LoraConfig")
        return standing_for(type(self), theirs) if theirs else type(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return blank, (type(self),), vars(self)

    @property
    def is_prompt_learning(self) -> bool:
        """PEFT's question; never."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """PEFT's question; never."""
        return False

    @property
    def merged_into(self) -> MergeAware | None:
        """What ``merge_aware`` says, understood; None where it says nothing."""
        return None if self.merge_aware is None else MergeAware.of(self.merge_aware)

    def scaling_of(self, rank: int, alpha: float) -> float:
        """The factor on B @ A: alpha / rank, or alpha / sqrt(rank) with ``use_rslora``."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def as_stored(self) -> LoraConfig:
        """The config that goes beside trained weights: frozen, and started by nothing but the weights.

        A start is history once there are weights. Left in the file, "loftq" would make PEFT quantize the base
        again while loading, and a registered name of one's own would be unknown to it.
        """
        return replace(self, init_lora_weights=True, loftq_config=None, inference_mode=True)

    def to_dict(self) -> dict[str, Any]:
        """PEFT's JSON form: the fields that all readers ask for, then those not at their default, by name."""
        values = {spec.name: deepcopy(getattr(self, spec.name)) for spec in fields(self) if spec.name != "loftq_config"}
        if self.loftq_config:
            values["loftq_config"] = _without_defaults(self.loftq_config, keep=("loftq_bits", "loftq_iter"))
            if not isinstance(self.loftq_config.calibration, (str, type(None))):
                values["loftq_config"].pop("calibration", None)  # tensors have no place in JSON
        changed = _without_defaults(self, keep=_ALWAYS_WRITTEN)
        rest = sorted(set(changed) - set(_ALWAYS_WRITTEN))
        return {name: values[name] for name in (*_ALWAYS_WRITTEN, *rest) if name in values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoraConfig:
        """From a parsed ``adapter_config.json`` of any PEFT release since 0.4; ``data`` isn't changed.

        Raises:
            ConfigError: not a LoRA config, a bad value, or a foreign field that changes behaviour.
        """
        return cls(**fields_from_json(data, [f.name for f in fields(cls)], INIT_NAMES))

    def to_json(self) -> bytes:
        """``to_dict`` as the bytes of an ``adapter_config.json``.

        Raises:
            ConfigError: ``megatron_config`` or ``auto_mapping`` holds what JSON can't.
        """
        try:
            return (json.dumps(self.to_dict(), indent=2) + "\n").encode()
        except TypeError as error:
            raise ConfigError(
                f"megatron_config, auto_mapping: expected values that JSON can hold, found others ({error}); "
                "pass numbers, strings, lists and dicts"
            ) from error

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``adapter_config.json`` into ``directory``, atomically; the folder is made if missing."""
        write_atomically(Path(directory) / CONFIG_NAME, self.to_json())

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> LoraConfig:
        """Read ``adapter_config.json`` from a local ``directory``.

        Raises:
            ConfigError: the file is missing, isn't JSON, or ``from_dict`` refuses it.
        """
        path = Path(directory) / CONFIG_NAME
        try:
            data = json_object(path.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{path}: expected a readable file, found none ({error.strerror}); pass the folder that an "
                "adapter was saved to (an adapter of a name other than 'default' is in a subfolder of that name)"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{path}: expected a JSON object, found {error}; save the adapter again") from error
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except (AttributeError, KeyError, OverflowError, TypeError) as error:
            raise ConfigError(
                f"{path}: expected the fields of an adapter's config, found one that can't be understood ({error}); "
                "save the adapter again"
            ) from error

    def _check_numbers(self) -> None:
        check_int("r", self.r, 1, "pass a rank such as r=8")
        check_positive("lora_alpha", self.lora_alpha, "pass an alpha such as lora_alpha=16")
        p = self.lora_dropout
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
            raise failure("lora_dropout", "a probability in [0, 1)", p, "pass one such as lora_dropout=0.05")
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = {} if getattr(self, name) is None else getattr(self, name)
            if not isinstance(pattern, Mapping) or not all(isinstance(key, str) and key for key in pattern):
                raise failure(name, "a dict from path or regular expression", pattern, f"pass {name}={{'q_proj': 16}}")
            for key, value in pattern.items():
                check_regex(f"{name}[{key!r}]", key)
                if name == "rank_pattern":
                    check_int(f"{name}[{key!r}]", value, 1, "pass a rank, or leave the entry out")
                else:
                    check_positive(f"{name}[{key!r}]", value, "pass an alpha, or leave the entry out")
            setattr(self, name, dict(pattern))

    def _check_targets(self) -> None:
        self.target_modules = check_names("target_modules", self.target_modules, regex=True)
        if self.target_modules == []:
            raise failure("target_modules", "at least one name", [], "name a module, or pass 'all-linear'")
        self.exclude_modules = check_names("exclude_modules", self.exclude_modules, regex=True)
        self.modules_to_save = check_names("modules_to_save", self.modules_to_save, regex=False)  # type: ignore[assignment]
        if isinstance(self.layers_pattern, str):  # one name, never a regular expression
            check_names("layers_pattern", [self.layers_pattern], regex=False)
        else:
            self.layers_pattern = check_names("layers_pattern", self.layers_pattern, regex=False)
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            check_regex("layers_pattern", pattern)
        layers = self.layers_to_transform
        if isinstance(layers, (list, tuple, set, frozenset, range)):
            if not layers:
                raise failure("layers_to_transform", "at least one index", layers, "leave it out for all layers")
            for index in layers:
                check_int("layers_to_transform", index, 0, "pass indices such as [0, 1]; they count from 0")
            self.layers_to_transform = sorted(layers) if isinstance(layers, (set, frozenset)) else list(layers)
        elif layers is not None:
            check_int("layers_to_transform", layers, 0, "pass an index, or a list such as [0, 1]; they count from 0")
        if self.layers_pattern is not None and layers is None:
            fix = "pass layers_to_transform=[0, 1] or the like, or leave layers_pattern out"
            raise failure("layers_pattern", "None without layers_to_transform", self.layers_pattern, fix)
        if isinstance(self.target_modules, str) and layers is not None:
            fix = "list the names in target_modules, or put the indices into its regular expression"
            raise failure("layers_to_transform", f"None with target_modules={self.target_modules!r}", layers, fix)

    def _check_start(self) -> None:
        init = self.init_lora_weights
        if not isinstance(init, bool) and (not isinstance(init, str) or init not in INIT_NAMES):
            known = ["True", "False", *sorted(INIT_NAMES)]
            near = closest(init, INIT_NAMES, count=1) if isinstance(init, str) else []
            hint = f"did you mean {near[0]!r}? " if near else ""
            elsewhere = [advice for name, advice in STARTS_ELSEWHERE.items() if str(init).lower().startswith(name)]
            fix = (
                elsewhere[0]
                if elsewhere
                else hint + "a start of your own is registered with qlora_kit.initializers.register_initializer"
            )
            raise failure("init_lora_weights", f"one of {known}", init, fix)
        if self.loftq_config is not None and not isinstance(self.loftq_config, LoftQConfig):
            if not isinstance(self.loftq_config, Mapping):
                fix = "pass loftq_config=LoftQConfig(loftq_bits=4, loftq_iter=5)"
                raise failure("loftq_config", "a LoftQConfig, a dict of its fields or None", self.loftq_config, fix)
            self.loftq_config = LoftQConfig.from_dict(self.loftq_config) if self.loftq_config else None
        if init == "loftq" and self.loftq_config is None:
            self.loftq_config = LoftQConfig()
        if self.loftq_config is not None and (isinstance(init, bool) or init == "gaussian"):
            fix = "pass init_lora_weights='loftq', or leave loftq_config out"
            raise failure("loftq_config", f"None with init_lora_weights={init!r}", self.loftq_config, fix)

    def _check_labels(self) -> None:
        for name in ("fan_in_fan_out", "use_rslora", "inference_mode", "ensure_weight_tying"):
            check_bool(name, getattr(self, name))
        check_choice("bias", self.bias, ("none", "all", "lora_only"), "pass bias='none'")
        # PEFT's own enumerations are strings with a value; only the string is kept.
        self.task_type = getattr(self.task_type, "value", self.task_type)
        self.peft_type = getattr(self.peft_type, "value", self.peft_type)
        if self.task_type is not None:
            check_choice("task_type", self.task_type, TASK_TYPES, "leave task_type out")
        check_choice("peft_type", self.peft_type, ("LORA",), "this toolkit implements LoRA only")
        if isinstance(self.base_model_name_or_path, os.PathLike):
            self.base_model_name_or_path = os.fspath(self.base_model_name_or_path)
        for name in ("base_model_name_or_path", "revision", "megatron_core"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise failure(name, "a string or None", getattr(self, name), f"pass {name}='...' or leave it out")
        for name in ("megatron_config", "auto_mapping"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                    fix = f"pass {name}={{...}} or leave it out"
                    raise failure(name, "a dict with names as keys, or None", value, fix)
                setattr(self, name, dict(value))

    def _check_merge_aware(self) -> None:
        wanted = self.merged_into
        if wanted is None:
            return
        self.merge_aware = wanted.to_json()
        if self.lora_dropout:
            fix = "leave lora_dropout out: a merge can't know which inputs a step dropped"
            raise failure("lora_dropout", "0 with merge_aware", self.lora_dropout, fix)


def _without_defaults(config: Any, keep: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a dataclass that are in ``keep`` or differ from their default."""
    written = {}
    for spec in fields(config):
        default = spec.default if spec.default_factory is MISSING else spec.default_factory()
        value = getattr(config, spec.name)
        # What can't be compared may be a tensor.
        if spec.name in keep or (value != default if spec.compare else value is not default):
            written[spec.name] = value
    return written
