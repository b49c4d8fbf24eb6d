"""Adapters between a model and their files, in PEFT's layout: strict in both directions, all or nothing.

The keys of a file are the model's own parameter names with the adapter's name taken out, behind one prefix:

    base_model.model.<path>.lora_A.weight, .lora_B.weight      linear and convolution layers
    base_model.model.<path>.lora_embedding_A, _B               embeddings
    base_model.model.<path>.<parameter or buffer>              modules_to_save
    base_model.model.<path>.base_layer.bias                    trained biases of adapted layers
    base_model.model.<path>.bias                               trained biases of other layers (bias="all")
    base_model.model.<path>.<buffer>                           running statistics and the like that training moved

Every one of these must be in a file, with the right shape (a buffer that isn't there is the base's), and nothing else
may be, but for what PEFT adds: the
tables of words that were resized or adapted (``words``; they are loaded into the base, as PEFT does), and with
bias="all" whatever else has "bias" in its name. Names of older releases are understood. Checks come before the
first write, so a file that doesn't fit leaves the model as it was.

A Trainer's checkpoint needs all adapters in one file, so there the keys keep the adapters' names:

    base_model.model.<path>.lora_A.<adapter>.weight, ....modules_to_save.<adapter>.<parameter>, ...
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codecs.shards.tensors import fill_, meet, own_part, ranks_of, to_pieces_, whole_shape
from ..errors import AdapterError, StorageError, closest
from ..injection.adapted import Adapted, adapted_of
from ..injection.stacks import why_no_branch
from ..injection.ties import words_of
from ..naming import Tree, canonical
from .backbone import METADATA_KEY
from .beside import about, say_what_others_misread, stored_config, warn_of_what_stays_behind
from .folder import PREFIX, read_adapter, write_adapter, write_resume_file
from .gathering import check_gatherable, checked, gathered
from .parts import own_parts, whole_parts
from .slots import Slot, adapter_slots, buffer_slot, extra_tensors, table_slots
from .words import stored_words, table_paths, tables_to_store

__all__ = ["adapter_state", "load_adapter_state_", "load_resume_state_", "read_adapter", "save_adapter"]


def adapter_state(
    model: Any,
    adapter_name: str = "default",
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter under the keys of its file: whole, contiguous copies on the CPU, dtypes kept.

    Where an engine keeps them in pieces they are gathered, so every process has to call this.

    Args:
        model: a ``LoraModel``, or the ``Adapted`` that it holds.
        state_dict: the wrapper's full state dict as a Trainer gathered it from shards; the tensors are taken
            from there, not from the model's own parameters.
        save_embedding_layers: whether the base's tables of words go along; "auto" where they were resized or have
            branches, see ``adapter_files.words``.

    Raises:
        AdapterError: no adapter has this name.
        StorageError: ``state_dict`` lacks tensors of the adapter, or holds shards of them; the model itself holds
            shards, and can't gather them, or not every process came to it.
    """
    adapted = adapted_of(model)
    slots = _file_slots(adapted, adapter_name, save_embedding_layers)
    if state_dict is None:
        check_gatherable(adapter_name, slots)
        own = {slot.key: slot.tensor for slot in slots}
        return whole_parts(adapted, adapter_name, gathered(adapter_name, own))
    given = {canonical(name): tensor for name, tensor in state_dict.items()}
    return gathered(adapter_name, checked(adapter_name, slots, {s.key: _given(given, s) for s in slots}))


def _file_slots(adapted: Adapted, adapter_name: str, save: bool | str) -> list[Slot]:
    """All that the file of an adapter holds, tables included."""
    tree = Tree(adapted.root)
    slots = {slot.key: slot for slot in adapter_slots(adapted, adapter_name, tree)}
    for slot in table_slots(adapted, adapter_name, tables_to_store(adapted, adapter_name, save, tree), tree):
        slots.setdefault(slot.key, slot)
    return list(slots.values())


def load_adapter_state_(model: Any, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    """Overwrite one adapter with the tensors of a file; the parameters keep their device and dtype.

    Raises:
        AdapterError: no adapter has this name, or one is merged into the base.
        StorageError: keys are missing or unexpected, or shapes differ. It lists all of them; nothing is changed.
    """
    adapted = adapted_of(model)
    to_pieces_(adapted.root if model is adapted else model)
    _write_(_matched(adapted, adapter_name, state))


def load_resume_state_(model: Any, state: Mapping[str, Tensor], *, others: bool = True) -> None:
    """Overwrite the adapters that a Trainer's checkpoint holds; every one that is active or trains must be in it, and
    with ``others`` those that aren't come back too.

    A state with the keys of an adapter's own file goes into the one active adapter.

    Raises: as ``load_adapter_state_``; on any error nothing is changed.
    """
    adapted = adapted_of(model)
    tree = Tree(adapted.root)
    in_use = dict.fromkeys([*adapted.active, *adapted.trainable])
    # Tables are the base's, and are called the same for all adapters: one that is in use takes them in.
    places = {
        slot.full_key: (name, slot.key)
        for name in sorted(adapted.configs, key=lambda name: name in in_use)
        for slot in (
            *table_slots(adapted, name, table_paths(tree), tree),
            *adapter_slots(adapted, name, tree),
            *(buffer_slot(buffer, value, name) for buffer, value in adapted.buffers.base.items()),
        )
    }
    state = {canonical(key): tensor for key, tensor in state.items()}
    if any(key not in places for key in state):
        if len(in_use) != 1:
            raise AdapterError(
                f"expected one adapter in use for a state of one adapter, found {list(in_use)}; set_adapter(name) "
                "first, and have the adapters of the checkpoint on the model"
            )
        load_adapter_state_(adapted, next(iter(in_use)), state)
        return
    states: dict[str, dict[str, Tensor]] = {name: {} for name in in_use}
    for key, tensor in state.items():
        name, own_key = places[key]
        if others or name in states:
            states.setdefault(name, {})[own_key] = tensor
    _write_([pair for name, part in states.items() for pair in _matched(adapted, name, part)])


def _matched(adapted: Adapted, adapter_name: str, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a tensor of the model and its new value, after every check."""
    tree = Tree(adapted.root)
    own = adapter_slots(adapted, adapter_name, tree)
    slots, moved = {s.key: s.tensor for s in own if not s.moved_by}, {s.key for s in own if s.moved_by}
    buffers = {PREFIX + name: name for name in adapted.buffers.base}
    if merged := [path for path, layer in adapted.layers(tree).items() if layer.merged_adapters]:
        raise AdapterError(
            f"adapters are merged (into {merged[0]}, ...), so none can be loaded; unmerge_adapter() first"
        )
    extras = extra_tensors(adapted, adapted.configs[adapter_name].bias, tree)
    keys = _Keys(adapted, [*extras, *slots, *buffers], tree)
    state = own_parts(adapted, adapter_name, {canonical(key): tensor for key, tensor in state.items()})
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    unexpected: list[str] = []
    # A key's own name goes before the older names of the same tensor, whatever the order of the file.
    for key in sorted(state, key=lambda key: key not in slots and key not in buffers):
        target = keys.slot_of(key)
        if target in slots:
            pairs.setdefault(target, (slots[target], state[key]))
        elif target in buffers:
            place = adapted.buffers.place(adapted.root, adapter_name, buffers[target])
            pairs.setdefault(target, (place, state[key]))
        elif target is not None:
            pairs.setdefault(target, (extras[target], state[key]))
        else:
            unexpected.append(key)
    for key in moved - pairs.keys():  # the file's adapter left it as it was
        name = buffers[key]
        pairs[key] = adapted.buffers.place(adapted.root, adapter_name, name), adapted.buffers.base[name]
    missing = [key for key in slots if key not in pairs]
    unfit = [
        f"{key}: expected {tuple(whole_shape(old))} {old.dtype}, found {tuple(new.shape)} {new.dtype}"
        for key, (old, new) in pairs.items()
        if whole_shape(old) != new.shape or old.is_floating_point() != new.is_floating_point() or new.is_complex()
    ]
    if missing or unexpected or unfit:
        words = stored_words(tree, {key: value.shape for key, value in state.items()})
        if words is not None and words != words_of(tree.model):
            why = f"Call resize_token_embeddings({words}) on the model first."
        else:
            why = why_no_branch(tree, [key.removeprefix(PREFIX) for key in unexpected])
        raise StorageError(_misfit(adapter_name, missing, unexpected, unfit, why))
    _check_shared(adapter_name, pairs)
    if meta := next((key for key, (old, _) in pairs.items() if old.is_meta), None):
        raise StorageError(
            f"{meta}: expected a parameter with memory, found one on the meta device; load the model first"
        )
    return list(pairs.values())


def _by_name(state: Mapping[str, Tensor], name: str, otherwise: Tensor | None = None) -> Tensor | None:
    """The tensor ``name`` of a ``LoraModel``'s state; wrappers with PEFT's names begin theirs as a file's keys do."""
    return state.get(name, state.get(PREFIX + name.removeprefix("model."), otherwise))


def _given(state: Mapping[str, Tensor], slot: Slot) -> Tensor | None:
    """The tensor of ``slot`` in a wrapper's state dict; where its parameter is another layer's, transposed back."""
    if slot.moved_by:  # every process has buffers whole, and those of an adapter that isn't active are in no state
        return slot.tensor
    found = _by_name(state, slot.name, state.get(slot.key))
    if found is None and (turned := _by_name(state, f"{slot.name.removesuffix('weight')}transposed")) is not None:
        return turned.T
    # What trains may be all that was gathered; the base's own tensors are whole then.
    return slot.tensor if found is None and slot.of_base and slot.tensor.numel() else found


def _check_shared(adapter_name: str, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Refuse two values for one tensor of the model: that of tied weights, say, or of factors that are shared."""
    first: dict[int, str] = {}
    for key, (old, new) in pairs.items():
        part = own_part(old)
        if part.is_meta or not part.numel():
            continue
        other = first.setdefault(part.untyped_storage().data_ptr(), key)
        same = pairs[other][1]
        if other == key or pairs[other][0].numel() != old.numel():
            continue
        if not torch.equal(new, same if same.shape == new.shape else same.T):
            raise StorageError(
                f"adapter {adapter_name!r}: expected equal values for {other} and {key}, which are one tensor in this "
                "model, found different ones; untie the model's weights first (give the second module a copy of its "
                "own and set config.tie_word_embeddings = False), or load the adapter under another name"
            )


@torch.no_grad()
def _write_(pairs: list[tuple[Tensor, Tensor]]) -> None:
    # Transfers and casts may fail for want of memory, so all of them come before the first write.
    ready = [(old, new.to(device=old.device, dtype=old.dtype)) for old, new in pairs]
    meet(ranks_of(old for old, _ in ready), "loading into a sharded model")
    for old, new in ready:
        fill_(old, new)


def save_adapter(
    model: Any,
    directory: str | Path,
    adapter_names: list[str] | None = None,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    resume_copy: bool = False,
    save_embedding_layers: bool | str = "auto",
    writes: bool = True,
) -> None:
    """Write adapters in PEFT's layout: "default" into ``directory``, others into subfolders of their names.

    Args:
        adapter_names: which ones; all by default.
        state_dict, save_embedding_layers: see ``adapter_state``.
        resume_copy: write these adapters' tensors, all of them, as ``model.safetensors`` into ``directory`` too,
            where transformers' Trainer looks for what to resume from (``load_resume_state_``).
        writes: whether this process writes; one that doesn't helps others to gather what they write.

    Raises:
        AdapterError: no adapter has this name.
        StorageError: ``directory`` is a file, a subfolder leads elsewhere, or ``state_dict`` isn't whole.
    """
    adapted = adapted_of(model)
    directory = Path(directory)
    names = list(adapted.configs if adapter_names is None else adapter_names)
    # All states are taken before the first write: an error here leaves every file as it was.
    save = save_embedding_layers
    states = {name: adapter_state(adapted, name, state_dict, save_embedding_layers=save) for name in names}
    if not writes:
        return
    folders = {name: _folder(directory, name) for name in names}
    if resume_copy:
        slots = [(name, slot) for name in names for slot in _file_slots(adapted, name, save)]
        write_resume_file(directory, {slot.full_key: states[name][slot.key] for name, slot in slots})
    say_what_others_misread(adapted)
    warn_of_what_stays_behind(adapted, (slot for name in adapted.configs for slot in _file_slots(adapted, name, save)))
    for name in names:
        backbone = adapted.backbones.get(name)
        metadata = {METADATA_KEY: backbone} if backbone else None
        write_adapter(folders[name], stored_config(adapted, name), states[name], metadata, about=about(adapted, name))


class _Keys:
    """Which slot a key of a file means: its own name, or that of a shared module's other path, of an older release of
    PEFT or of the model's library, or of a model that was wrapped."""

    def __init__(self, adapted: Adapted, slots: Iterable[str], tree: Tree) -> None:
        self.slots, self.tree = dict.fromkeys(slots), tree
        self.copies = adapted.saved_modules(tree)
        self.names = (*adapted.configs, "default")

    def slot_of(self, key: str) -> str | None:
        """The slot that ``key`` means; None if it is no slot's."""
        if key in self.slots:
            return key
        parts = key.removeprefix(PREFIX).split(".")
        for end in range(len(parts) - 1, 0, -1):  # the longest beginning that is a module's path
            path = self.tree.path_of(".".join(parts[:end]))
            if path is not None:
                found = self._within(self.tree.first(path), parts[end:])
                if found is not None:
                    return found
        return None

    def _within(self, path: str, rest: list[str]) -> str | None:
        """The slot of the module at ``path`` that ``rest``, the end of a key, means."""
        tried = [rest]
        if path in self.copies and rest[0] == "modules_to_save":
            tried += [rest[1:]] + [rest[2:] for name in self.names if rest[1:2] == [name]]
        for end in tried:
            for form in (end, ["base_layer", *end]):
                if (key := f"{PREFIX}{path}.{'.'.join(form)}") in self.slots:
                    return key
        return None


def _folder(directory: Path, adapter_name: str) -> Path:
    """Where an adapter is stored below ``directory``, and never outside it."""
    if adapter_name == "default":
        return directory
    folder = directory / adapter_name
    if folder.resolve().parent != directory.resolve() or Path(adapter_name).name != adapter_name:
        raise StorageError(
            f"adapter {adapter_name!r}: expected a name whose subfolder lies in {directory}, found {folder.resolve()}; "
            "rename the adapter, or remove the link"
        )
    return folder


_CHECK = "Check that this is its base model, and that adapter_config.json (targets, ranks, modules) is its own."


def _misfit(adapter_name: str, missing: list[str], unexpected: list[str], unfit: list[str], why: str) -> str:
    """One message with all that is wrong, each key beside those of the other side that look most like it."""

    def listed(title: str, keys: list[str], others: list[str]) -> list[str]:
        lines = []
        for key in keys[:10]:
            near = closest(key, others, count=1) if len(others) <= 500 else []
            lines.append(f"  {title}: {key}" + (f" (closest on the other side: {near[0]})" if near else ""))
        return lines + ([f"  {title}: {len(keys) - 10} more"] if len(keys) > 10 else [])

    return "\n".join(
        [
            f"adapter {adapter_name!r}: expected a file that fits the model, found {len(missing)} missing, "
            f"{len(unexpected)} unexpected and {len(unfit)} mis-shaped keys; nothing was loaded. " + (why or _CHECK),
            *listed("missing", missing, unexpected),
            *listed("unexpected", unexpected, missing),
            *listed("mis-shaped", unfit, []),
        ]
    )
