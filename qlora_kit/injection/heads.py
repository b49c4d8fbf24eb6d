"""The modules at a model's ends: tables of words, and the new head that a task brings.

transformers keeps the pretrained part of a model under ``base_model_prefix`` and what a task needs beside it: one
linear layer, two, or a network with norms and activations. So a new head is every child of the root that isn't the
backbone and doesn't hold the output embeddings, whatever it is made of. It starts at random and has to be trained
whole; a branch beside a random weight would be of no use. Some classifiers have no module of such a name (CLIP's,
Whisper's); there the linear layers directly at the root are the head.

PEFT goes by names. For a task of classification or question answering it trains every module whose path *ends* in one
of a few (``pre_classifier`` too), stores it with the adapter, and looks for it in a file of such a task whatever that
says. An adapter made here for such a task trains the head by structure and what those names find, and lists both in
``modules_to_save``: PEFT then finds all that it looks for, and loads what it would not have trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config.lora import LoraConfig
from ..layers.sharded.megatron.types import is_known
from ..naming import Tree, base_of, unwrapped
from .adaptable import adaptable, is_linear
from .ties import end_tables

# What PEFT's classes train whole, by task type: modules whose paths end so.
_PEFT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
#: A task whose adapters bring no head.
HEADLESS = "FEATURE_EXTRACTION"
_TASKS_OF_CLASSES = ("Classification", "QuestionAnswering")


def output_table(tree: Tree) -> list[str]:
    """Paths of the output embeddings."""
    table = end_tables(tree.model)[1]
    if table is None and is_known(type(unwrapped(tree.model)), ("GPTModel",)):  # Megatron's
        table = unwrapped(tree.model)._modules.get("output_layer")
    return [] if table is None else list(tree.paths_of(base_of(table)))


def new_head(tree: Tree) -> list[str]:
    """Paths of what stands beside the model's backbone and isn't, and doesn't hold, the output embeddings."""
    root = tree.modules[""]
    prefix = getattr(root, "base_model_prefix", None)
    if not prefix:
        return []
    words = output_table(tree)
    named = ((name, child) for name, child in root._modules.items() if child is not None and name != prefix)
    children = {name: child for name, child in named if any(True for _ in base_of(child).parameters())}
    if root._modules.get(prefix) is None:  # no backbone to stand beside
        of_a_task = any(part in type(root).__name__ for part in _TASKS_OF_CLASSES)
        children = {name: child for name, child in children.items() if of_a_task and is_linear(child)}
    return [name for name in children if not any(f"{path}.".startswith(f"{name}.") for path in words)]


def saved_names(tree: Tree, config: LoraConfig) -> list[str]:
    """``config.modules_to_save``, and the names of the head that a new adapter of ``config.task_type`` trains whole."""
    return list(dict.fromkeys([*(config.modules_to_save or ()), *head_of_task(tree, config.task_type)]))


def head_of_task(tree: Tree, task_type: str | None) -> list[str]:
    """Names of the modules that a new adapter of ``task_type`` trains whole: none for tasks that have no new head.

    Norms alone are left frozen, as they are in PEFT, and what no name tells from a module of the backbone.
    """
    if task_type not in _PEFT_HEADS:
        return []
    beside = [path for path in new_head(tree) if _trainable(tree, path) and tree.names.of(path) == [path]]
    paths = list(dict.fromkeys([*beside, *_looked_for(tree, task_type)]))
    return [path for path in paths if not any(path.startswith(f"{above}.") for above in paths)]


def fitting_task(tree: Tree, task_type: str | None, saved: Sequence[str]) -> str | None:
    """``task_type``, if an adapter that stores the modules at ``saved`` has all that PEFT looks for in a file of it;
    else None, as which PEFT loads anything."""
    inside = tuple(f"{path}." for path in saved)
    missing = [path for path in _looked_for(tree, task_type) if not f"{path}.".startswith(inside or "\0")]
    return None if missing else task_type


def without_new_head(config: LoraConfig) -> LoraConfig:
    """``config`` for injecting an adapter that is there already, stored or computed: what it trains whole is listed,
    and its task, which is to be noted elsewhere, adds nothing."""
    return replace(config, task_type=HEADLESS)


def _looked_for(tree: Tree, task_type: str | None) -> list[str]:
    names = _PEFT_HEADS.get(task_type or "", ())
    paths = [path for path in tree.modules if path.endswith(names)] if names else []
    outermost = [path for path in paths if not any(path.startswith(f"{above}.") for above in paths)]
    return [path for path in outermost if any(True for _ in base_of(tree.modules[path]).parameters())]


def _trainable(tree: Tree, path: str) -> bool:
    inside = (module for name, module in tree.modules.items() if f"{name}.".startswith(f"{path}."))
    return any(adaptable(module) for module in inside)
