"""What an adapter's tensors say of the config that it was trained with, where a checkpoint's is another.

- A classifier on a language model: the adapter holds its head as a trained copy (``modules_to_save``), and the base has
  none: transformers made it anew for the training. The merged model is of the adapter's class, with as many labels
  as its head has rows; the base's own head is left out.
- More words: the base's embeddings were resized for the training, and the adapter holds the new tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...checkpoints.model_folder import skeleton, task_of
from ...checkpoints.stored_names import StoredNames
from ...injection.ties import end_tables
from ..stored_adapter import StoredAdapter, parameter_name

# transformers' tables from a config's class to a model's, by PEFT's name of the task.
_CLASSES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
}
_LABELLED = ("SEQ_CLS", "TOKEN_CLS")


def trained_config(folder: Path, adapters: Mapping[str, StoredAdapter]) -> dict[str, Any]:
    """Entries of the config of ``folder`` that have to be others for the adapters' model; often none."""
    own = skeleton(folder, quantized=True)
    held = {parameter_name(key): value for one in adapters.values() for key, value in one.rest.items()}
    resized = _vocabulary(own, held)
    return {**resized, **_class(folder, own, adapters, held, resized)}


def _vocabulary(own: nn.Module, held: Mapping[str, Tensor]) -> dict[str, Any]:
    """The number of words, if the adapters hold larger or smaller tables."""
    tables = [getattr(end, "weight", None) for end in end_tables(own)]
    names, parameters = StoredNames(own), dict(own.named_parameters(remove_duplicate=False))
    words = getattr(own.config, "vocab_size", None)
    found = set()
    for name, value in held.items():
        table = parameters.get(names.name_of(name) or "")
        if table is None or not any(table is other for other in tables):
            continue
        if value.shape[1:] == table.shape[1:] and table.shape[0] == words != value.shape[0]:
            found.add(value.shape[0])
    return {"vocab_size": found.pop()} if len(found) == 1 else {}


def _class(
    folder: Path,
    own: nn.Module,
    adapters: Mapping[str, StoredAdapter],
    held: Mapping[str, Tensor],
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """The class, and the number of its labels, if the adapters were trained on another than the checkpoint's."""
    import transformers

    tasks = {one.config.task_type for one in adapters.values() if one.rest and one.config.task_type in _CLASSES}
    if len(tasks) != 1 or task_of(type(own).__name__) in tasks:
        return {}
    task = str(tasks.pop())
    found = getattr(transformers, _CLASSES[task]).get(type(own.config), None)
    if found is None:
        return {}
    rows = sorted({value.shape[0] for value in held.values() if value.dim() > 1}) if task in _LABELLED else [None]
    for labels in rows:
        overrides: dict[str, Any] = {"architectures": [found.__name__]}
        if labels is not None:
            overrides["num_labels"] = labels
        state = skeleton(folder, quantized=True, **others, **overrides).state_dict()
        if all(name in state and state[name].shape == value.shape for name, value in held.items()):
            return overrides
    return {}
