"""A model on disk, and LoftQ on it by the two ways that must agree: streamed, and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from loftq.disk.stream import stream
from loftq.disk.task import Task
from loftq.disk.writers import ADAPTER_FOLDER
from loftq.starts.report import Report
from qlora_kit import LoftQConfig, LoraConfig, apply_lora
from qlora_kit.hf_quantizer import record_quantization_


def config(
    bits: int = 2, targets: Any = "all-linear", *, alpha: int = 4, rslora: bool = False, **loftq: Any
) -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=targets,
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=bits, **{"loftq_iter": 3, "method": "loftq", **loftq}),
    )


def streamed(source: Path, out: Path, lora: LoraConfig, **options: Any) -> Report:
    return stream(Task(source, out, lora, **options))


def in_memory(source: Path, folder: Path, lora: LoraConfig) -> Tensor:
    """Saves base and adapter as ``stream`` does; the logits of the model in memory."""
    model = apply_lora(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), lora).eval()
    found = logits(model)
    model.save_pretrained(folder / ADAPTER_FOLDER)
    base = model.unload()
    record_quantization_(base)
    base.save_pretrained(folder)
    return found


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(1, 25).reshape(2, 12)
    return model(input_ids=ids).logits


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's shards."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


def write(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that doesn't hold seconds or paths, and nothing of the work folder."""
    files = [f for f in folder.rglob("*") if f.is_file() and ".loftq" not in f.parts]
    kept = [f for f in files if f.name not in ("loftq_report.json", "adapter_config.json")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in kept}
