"""A stored adapter onto a model, over the one of its name or as a new one; on any error nothing changes."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_files.backbone import METADATA_KEY, check_backbone
from ..adapter_files.folder import PREFIX, read_adapter, read_metadata, read_resume_file
from ..adapter_files.keys import factor
from ..adapter_files.tensors import adapter_state, load_adapter_state_, load_resume_state_
from ..adapter_files.words import table_paths
from ..config.lora import LoraConfig
from ..errors import TargetError, UnsupportedModuleError
from ..injection.adapted import Adapted
from ..injection.engine import Plan, make_plan
from ..injection.heads import head_of_task, without_new_head
from ..injection.megatron.opening import opened_parts
from ..injection.megatron.settings import settings_that_hold
from ..injection.targets import resolve, shortest_names, without_idle
from ..naming import Patterns, Tree, canonical


@dataclasses.dataclass(frozen=True)
class AdapterContents:
    """What a folder holds of one adapter: its configuration, its tensors by the keys of the file, and the fingerprint
    of the base that a start belongs to."""

    folder: Path
    config: LoraConfig
    state: Mapping[str, Tensor]
    backbone: str | None

    @classmethod
    def read(cls, folder: str | Path, *, allow_pickle: bool = False, check_finite: bool = True) -> AdapterContents:
        """See ``read_adapter``."""
        config, state = read_adapter(folder, allow_pickle=allow_pickle, check_finite=check_finite)
        return cls(Path(folder), config, state, read_metadata(folder).get(METADATA_KEY))


def config_for(model: nn.Module, stored: LoraConfig, state: Mapping[str, Tensor], *, trainable: bool) -> LoraConfig:
    """The configuration by which a stored adapter is injected into ``model``: with a start that costs nothing, since
    every value is about to be overwritten.

    What selects nothing in this model is dropped, as PEFT passes over it: other models' targets, layers, patterns and
    exclusions, every usual name of a classification head in ``modules_to_save``. Were there tensors of such a module in
    the file, the strict load would refuse them. Where the file names modules as an older release did, its own tensors
    say which ones are meant.
    """
    tree = Tree(model)
    config = dataclasses.replace(
        stored,
        modules_to_save=_saved_names(tree, stored, state) or None,
        init_lora_weights=True,
        loftq_config=None,
        inference_mode=not trainable,
        megatron_config=settings_that_hold(stored, model),
    )
    config = without_new_head(config)
    if config.ensure_weight_tying:
        config = _apart_if_stored_so(tree, config, state)
    renamed = _renamed(tree, state)
    if any(old != new for old, new in renamed.items()):
        return _under_new_names(config, tree, renamed)
    return without_idle(tree, config)


def _saved_names(tree: Tree, stored: LoraConfig, state: Mapping[str, Tensor]) -> list[str]:
    """The modules to save that the model knows; modules in the file that one of them means to PEFT alone, which
    compares plain ends (there "classifier" means "pre_classifier" too); and the head of the task where the file holds
    it, though a configuration that the caller gave instead of the stored one doesn't name it."""
    names = stored.modules_to_save or ()
    known = [name for name in names if name in tree.names]
    meant = set(tree.names.matching(known))
    ends = [path for path in tree.modules if path and path.endswith(tuple(names))]
    others = [path for path in dict.fromkeys([*ends, *head_of_task(tree, stored.task_type)]) if path not in meant]
    return [*known, *(path for path in others if _holds_whole(state, path))]


def _holds_whole(state: Mapping[str, Tensor], path: str) -> bool:
    """Whether the file has tensors of the module at ``path`` itself, beside those of a branch on it or in it."""
    own = (key for key in state if key.startswith(f"{PREFIX}{path}."))
    return any(factor(key) is None and "base_layer" not in key.split(".") for key in own)


def _apart_if_stored_so(tree: Tree, config: LoraConfig, state: Mapping[str, Tensor]) -> LoraConfig:
    """``config``, or where what tied modules should share differs in the file (PEFT loses the tie where it brings
    factors of a half to float32, and trains them apart), the same with an adapter of its own for each of them."""
    try:
        plan = make_plan(tree, without_idle(tree, config))
    except (TargetError, UnsupportedModuleError):
        return config  # which is said where it is used
    branches = {entry.path: entry.tied_to for entry in plan.entries if entry.tied_to}
    ties = {**branches, **dict(plan.ties)}
    paths = [*dict.fromkeys(ties.values()), *ties]
    if not ties:  # the model's weights aren't tied
        paths = _beside(tree, plan, state)
    elif all(_stored_alike(state, path, source) for path, source in ties.items()):
        return config
    if plan.modules_to_save:
        names = list(dict.fromkeys([*(config.modules_to_save or ()), *paths]))
        return dataclasses.replace(config, ensure_weight_tying=False, modules_to_save=names)
    targets: Any = config.target_modules
    if isinstance(targets, str):
        targets = "|".join([f"(?:{targets})", *map(re.escape, paths)])
    else:
        targets = [*(targets or ()), *paths]
    return dataclasses.replace(config, ensure_weight_tying=False, target_modules=targets)


def _beside(tree: Tree, plan: Plan, state: Mapping[str, Tensor]) -> list[str]:
    """The modules that the file holds an adapter of, or a copy, as one with those in ``plan``."""
    if plan.modules_to_save:
        copies = [state.get(f"{PREFIX}{path}.weight") for path in plan.modules_to_save]
        tables = {path: state.get(f"{PREFIX}{path}.weight") for path in table_paths(tree)}
        return [
            path
            for path, table in tables.items()
            if table is not None and any(copy is not None and torch.equal(copy, table) for copy in copies)
        ]
    held = {found.path for key in state if (found := factor(canonical(key).removeprefix(PREFIX)))}
    return sorted(held - {entry.path for entry in plan.entries})


def _stored_alike(state: Mapping[str, Tensor], path: str, source: str) -> bool:
    """Whether the file holds the same for the tied modules at ``path`` and ``source``, as far as it holds them."""
    pairs = [("weight", "weight", False)]
    pairs += [("lora_A.weight", "lora_embedding_B", True), ("lora_B.weight", "lora_embedding_A", True)]
    pairs += [(name, name, False) for name in ("lora_embedding_A", "lora_embedding_B")]
    for own, other, turned in pairs:
        one, two = state.get(f"{PREFIX}{path}.{own}"), state.get(f"{PREFIX}{source}.{other}")
        if one is not None and two is not None and not torch.equal(one, two.T if turned else two):
            return False
    return True


def config_for_keys(model: nn.Module, config: LoraConfig, state: Mapping[str, Tensor]) -> LoraConfig:
    """``config`` for exactly the modules that the keys of ``state`` name, an adapter's tensors, whatever it selects
    itself.

    Raises:
        TargetError: no key is an adapter's, or one names a module that ``model`` doesn't have.
    """
    tree = Tree(model)
    renamed = _renamed(tree, state)
    if not renamed:
        raise TargetError(
            f"state_dict: expected keys of an adapter for this model, such as 'layer.lora_A.weight', found "
            f"{sorted(state)[:3]}; pass the state dict that belongs to this model, or none"
        )
    return _under_new_names(config, tree, renamed)


def _renamed(tree: Tree, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The adapted modules, by what the file calls them, in the model's names; empty if one of them is unknown."""
    found: dict[str, str] = {}
    for key in state:
        branch = factor(canonical(key).removeprefix(PREFIX))
        if branch is not None and branch.path not in found:
            own = tree.path_of(branch.path)
            if own is None:
                return {}
            # A name that the model has means that place, where the same module may stand elsewhere without a branch.
            found[branch.path] = own if own == branch.path else tree.first(own)
    return found


def _under_new_names(config: LoraConfig, tree: Tree, renamed: Mapping[str, str]) -> LoraConfig:
    """``config`` for exactly the modules that the file holds, if its own names select others or none."""
    wanted = set(renamed.values())
    try:
        if {target.path for target in resolve(tree, config)} == wanted:
            return config
    except TargetError:
        pass
    spelled: dict[str, Any] = {
        field: _by_path(getattr(config, field), renamed) for field in ("rank_pattern", "alpha_pattern")
    }
    paths = [path for own in wanted for path in tree.paths_of(tree.modules[own])]
    return dataclasses.replace(
        config,
        target_modules=shortest_names(paths, tree),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        **spelled,
    )


def _by_path(patterns: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """``patterns`` for old names, spelled out for the new ones."""
    table = Patterns(patterns)
    values = {own: table.value(old, None) for old, own in renamed.items()}
    return {path: value for path, value in values.items() if value is not None}


def without_mismatched(state: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the ``current`` tensor in place of each of another shape; warns of them."""
    unfit = [key for key in state.keys() & current.keys() if state[key].shape != current[key].shape]
    if unfit:
        shapes = ", ".join(
            f"{key} ({tuple(state[key].shape)} for {tuple(current[key].shape)})" for key in sorted(unfit)
        )
        warnings.warn(f"left out, of another size than the model's: {shapes}", stacklevel=2)
    return {**state, **{key: current[key] for key in unfit}}


def fill_(adapted: Adapted, name: str, stored: AdapterContents, *, check_base: bool, any_size: bool = False) -> None:
    """Overwrite adapter ``name`` with what is stored; with ``any_size`` all but tensors of another shape.

    Raises:
        StorageError: it doesn't fit, or with ``check_base`` it was started on another base than the one at hand.
    """
    if check_base and stored.backbone:
        check_backbone(stored.backbone, adapted.bases_of(name), stored.folder)
    state = without_mismatched(stored.state, adapter_state(adapted, name)) if any_size else stored.state
    load_adapter_state_(adapted, name, state)


def load_(
    adapted: Adapted,
    name: str,
    stored: AdapterContents,
    *,
    trainable: bool,
    check_base: bool,
    any_size: bool,
    add: Callable[[str, LoraConfig], object],
    delete: Callable[[str], object],
) -> None:
    """Overwrite adapter ``name`` with what is stored, or have ``add`` make a new one (and on an error ``delete``)."""
    if name in adapted.configs:
        fill_(adapted, name, stored, check_base=check_base, any_size=any_size)
        return
    with opened_parts(adapted.root, stored.config):
        add(name, config_for(adapted.root, stored.config, stored.state, trainable=trainable))
    try:
        fill_(adapted, name, stored, check_base=check_base, any_size=any_size)
    except BaseException:
        delete(name)
        raise
    record_(adapted, name, stored.config, stored.backbone)


def resumed_(adapted: Adapted, name: str, folder: Path) -> bool:
    """Bring back all adapters in use from ``folder``, if it is a Trainer's checkpoint and ``name`` one of several."""
    state = read_resume_file(folder) if name in adapted.active and len(adapted.configs) > 1 else None
    if state is not None:
        load_resume_state_(adapted, state, others=False)
    return state is not None


def record_(adapted: Adapted, name: str, config: LoraConfig, backbone: str | None) -> None:
    """Note how a loaded adapter once started and for what, which the configuration that it was injected by doesn't
    say, and what that passed over."""
    adapted.configs[name] = dataclasses.replace(
        adapted.configs[name],
        init_lora_weights=config.init_lora_weights,
        loftq_config=config.loftq_config,
        task_type=config.task_type,
        megatron_config=config.megatron_config,
    )
    if backbone:
        adapted.backbones[name] = backbone
