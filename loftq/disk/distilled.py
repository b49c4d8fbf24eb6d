"""``loftq distill``: the adapter that ``loftq init`` wrote learns from the original, into a folder beside it.

The original is loaded, read for its labels and let go before the quantized model is loaded, so memory holds the larger
of the two. The start stays where it is: what is learned is one more adapter of the same quantized model.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_kit.adapter_files.beside import about, stored_config
from qlora_kit.adapter_files.card import about_start, write_card
from qlora_kit.checkpoints.model_folder import locate, skeleton
from qlora_kit.config.checks import check_device
from qlora_kit.config.lora import CONFIG_NAME, LoftQConfig, LoraConfig
from qlora_kit.errors import ConfigError, QLoRAKitError, StorageError
from qlora_kit.model.lora_model import LoraModel

from ..distillation.soft_labels import SoftLabels, soft_labels
from ..distillation.training import Distillation, distill
from ..starts.report import Report
from .checks import ADAPTER_FOLDER, AGAIN, loaded

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
        ConfigError: no such device, a text of fewer than two rows, or see ``loftq.distill``.
    """
    report = Report.load(out)  # which only a finished run has
    start = LoftQConfig(method=report.options.get("method", "loftq"))
    check_device("device", device)
    place = out / DISTILLED_FOLDER
    found = "a file" if place.is_file() else "one" if (place / CONFIG_NAME).exists() else None  # which is written last
    if found:
        raise StorageError(f"{place}: expected no adapter yet, found {found}; use it, or remove it to learn another")
    labels = _labels_of(locate(against, "against"), report, text, rows, tokens, device)
    lora = LoraModel.from_pretrained(_model(out, device), out / ADAPTER_FOLDER, is_trainable=True)
    distillation = distill(lora, labels, **options)
    if distillation.kept:
        lora.save_pretrained(place)
        said = {**about_start(_as_asked(lora, start), report.layers), "learned end to end": distillation.gain}
        name = lora.active_adapters[0]
        write_card(place, stored_config(lora.adapted, name), replace(about(lora.adapted, name), rows=said))
    return distillation


def _as_asked(lora: LoraModel, start: LoftQConfig) -> LoraConfig:
    """The adapter's configuration with its start, which the folder that it was loaded from doesn't say."""
    return replace(lora.peft_config[lora.active_adapters[0]], init_lora_weights="loftq", loftq_config=start)


def _labels_of(original: Path, report: Report, text: Any, rows: int, tokens: int, device: str) -> SoftLabels:
    model = _model(original, device, quantized=False)
    looked_at = report.options.get("calibration_rows", rows), report.options.get("calibration_tokens", tokens)
    labels = soft_labels(model, text, rows=rows, tokens=tokens, looked_at=looked_at)
    if len(labels.rows) < 2:
        raise ConfigError(
            f"text: expected two rows or more of {tokens} tokens, one to hold out, found {len(labels.rows)}; pass a "
            "longer one, or ask for more rows, of fewer tokens"
        )
    return labels


def _model(folder: Path, device: str, *, quantized: bool = True) -> Any:
    try:
        kind = type(skeleton(folder, quantized=quantized))
        return loaded(kind, folder, **({} if device == "cpu" else {"device_map": {"": device}}))[0]
    except QLoRAKitError:
        raise
    except Exception as error:  # of any kind, from files of unknown origin
        said = (str(error) or type(error).__name__).rstrip(".")
        raise StorageError(
            f"{folder}: expected a model that transformers loads on {device}, found {said}; "
            f"{AGAIN if quantized else 'pass one that AutoModelForCausalLM or the like loads'}"
        ) from error
