"""Adapters and optimizer on disk, to go on from with any engine and any number of processes.

A checkpoint is a folder: adapters as ``save_pretrained`` writes them, so that it can be loaded for inference as it is,
and ``optimizer.safetensors`` beside them, with what the optimizer keeps of each trained parameter under the
parameter's name (``...lora_A.default.weight:exp_avg``). All tensors are whole. The base isn't in it.

The folder is written under another name and renamed when all of it is there, so that a process that dies leaves the
checkpoints from before whole, and none that looks finished and isn't. Every process calls both functions.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch.distributed as dist
from torch import Tensor, nn

from ..adapter_files.folder import read_adapter
from ..adapter_files.slots import adapter_slots
from ..adapter_files.tensors import load_adapter_state_
from ..checkpoints.files import sync_folder, write_atomically
from ..codecs.shards.tensors import is_writer, meet, to_pieces_
from ..errors import StorageError
from ..model import LoraModel
from .optimizer_state import bare, check_steps, read_state, write_state_

OPTIMIZER_NAME = "optimizer.safetensors"
_FORMAT = "1"


def save_checkpoint(folder: str | os.PathLike[str], lora: LoraModel, optimizer: Any) -> None:
    """Write the adapters of ``lora`` and the state of ``optimizer`` (torch's, accelerate's or DeepSpeed's) into a new
    ``folder``; on every rank, the first writes.

    Raises:
        StorageError: ``folder`` is there, or can't be written, or a rank didn't come; what was there is as it was.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    everyone = list(range(dist.get_world_size())) if dist.is_initialized() else [0]
    meet(everyone, f"save_checkpoint({str(folder)!r})")
    to_pieces_(lora)
    optimizer, trained = bare(optimizer), dict(_trained(lora))

    def begin() -> None:
        check_steps(optimizer, trained)
        if is_writer():
            _check_new(folder)
            if partial.exists():
                shutil.rmtree(partial)  # of a run that died

    def finish() -> None:
        if not is_writer():
            return
        metadata = {"format": "pt", "optimizer": _FORMAT, "groups": json.dumps(_settings(optimizer))}
        metadata["parameters"] = json.dumps(list(trained))
        write_atomically(partial / OPTIMIZER_NAME, safetensors.torch.save(state, metadata))
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)

    _agree(begin)
    _agree(lambda: lora.save_pretrained(partial, is_main_process=None if is_writer() else False))
    state: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        state |= {f"{name}:{key}": value.contiguous() for key, value in read_state(optimizer, parameter).items()}
    _agree(finish)


def load_checkpoint(folder: str | os.PathLike[str], lora: LoraModel, optimizer: Any) -> None:
    """Put what ``save_checkpoint`` wrote into ``lora``, sharded or not, and ``optimizer``; on every rank.

    Raises:
        StorageError: ``folder`` isn't a finished checkpoint, or is one of other adapters or parameters.
    """
    folder = Path(folder)
    path = folder / OPTIMIZER_NAME
    if not path.is_file():
        raise StorageError(f"{folder}: expected a checkpoint, with {OPTIMIZER_NAME}, found none; see save_checkpoint")
    optimizer = bare(optimizer)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        stored: dict[str, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118
            name, _, part = key.rpartition(":")
            stored.setdefault(name, {})[part] = file.get_tensor(key)
    to_pieces_(lora)
    trained = dict(_trained(lora))
    names = set(json.loads(metadata.get("parameters", "[]")))
    if names != trained.keys():
        odd = sorted(names ^ trained.keys())
        raise StorageError(
            f"{path}: expected a state of the {len(trained)} parameters that train, found {len(names)}, of which "
            f"{len(odd)} are on one side only ({odd[:3]}); choose the adapters that were trained (set_adapter) first"
        )
    settings = _stored_settings(path, metadata, optimizer)
    states = [(name, read_adapter(folder if name == "default" else folder / name)[1]) for name in lora.peft_config]
    for name, state in states:
        load_adapter_state_(lora, name, state)
    write_state_(optimizer, [(parameter, stored.get(name, {})) for name, parameter in trained.items()])
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update({key: value for key, value in values.items() if key in group})


def _trained(lora: LoraModel) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) for all that train, named as in a file of all adapters."""
    seen: set[int] = set()
    for adapter in lora.peft_config:
        for slot in adapter_slots(lora.adapted, adapter):
            if isinstance(slot.tensor, nn.Parameter) and slot.tensor.requires_grad and id(slot.tensor) not in seen:
                seen.add(id(slot.tensor))
                yield slot.full_key, slot.tensor


def _settings(optimizer: Any) -> list[dict[str, Any]]:
    """Learning rates and the like of each group, as far as they are plain data."""
    plain = (bool, int, float, str, list, tuple, type(None))
    groups = (group.items() for group in optimizer.param_groups)
    return [{k: v for k, v in items if k != "params" and isinstance(v, plain)} for items in groups]


def _stored_settings(path: Path, metadata: Mapping[str, str], optimizer: Any) -> list[dict[str, Any]]:
    found = json.loads(metadata.get("groups", "[]"))
    if metadata.get("optimizer") != _FORMAT or len(found) != len(optimizer.param_groups):
        raise StorageError(
            f"{path}: expected the state of an optimizer with {len(optimizer.param_groups)} groups, found "
            f"one with {len(found)}; make the optimizer as it was made then"
        )
    return [{k: tuple(v) if isinstance(v, list) else v for k, v in group.items()} for group in found]


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise StorageError(f"{folder}: expected a new folder, found one that is there; choose another")


def _agree(do: Callable[[], None]) -> None:
    """Call ``do`` on every rank; an error on one is one on all, so that none waits for it in what comes next."""
    error: Exception | None = None
    try:
        do()
    except Exception as caught:
        error = caught
    if dist.is_initialized() and dist.get_world_size() > 1:
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, None if error is None else str(error))
        failed = next((rank for rank, text in enumerate(said) if text is not None), None)
        if error is None and failed is not None:
            raise StorageError(f"rank {failed}: {said[failed]}")
    if error is not None:
        raise error


__all__ = ["OPTIMIZER_NAME", "load_checkpoint", "save_checkpoint"]
