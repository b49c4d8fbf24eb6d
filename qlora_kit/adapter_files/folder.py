"""One stored adapter: ``adapter_config.json`` and ``adapter_model.safetensors`` in a folder, as PEFT has it.

Two files can't be replaced in one step, and new weights under an old config would load and compute nonsense (a
changed alpha or rslora fits every shape). So both new files are finished under temporary names first; then, if
the config's bytes differ, the old config is removed, the weights are renamed, and the config comes last. A
writer killed between these steps leaves either a matching pair or a folder without a config, which no reader
takes for an adapter. A fingerprint of the weights inside the config would do as well, but is a field that PEFT
warns about.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoints.files import not_whole, publish, stage, sync_folder, withdraw, write_atomically
from ..codecs.finite import all_finite
from ..config.lora import CONFIG_NAME, LoraConfig
from ..errors import StorageError
from .card import About, write_card
from .keys import factor

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
RESUME_NAME = "model.safetensors"  # where transformers' Trainer looks when it resumes
TRAINER_STATE = "trainer_state.json"  # tells its checkpoints
PREFIX = "base_model.model."  # what every key of an adapter file starts with


def write_adapter(
    folder: Path,
    config: LoraConfig,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    about: About | None = None,
) -> None:
    """Write one adapter and its README into ``folder``, which is made if it isn't there.

    Args:
        config: written as it is, see ``LoraConfig.as_stored``.
        state: contiguous CPU tensors under the keys of the file, no two sharing memory.
        metadata: further entries of the weight file's header, which other readers pass over.
        about: what the README says of it beside its configuration.

    Raises:
        StorageError: ``folder`` is a file.
        OSError: the disk is full, or the like. What ``folder`` held before is then whole, or has no config.
    """
    check_is_folder(folder)
    weights, settings = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    text, data = config.to_json(), safetensors.torch.save(dict(state), {"format": "pt", **(metadata or {})})
    contents = {settings: text, weights: data}
    staged: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            staged[path] = stage(path, content)
        if settings.exists() and settings.read_bytes() != text:
            settings.unlink()
            sync_folder(folder)
        for path in reversed(contents):  # the config last
            publish(staged[path], path)
    finally:
        for temporary in staged.values():
            withdraw(temporary)
    write_card(folder, config, about)


def write_resume_file(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write what transformers' Trainer resumes from beside the adapters of its checkpoint."""
    check_is_folder(folder)
    write_atomically(folder / RESUME_NAME, safetensors.torch.save(dict(state), {"format": "pt"}))


def read_resume_file(folder: Path) -> dict[str, Tensor] | None:
    """What ``write_resume_file`` wrote; None if ``folder`` isn't a Trainer's checkpoint of adapters."""
    if not (folder / TRAINER_STATE).is_file() or not (folder / RESUME_NAME).is_file():
        return None
    state = safetensors.torch.load_file(folder / RESUME_NAME)
    return state if state and all(key.startswith(PREFIX) for key in state) else None


def check_is_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder}: expected a folder to save to, found a file; choose another path")


def read_adapter(
    directory: str | Path, *, allow_pickle: bool = False, check_finite: bool = True
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter in a local folder: its config, and its tensors (on the CPU) under the keys of the file.

    Args:
        directory: the folder that holds ``adapter_config.json``.
        allow_pickle: read ``adapter_model.bin`` where there are no safetensors; with ``weights_only=True``, so
            that nothing in it is executed.
        check_finite: refuse tensors that hold NaN or infinity.

    Raises:
        StorageError: a file is missing, damaged, foreign, or a link that leaves the folder; or factors that are no
            floating-point numbers, or tensors with NaN or infinity.
        ConfigError: the config can't be understood.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise StorageError(
            f"{folder}: expected a local folder with {CONFIG_NAME}, found none; for a model of a hub, pass what "
            "huggingface_hub.snapshot_download returns"
        )
    weights = next((folder / n for n in (WEIGHTS_NAME, PICKLE_NAME) if (folder / n).exists()), None)
    if not (folder / CONFIG_NAME).exists():
        raise StorageError(f"{folder}: expected {CONFIG_NAME}, found none; {_how_to_go_on(folder, weights)}")
    _check_inside(folder, folder / CONFIG_NAME)
    config = LoraConfig.from_pretrained(folder)
    if weights is None:
        raise StorageError(f"{folder}: expected {WEIGHTS_NAME}, found none; save the adapter again")
    _check_inside(folder, weights)
    if weights.name == PICKLE_NAME and not allow_pickle:
        raise StorageError(
            f"{weights}: expected {WEIGHTS_NAME}, found a pickle, which can run code; save it again as "
            "safetensors, or pass allow_pickle=True if you trust its source"
        )
    state = _read_pickle(weights) if weights.name == PICKLE_NAME else _read_safetensors(weights)
    if not any(key.startswith(PREFIX) for key in state):
        raise StorageError(
            f"{weights}: expected an adapter, with keys that start with {PREFIX!r}, found "
            f"{sorted(state)[:3] or 'no tensors'}; pass the folder of an adapter that PEFT or this toolkit saved"
        )
    _check_values(weights, state, check_finite=check_finite)
    return config, state


def _check_values(weights: Path, state: Mapping[str, Tensor], *, check_finite: bool) -> None:
    odd = [f"{key} ({t.dtype})" for key, t in state.items() if factor(key) and not t.is_floating_point()]
    if odd:
        raise StorageError(
            f"{weights}: expected factors of floating-point numbers, found {len(odd)} others: {', '.join(odd[:4])}; "
            "save the adapter again"
        )
    bad = [key for key, tensor in state.items() if not all_finite(tensor)] if check_finite else []
    if bad:
        raise StorageError(
            f"{weights}: expected finite values, found NaN or infinity in {len(bad)} of {len(state)} tensors "
            f"({', '.join(bad[:4])}{', ...' if len(bad) > 4 else ''}); train it again, or pass check_finite=False to "
            "load it all the same"
        )


def read_metadata(directory: str | Path) -> dict[str, str]:
    """The metadata in the header of a stored adapter's weights; empty where they are a pickle."""
    path = Path(directory) / WEIGHTS_NAME
    if not path.exists():
        return {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise not_whole(path, error, "save it again") from error


def read_shapes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a stored adapter's tensors, from the header; empty where they are a pickle.

    Raises:
        StorageError: the file is damaged.
    """
    path = Path(directory) / WEIGHTS_NAME
    if not path.exists():
        return {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise not_whole(path, error, "save it again") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise not_whole(path, error, "copy or save the adapter again") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle of unknown origin can have any
        raise StorageError(
            f"{path}: expected a pickle of tensors only, found another or a truncated one "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); get the adapter as safetensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise StorageError(f"{path}: expected a dict of tensors, found a {type(state).__name__} of other things")
    return state


def _check_inside(folder: Path, path: Path) -> None:
    """Refuse a link out of ``folder``; a hub's cache, where links lead to its own blobs, is all one folder."""
    root, target = folder.resolve(), path.resolve()
    allowed = [root, *(above.parent / "blobs" for above in root.parents if above.name == "snapshots")]
    if not any(target.is_relative_to(place) for place in allowed):
        raise StorageError(f"{path}: expected a file of this folder, found a link to {target}; copy the file here")


def _how_to_go_on(folder: Path, weights: Path | None) -> str:
    inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG_NAME}"))
    if inside:
        return f"adapters are in its subfolders {inside}: pass one of them"
    if weights is not None:
        return f"{weights.name} is here without it, as after a save that was killed: save the adapter again"
    return "pass the folder that an adapter was saved to"
