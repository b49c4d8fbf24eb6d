"""The class that an adapter was trained with, where a checkpoint is that of another: a classifier on a language model.

Such an adapter holds its head as a trained copy (``modules_to_save``), and the base has none: transformers made it anew
for the training. The merged model then is of the adapter's class, with as many labels as its head has rows; the base's
own head is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .adapter_folder import PREFIX
from .combine_files import Stored
from .model_folder import skeleton, task_of

# transformers' tables from a config's class to a model's, by PEFT's name of the task.
_CLASSES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
}
_LABELLED = ("SEQ_CLS", "TOKEN_CLS")


def class_overrides(folder: Path, adapters: Mapping[str, Stored]) -> dict[str, Any]:
    """Entries of the config of ``folder`` that make it a model of the adapters' class; none if it is one."""
    import transformers

    tasks = {one.config.task_type for one in adapters.values() if one.rest and one.config.task_type in _CLASSES}
    own = skeleton(folder, quantized=True)
    if len(tasks) != 1 or task_of(type(own).__name__) in tasks:
        return {}
    task = str(tasks.pop())
    found = getattr(transformers, _CLASSES[task]).get(type(own.config), None)
    if found is None:
        return {}
    wanted = {
        key.removeprefix(PREFIX).replace(".modules_to_save.default.", ".").replace(".modules_to_save.", "."): value
        for one in adapters.values()
        for key, value in one.rest.items()
    }
    rows = sorted({value.shape[0] for value in wanted.values() if value.dim() > 1}) if task in _LABELLED else [None]
    for labels in rows:
        overrides: dict[str, Any] = {"architectures": [found.__name__]}
        if labels is not None:
            overrides["num_labels"] = labels
        state = skeleton(folder, quantized=True, **overrides).state_dict()
        if all(name in state and state[name].shape == value.shape for name, value in wanted.items()):
            return overrides
    return {}
