"""The tables of words at a model's two ends, where an adapter's file has to bring them along.

Words that were added to a vocabulary are rows of the base's tables, which no adapter trains; but who loads the adapter
on the base from its folder has other rows in their place, or none. So the tables are stored with it ("auto", PEFT's
rule) where the model has another number of words than its base has on the disk, where the tables were resized after the
model was wrapped, and where the adapter has branches on a table. The base's own number is read from its config.json,
in a folder or in the local cache of the Hub; nothing is downloaded. A model without a name has no such config; its
modules still say for how many words they were made.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..codecs import registered_codec
from ..config.lora import LoraConfig
from ..errors import AdapterError
from ..injection.adapted import Adapted
from ..injection.biases import own_parts
from ..injection.ties import end_tables, words_of
from ..naming import Tree, base_of, unwrapped
from .folder import PREFIX

# PEFT's names for the ends of a model: where targets are called so, the tables under the branches are stored.
_STORED_WITH_BRANCHES = ("embed_tokens", "lm_head")

logger = logging.getLogger(__name__)


def table_paths(tree: Tree) -> list[str]:
    """Paths of the embedding and the head, in so far as the model has them and stores them as they are."""
    found = []
    for table in end_tables(tree.model):
        base = None if table is None else base_of(table)
        codec = None if base is None else registered_codec(base)
        if base is not None and tree.paths_of(base) and (codec is None or codec.quantizer(base) is None):
            found.append(tree.paths_of(base)[0])
    return list(dict.fromkeys(found))


def tables_to_store(adapted: Adapted, adapter_name: str, save: bool | str, tree: Tree) -> list[str]:
    """Paths of the tables that go into the file of ``adapter_name``.

    Args:
        save: True for all, False for none, or "auto": see the module's text.

    Raises:
        AdapterError: ``save`` is none of these.
    """
    if save not in ("auto", True, False):
        raise AdapterError(
            f"save_embedding_layers: expected 'auto', True or False, found {save!r}; leave it out, and tables are "
            "stored where they were resized"
        )
    paths = table_paths(tree) if save else []
    if save is True and not paths:
        logger.warning("save_embedding_layers=True: the model has no tables of words that it tells, so none is stored")
    if save is True or not paths or _resized(adapted, adapter_name, tree):
        return paths
    if adapter_name in adapted.backbones:  # its base, tables and all, is the one that it was started on
        return []
    targets = adapted.configs[adapter_name].target_modules
    if isinstance(targets, list) and not set(targets) & set(_STORED_WITH_BRANCHES):
        return []
    own = [path for path in paths if own_parts(tree.modules[path], adapter_name)]
    return [path for path in own if path.rpartition(".")[2] in _STORED_WITH_BRANCHES]


def stored_words(tree: Tree, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """How many words the tables have that an adapter's file with tensors of ``shapes`` belongs to; None if it doesn't
    hold anything of their size."""
    places = {"lora_embedding_A": 1, "lora_B.weight": 0}
    places |= {f"{within}weight": 0 for within in ("", "base_layer.", "modules_to_save.", "original_module.")}
    for path in table_paths(tree):
        if base_of(tree.modules[path])._parameters.get("weight") is None:
            continue
        for name, dimension in places.items():
            shape = shapes.get(f"{PREFIX}{path}.{name}")
            if shape is not None and len(shape) == 2:
                return int(shape[dimension])
    return None


def _resized(adapted: Adapted, adapter_name: str, tree: Tree) -> bool:
    """Whether the model has another number of words than its base has, as far as that can be known."""
    model = unwrapped(tree.model)
    rows = words_of(model)
    if rows is None:
        return False
    if adapted.words not in (None, rows):
        return True
    now, config = _words_in(getattr(model, "config", None)), adapted.configs[adapter_name]
    own = _words_of_base(model, config)
    if own is not None and now is not None:
        return own != now
    made_for = {now} | {
        vars(part).get("vocab_size") for part in (model, getattr(model, "base_model", None)) if part is not None
    }
    if made_for - {None, rows}:
        return True
    if config.base_model_name_or_path:
        logger.warning(
            "%s: expected a config.json of the base model, here or in the cache, to tell whether words were added to "
            "its vocabulary, found none; if there were, pass save_embedding_layers=True, or they aren't stored",
            config.base_model_name_or_path,
        )
    return False


def _words_of_base(model: nn.Module, config: LoraConfig) -> int | None:
    """The number of words in the base's own config.json, by the class that the model's config has."""
    name, kind = config.base_model_name_or_path, cast("Any", type(getattr(model, "config", None)))
    if not name or not hasattr(kind, "from_pretrained"):
        return None
    folder: Path | None = Path(name)
    if not (Path(name) / "config.json").is_file():
        folder = _in_cache(name, config.revision or getattr(model.config, "_commit_hash", None))
    if folder is None:
        return None
    try:
        return _words_in(kind.from_pretrained(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # not a config of this class
        return None


def _in_cache(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _words_in(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "vocab_size", None)
    return found if isinstance(found, int) else None
