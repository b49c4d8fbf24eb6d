"""``loftq distill``: the adapter that ``loftq init`` wrote learns from the original, into a folder beside it.

The original is loaded, read for its labels and let go before the quantized model is loaded, so memory holds the larger
of the two. The start stays where it is: what is learned is one more adapter of the same quantized model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qlora_kit.adapter_files.folder import WEIGHTS_NAME
from qlora_kit.checkpoints.model_folder import locate, skeleton
from qlora_kit.errors import QLoRAKitError, StorageError
from qlora_kit.model.lora_model import LoraModel

from ..distillation.soft_labels import soft_labels
from ..distillation.training import Distillation, distill
from ..starts.report import Report
from .checks import ADAPTER_FOLDER, loaded

#: The new adapter's folder.
DISTILLED_FOLDER = "loftq_distilled"


def distill_folder(
    out: Path,
    against: str | os.PathLike[str],
    text: Any = "builtin",
    *,
    rows: int = 128,
    tokens: int = 512,
    device: str = "cpu",
    **options: Any,
) -> Distillation:
    """Write ``out``'s adapter, after it has learned from the original, to ``out/loftq_distilled``.

    Args:
        out: what ``loftq init`` wrote.
        against: folder, or name on the Hub, of the model that it was made from.
        text, rows, tokens: see ``loftq.soft_labels``; a file, or "builtin".
        device: of both models.
        options: see ``loftq.distill``.

    Returns:
        What was gained; where that is nothing, no file is written.

    Raises:
        StorageError: a folder isn't what it should be, there is an adapter already, or a model can't be loaded.
        ConfigError: see ``loftq.distill``.
    """
    asked = Report.load(out).options  # which only a finished run has
    place = out / DISTILLED_FOLDER
    if (place / WEIGHTS_NAME).exists():
        raise StorageError(
            f"{place}: expected no adapter yet, found one; use it, or remove the folder to learn another"
        )
    looked_at = asked["calibration_rows"], asked["calibration_tokens"]
    original = _model(locate(against, "against"), device, quantized=False)
    labels = soft_labels(original, text, rows=rows, tokens=tokens, looked_at=looked_at)
    del original
    lora = LoraModel.from_pretrained(_model(out, device), out / ADAPTER_FOLDER, is_trainable=True)
    found = distill(lora, labels, **options)
    if found.kept:
        lora.save_pretrained(place)
    return found


def _model(folder: Path, device: str, *, quantized: bool = True) -> Any:
    try:
        kind = type(skeleton(folder, quantized=quantized))
        return loaded(kind, folder, **({} if device == "cpu" else {"device_map": {"": device}}))[0]
    except QLoRAKitError:
        raise
    except Exception as error:  # of any kind, from files of unknown origin
        said = str(error) or type(error).__name__
        raise StorageError(f"{folder}: expected a model that transformers loads on {device}, found {said}") from error
