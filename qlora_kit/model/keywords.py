"""Keywords that PEFT's models take beside the base model's: which is taken here, and which aren't; and those of saving.

Many models hand on whatever keyword they are given, so one that no module reads would vanish in silence, and with it
what it asked for: rows that compute with an adapter of their own. So ``adapter_names`` is taken out of the keywords,
and others, and what is mistyped for any of them, are refused, except where the base model itself names a parameter so.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import AdapterError, closest

#: What each does in PEFT, and what there is to do here.
PEFT_KEYWORDS = {
    "adapter_names": "adapter_names=[...] has an adapter for each row of the batch, '__base__' for none",
    "alora_offsets": "adapters that begin within a row (aLoRA) aren't implemented; leave it out",
    "task_ids": "it is for prompt tuning, which isn't implemented; leave it out",
}

#: Keywords of transformers' ``save_pretrained`` that are about whole models, or about the Hub.
_OF_WHOLE_MODELS = (
    "commit_description",
    "commit_message",
    "create_pr",
    "max_shard_size",
    "private",
    "repo_id",
    "revision",
    "save_function",
    "save_original_format",
    "save_peft_format",
    "tags",
    "token",
    "variant",
)
_OF_ADAPTERS = (
    "safe_serialization",
    "selected_adapters",
    "state_dict",
    "is_main_process",
    "save_embedding_layers",
    "push_to_hub",
)


def as_names(names: str | Sequence[str]) -> list[str]:
    """``names`` as a list, one alone included."""
    return [names] if isinstance(names, str) else list(names)


def check_save_keywords(keywords: Iterable[str]) -> None:
    """Pass over those that say nothing about adapters.

    Raises:
        TypeError: neither we nor transformers know one.
    """
    known = (*_OF_ADAPTERS, *_OF_WHOLE_MODELS)
    for keyword in keywords:
        if keyword not in known:
            raise TypeError(
                f"save_pretrained: unexpected keyword {keyword!r}; closest: {closest(keyword, known, count=1)}"
            )


def without_peft_keywords(keywords: Mapping[str, Any], function: Callable[..., Any]) -> tuple[dict[str, Any], Any]:
    """``keywords`` for the base model's ``function``, and the adapters' names for its rows, None where none are given.

    Those of PEFT's that are None say nothing and are left out.

    Raises:
        AdapterError: one of them means something in PEFT, or is mistyped for one that does, and ``function`` has no
            parameter of this name.
    """
    kept, names = {}, None
    for keyword, value in keywords.items():
        meant = _meant(keyword)
        if meant is None or keyword in inspect.signature(function).parameters:
            kept[keyword] = value
        elif keyword == "adapter_names":
            names = value
        elif value is not None or keyword != meant:
            mistyped = "" if keyword == meant else f", which looks like PEFT's {meant}"
            raise AdapterError(
                f"{keyword}={value!r:.80}: expected a keyword of the base model, found one that it doesn't "
                f"name{mistyped}: {PEFT_KEYWORDS[meant]}"
            )
    return kept, names


def _meant(keyword: str) -> str | None:
    """The one of PEFT's keywords that ``keyword`` is, or is mistyped for."""
    if keyword in PEFT_KEYWORDS:
        return keyword
    if keyword.startswith("adapt"):
        return "adapter_names"
    return None if torch.compiler.is_compiling() else _mistyped(keyword)  # which torch.compile can't follow


@functools.lru_cache(maxsize=1000)
def _mistyped(keyword: str) -> str | None:
    # For names like no other that a model is given: one letter makes "mask_ids" of "task_ids".
    near = difflib.get_close_matches(keyword, ("adapter_names", "alora_offsets"), n=1, cutoff=0.8)
    return near[0] if near else None
