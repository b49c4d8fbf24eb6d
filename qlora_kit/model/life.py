"""Adapters come and go: added, chosen, trained or frozen, deleted, taken out; each as a whole or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..adapter_files.backbone import fingerprint
from ..codecs.autocast import without_autocast
from ..codecs.shards.tensors import engine_of
from ..config.lora import LoraConfig
from ..errors import AdapterError
from ..initializers import planned, prepared
from ..injection.adapted import Adapted
from ..injection.biases import bias_parameters
from ..injection.engine import QUICK_STARTS, Plan, Request, Start, inject_, request_for
from ..injection.heads import saved_names
from ..injection.left_out import warn_of_left_out
from ..injection.megatron.opening import opened_parts
from ..injection.megatron.settings import follow_settings
from ..injection.targets import shortest_names
from ..injection.ties import warn_of_ties
from ..layers import RESERVED, AdapterLayer
from ..layers.rescaled import at_full_size_
from ..merging.aware import make_aware_
from ..merging.in_place import unmerge_
from ..naming import Tree, canonical
from ..training.preparation.trainers import leave_training_
from .base_files import guard_methods_, record_start_


def add_(adapted: Adapted, name: str, config: LoraConfig) -> Plan:
    """Inject another adapter, neither active nor trainable yet. See ``LoraModel.add_adapter``."""
    check_new(adapted, name, config)
    follow_settings(config, adapted.root)
    with ExitStack() as stack:
        # A start is arithmetic on weights throughout, and a text's forward for it is the model's own.
        for device in {parameter.device for parameter in adapted.root.parameters()}:
            stack.enter_context(without_autocast(device))
        stack.enter_context(opened_parts(adapted.root, config))
        return _add_(adapted, name, config)


def _add_(adapted: Adapted, name: str, config: LoraConfig) -> Plan:
    root, dtype = adapted.root, adapted.adapter_dtype
    at_full_size_(root)
    tree = Tree(root)
    twin = _made_by(adapted, config)
    config, plan = planned(tree, config)
    warn_of_left_out(f"target_modules={config.target_modules!r}", plan.left_out)
    recorded = _recorded(config, plan, tree)
    warn_of_ties(
        tree,
        [*(entry.path for entry in plan.entries), *plan.modules_to_save],
        ensured=config.ensure_weight_tying,
        ties=bool(plan.ties) or any(entry.tied_to for entry in plan.entries),
    )
    if twin is None:
        asked = (request_for(root, entry, config, dtype) for entry in plan.entries if not entry.tied_to)
        start = prepared(root, config.init_lora_weights, asked)
    else:
        start = _as_it_is(adapted.layers(tree), twin)
    del tree
    done = inject_(root, plan, config, name, start, dtype=dtype)
    try:
        make_aware_(adapted, name, config)
    except BaseException:
        done.undo()
        raise
    adapted.configs[name], adapted.plan = recorded, plan
    if twin in adapted.backbones:
        adapted.backbones[name] = adapted.backbones[twin]
    elif config.init_lora_weights == "loftq":  # taken at once, before shards or merges hide the codes
        adapted.backbones[name] = fingerprint(adapted.bases_of(name))
    adapted.kept_biases.keep(bias_parameters(root, config.bias, name))
    if len(adapted.configs) == 1:
        adapted.freeze_()
    adapted.apply_state_([name])
    record_start_(adapted, name)
    guard_methods_(adapted)
    return plan


def _made_by(adapted: Adapted, config: LoraConfig) -> str | None:
    """The adapter whose own configuration ``config`` is, if its start can't be had again: it looked at the weights from
    before, and may have put others there. Trainers ask so for a copy of an adapter, as the reference of its training.
    """
    if config.init_lora_weights in QUICK_STARTS:
        return None
    return next((name for name, own in adapted.configs.items() if own is config), None)


def _as_it_is(layers: Mapping[str, AdapterLayer], name: str) -> Callable[[Request], Start]:
    """A start that gives each layer the factors that adapter ``name`` has there now."""

    def start(request: Request) -> Start:
        A, B = layers[request.path].whole_factors(name)
        return Start(A.detach().clone(), B.detach().clone())

    return start


def check_new(adapted: Adapted, name: str, config: LoraConfig) -> None:
    """Raise an AdapterError if ``name`` can't be one or is taken, or two adapters would train the base's biases."""
    refuse_in_pieces(
        adapted.root,
        f"adapter {name!r}",
        "which wouldn't shard or reduce it; add every adapter before the model is sharded",
        "as from_pretrained does once there is a ZeRO-3 configuration: load before TrainingArguments(deepspeed=...)",
    )
    if not isinstance(name, str) or not name or "." in name or "/" in name or "\\" in name:
        raise AdapterError(
            f"adapter name {name!r}: expected a non-empty string without dots and slashes (it becomes part of "
            "parameter names and the name of a folder)"
        )
    if name in RESERVED or canonical(name) != name:
        raise AdapterError(
            f"adapter name {name!r}: expected one that torch doesn't give to what it puts on modules or wraps around "
            "them, found one of these; choose another name"
        )
    if name in adapted.configs:
        raise AdapterError(f"adapter {name!r} exists already; delete_adapter() it first or choose another name")
    if config.bias != "none" and (other := [n for n, c in adapted.configs.items() if c.bias != "none"]):
        raise AdapterError(
            f"adapter {name!r}: bias={config.bias!r} would train the base's biases, which {other[0]!r} trains "
            "already; set bias='none' for one of them"
        )


def refuse_in_pieces(root: nn.Module, what: str, instead: str, of_deepspeed: str = "") -> None:
    """Raise an AdapterError if an engine keeps the parameters under ``root`` in pieces, and goes on doing so with those
    that it had at first."""
    if (engine := engine_of(root)) is not None:
        found = f"found one that {engine} has sharded, {instead}"
        more = f" ({of_deepspeed})" if of_deepspeed and "ZeRO" in engine else ""
        raise AdapterError(f"{what}: expected a model with whole weights, {found}{more}")


def _recorded(config: LoraConfig, plan: Plan, tree: Tree) -> LoraConfig:
    """``config`` as it is stored: targets spelled out where the user left them to us, and the head of the task."""
    changes: dict[str, Any] = {"modules_to_save": saved_names(tree, config) or None}
    if config.target_modules is None or config.target_modules == "all-linear":
        paths = [path for entry in plan.entries for path in (entry.path, *entry.aliases)]
        changes["target_modules"] = shortest_names(paths, tree)
    if config.base_model_name_or_path is None:
        source = getattr(getattr(tree.model, "config", None), "_name_or_path", None)
        changes["base_model_name_or_path"] = source or None
    return dataclasses.replace(config, **changes)


def train_(adapted: Adapted, names: Sequence[str], requires_grad: bool) -> None:
    """Train or freeze adapters without changing which ones are active."""
    for name in names:
        adapted.check_known(name)
    others = [name for name in adapted.trainable if name not in names]
    adapted.trainable = [*others, *names] if requires_grad else others
    adapted.apply_state_(names)


def delete_(adapted: Adapted, name: str) -> None:
    """Forget an adapter. Where it was the only active one, the first of the others becomes active."""
    adapted.check_known(name)
    refuse_in_pieces(
        adapted.root,
        f"delete_adapter({name!r})",
        "which would go on gathering it; leave it out with set_adapter, or name those to keep in "
        "save_pretrained(selected_adapters=...) and load the model again",
    )
    with adapted.mapped():
        _forget_(adapted, name)
        adapted.drop_(empty=True)
    adapted.apply_state_([])
    adapted.buffers.forget_(name)


def _forget_(adapted: Adapted, name: str) -> None:
    """Take adapter ``name`` out of every layer and record, if nothing of it is merged."""
    merges = {path: layer.merged_adapters for path, layer in adapted.layers().items()}
    merged = [path for path, names in {**merges, **adapted.set_aside}.items() if name in names]
    if merged:
        raise AdapterError(f"adapter {name!r} is merged (into {merged[0]}, ...); unmerge_adapter() first")
    if adapted.configs[name].bias != "none":
        adapted.train_biases_(name, False)
        adapted.kept_biases.swap_(adapted.root)
        adapted.kept_biases.values.clear()
    for module in adapted.parts():
        module.delete_adapter(name)
    del adapted.configs[name]
    adapted.backbones.pop(name, None)
    adapted.trainable = [other for other in adapted.trainable if other != name]
    adapted.active = [other for other in adapted.active if other != name] or list(adapted.configs)[:1]


def take_out_(adapted: Adapted) -> nn.Module:
    """The base model as it was before the first adapter, and before it was prepared: its own module objects, biases,
    dtypes and flags."""
    refuse_in_pieces(
        adapted.root,
        "unload()",
        "which gathers them for the model with adapters alone; compute as the base does in `with "
        "lora.disable_adapter()`, or load the base again",
    )
    unmerge_(adapted)
    adapted.buffers.show_(adapted.root, [])
    if not adapted.disabled:
        adapted.kept_biases.swap_(adapted.root)
    adapted.drop_(empty=False)
    adapted.trained_before |= leave_training_(adapted)
    adapted.forget_()
    return adapted.root
