"""What ``loftq init`` wrote, held against what it noted then, and loaded as users load it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qlora_kit.checkpoints.checksums import check_tensors, checksum_of
from qlora_kit.checkpoints.model_folder import plainly, skeleton
from qlora_kit.checkpoints.shards import ShardReader
from qlora_kit.checkpoints.stored_names import StoredNames
from qlora_kit.config.lora import CONFIG_NAME
from qlora_kit.errors import StorageError
from qlora_kit.model.lora_model import LoraModel

from ..starts.report import Report

ADAPTER_FOLDER = "loftq_init"
# Where the parts' checksums are in a report.
MODEL, ADAPTER, CONFIGS = "model", "adapter", "configs"
_CONFIGS = ("config.json", f"{ADAPTER_FOLDER}/{CONFIG_NAME}")
# Names of places and versions, which may change while the model stays what it is.
_PLACES = ("base_model_name_or_path", "revision", "_name_or_path", "transformers_version")
AGAIN = "remove the folder and run loftq init again"


def config_checksum(text: str | bytes) -> str:
    """Of what a JSON configuration says, however it is laid out, places and versions apart."""
    said = {key: value for key, value in json.loads(text).items() if key not in _PLACES}
    return checksum_of(json.dumps(said, sort_keys=True).encode())


def check_written(out: Path, report: Report) -> int:
    """Read all that is in ``out`` and compare it with the report's checksums; how many tensors there are.

    A report of an earlier release holds none, and 0 is returned.

    Raises:
        StorageError: a tensor or a configuration isn't as it was written; names it.
    """
    if not report.checksums:
        return 0
    count = check_tensors(ShardReader(out), report.checksums[MODEL], fix=AGAIN)
    count += check_tensors(ShardReader(out / ADAPTER_FOLDER), report.checksums[ADAPTER], fix=AGAIN)
    for name in _CONFIGS:
        try:
            found = config_checksum((out / name).read_bytes())
        except (OSError, ValueError, AttributeError) as error:
            raise StorageError(f"{out / name}: expected a configuration, found none ({error}); {AGAIN}") from error
        if found != report.checksums[CONFIGS][name]:
            raise StorageError(f"{out / name}: expected what was written, found it changed since; {AGAIN}")
    return count


@torch.no_grad()
def check_loads(out: Path) -> str:
    """Load model and adapter as users do, and run the model's dummy text through it; what was found.

    It takes the time and the memory that loading the quantized model takes, and a forward of a few tokens.

    Raises:
        StorageError: it can't be loaded or run, weights that are stored don't get to their places, or its output isn't
            finite.
    """
    kind: Any = type(bare := skeleton(out, quantized=True))
    stored = StoredNames(bare, ShardReader(out), quantized=True).stored
    try:
        model, found = loaded(kind, out)
        lost = sorted({str(name) for name in found["missing_keys"]} & set(stored))
        if lost:
            raise StorageError(f"{len(lost)} stored weights that don't get to their places ({', '.join(lost[:3])})")
        lora = LoraModel.from_pretrained(model, out / ADAPTER_FOLDER).eval()
        if (batch := _text(model)) is None:
            return f"{out}: transformers loads it, and the adapter fits; not run, as it takes {model.main_input_name}"
        outputs = lora(**batch)
    except Exception as error:
        raise StorageError(
            f"{out}: expected a model that transformers loads and runs, found {str(error) or type(error).__name__}; "
            "run loftq init again with this release, or leave out the modules named here"
        ) from error
    first = next(value for value in outputs.values() if torch.is_tensor(value))
    if not first.isfinite().all():
        raise StorageError(f"{out}: expected a finite output of a few tokens, found NaN or infinity; {AGAIN}")
    return f"{out}: transformers loads it, the adapter fits, and a few tokens give a finite output"


def loaded(kind: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """``folder``'s model as transformers' class ``kind`` loads it in the dtype that it is stored in, without its bars,
    and what that says of missing tensors."""
    with _quiet():
        found: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            folder, dtype="auto", output_loading_info=True, **options, **plainly(folder)
        )
    return found


def _text(model: Any) -> Mapping[str, Any] | None:
    """The few tokens that transformers keeps for trying a model; None for one that reads no text."""
    if model.main_input_name != "input_ids":
        return None
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in model.dummy_inputs.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars, and its table of tensors that a model has no use for."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
