"""What an ``adapter_config.json`` says, as PEFT 0.4 to 0.21 wrote it, in the fields of our own LoraConfig.

PEFT writes every field of its config, most of them at a default that says nothing; each release adds some. A
reader that ignores what it doesn't know runs a different model in silence, and one that refuses it can't
read next month's files. Here a foreign field passes when it says nothing: null, false, empty, or PEFT's own
default for it. Anything else changes what the adapter computes and is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import ConfigError, closest

# Fields of PEFT's config that this toolkit doesn't implement, with the value that turns each off: the default
# of that field in peft/tuners/lora/config.py, releases 0.2 to 0.21.2. Off values that are false or null
# already pass as such and are listed for the reader, and for the test that compares this table with PEFT's.
FOREIGN_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "enable_lora": None,  # 0.2
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "merge_weights": False,  # 0.2
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}

# Fields without influence on what a stored adapter computes, whatever they hold.
WITHOUT_EFFECT = {
    "corda_config",  # describes a start, and the weights are past it, as with the next two
    "eva_config",
    "lora_ga_config",
    "modules_to_tie",  # derived from ensure_weight_tying
    "peft_version",
    "qalora_group_size",  # read only with use_qalora
    "runtime_config",
    "target_modules_to_tie",
}

# PEFT's starts that aren't ours. The first kind leaves the base weights alone, so a stored adapter is past
# it; the second also rewrites them, so the adapter belongs to a base that the file doesn't hold.
ADAPTER_ONLY_STARTS = {"eva", "mica", "orthogonal"}
BASE_REWRITING_STARTS = ("corda", "lora_ga", "olora", "pissa")

# PEFT's starts by name, and what to do here for the same: its name may begin so.
_PISSA = (
    "here it is one of LoftQ's methods, which quantizes what is left: pass init_lora_weights='loftq' and "
    "loftq_config=LoftQConfig(method='pissa')"
)
STARTS_ELSEWHERE = {
    "pissa": _PISSA,
    "corda": "for a start that looks at the inputs pass init_lora_weights='loftq' and LoftQConfig(method='aligned')",
    "eva": "for a start that looks at the inputs pass init_lora_weights='loftq' and LoftQConfig(method='qera')",
    "olora": "it isn't implemented: pass init_lora_weights=True, or start with PEFT and load the adapter",
    "orthogonal": "it isn't implemented: pass init_lora_weights=True, or start with PEFT and load the adapter",
    "lora_ga": "it isn't implemented: pass init_lora_weights=True, or start with PEFT and load the adapter",
    "mica": "it isn't implemented: pass init_lora_weights=True, or start with PEFT and load the adapter",
    "kaiming": "that is PEFT's default and the one here: pass init_lora_weights=True",
}

# Fields that some writers leave null where they mean the default. Not so a rank or an alpha: what null means there
# decides what a stored adapter computes.
_NULL_IS_DEFAULT = {
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "rank_pattern",
    "use_rslora",
}


def fields_from_json(data: Mapping[str, Any], own: Collection[str], starts: Collection[str]) -> dict[str, Any]:
    """The entries of ``data`` that the fields ``own`` of a LoraConfig take; the rest says nothing.

    Args:
        data: a parsed ``adapter_config.json``; not changed.
        own: names of LoraConfig's fields.
        starts: names that ``init_lora_weights`` may hold.

    Raises:
        ConfigError: the file isn't a LoRA config, or a field changes behaviour that isn't implemented here.
    """
    if "peft_type" not in data:
        raise ConfigError(
            "peft_type: expected 'LORA' in an adapter's config, found no such field; this isn't an "
            f"adapter_config.json (its fields: {sorted(data)[:8]})"
        )
    foreign = {key: value for key, value in data.items() if key not in own and key not in WITHOUT_EFFECT}
    for key, value in foreign.items():
        if not (says_nothing(value) or (key in FOREIGN_DEFAULTS and value == FOREIGN_DEFAULTS[key])):
            near = closest(key, own, count=1)
            hint = "" if key in FOREIGN_DEFAULTS or not near else f" (closest known field: {near[0]!r})"
            raise ConfigError(
                f"{key}: expected a field of this toolkit's LoraConfig, or PEFT's default for it, found {value!r}"
                f"{hint}; it changes what the adapter computes and isn't implemented here: load this adapter with "
                "PEFT, or remove the field if you know that it has no effect"
            )
    fields = {
        key: value for key, value in data.items() if key in own and not (value is None and key in _NULL_IS_DEFAULT)
    }
    # PEFT writes absent lists as null, "" or []; absent patterns as null or {}.
    for key in (
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "modules_to_save",
    ):
        if fields.get(key) in ("", [], {}):
            fields[key] = None
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start not in starts:
        if start in ADAPTER_ONLY_STARTS:
            fields["init_lora_weights"] = True
        elif start.startswith(BASE_REWRITING_STARTS):
            raise ConfigError(
                f"init_lora_weights: expected a start that leaves the base weights alone, found {start!r}, "
                "which rewrites them: this adapter is right only on that rewritten base; save it again with PEFT's "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
    return fields


def says_nothing(value: Any) -> bool:
    """Whether ``value``, of a field that isn't known, leaves what it is about turned off."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)
