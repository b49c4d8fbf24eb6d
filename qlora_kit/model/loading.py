"""A stored adapter onto a model, over the one of its name or as a new one; on any error nothing changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapter_files.backbone import METADATA_KEY, check_backbone
from ..adapter_files.folder import PREFIX, read_adapter, read_metadata
from ..adapter_files.tensors import load_adapter_state_
from ..config.lora import LoraConfig
from ..errors import TargetError
from ..injection.adapted import Adapted
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
        modules_to_save=[name for name in stored.modules_to_save or () if name in tree.names] or None,
        init_lora_weights=True,
        loftq_config=None,
        inference_mode=not trainable,
    )
    renamed = _renamed(tree, state)
    if any(old != new for old, new in renamed.items()):
        return _under_new_names(config, tree, renamed)
    return without_idle(tree, config)


def _renamed(tree: Tree, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The adapted modules, by what the file calls them, in the model's names; empty if one of them is unknown."""
    found: dict[str, str] = {}
    for key in state:
        path, branch, _ = canonical(key).removeprefix(PREFIX).partition(".lora_")
        if branch and path not in found:
            own = tree.path_of(path)
            if own is None:
                return {}
            # A name that the model has means that place, where the same module may stand elsewhere without a branch.
            found[path] = own if own == path else tree.first(own)
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


def fill_(adapted: Adapted, name: str, stored: AdapterContents, *, check_base: bool) -> None:
    """Overwrite adapter ``name`` with what is stored.

    Raises:
        StorageError: it doesn't fit, or with ``check_base`` it was started on another base than the one at hand.
    """
    if check_base and stored.backbone:
        check_backbone(stored.backbone, adapted.bases_of(name), stored.folder)
    load_adapter_state_(adapted, name, stored.state)


def load_(
    adapted: Adapted,
    name: str,
    stored: AdapterContents,
    *,
    trainable: bool,
    check_base: bool,
    add: Callable[[str, LoraConfig], object],
    delete: Callable[[str], object],
) -> None:
    """Overwrite adapter ``name`` with what is stored, or have ``add`` make a new one (and on an error ``delete``)."""
    if name in adapted.configs:
        fill_(adapted, name, stored, check_base=check_base)
        return
    add(name, config_for(adapted.root, stored.config, stored.state, trainable=trainable))
    try:
        fill_(adapted, name, stored, check_base=check_base)
    except BaseException:
        delete(name)
        raise
    record_(adapted, name, stored.config, stored.backbone)


def record_(adapted: Adapted, name: str, config: LoraConfig, backbone: str | None) -> None:
    """Note how a loaded adapter once started, which the configuration that it was injected by doesn't say."""
    adapted.configs[name] = dataclasses.replace(
        adapted.configs[name], init_lora_weights=config.init_lora_weights, loftq_config=config.loftq_config
    )
    if backbone:
        adapted.backbones[name] = backbone
