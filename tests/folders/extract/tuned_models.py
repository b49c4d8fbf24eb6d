"""A base and a tuned checkpoint on disk, and what an adapter between them does, here and in peft."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit import LoraModel
from qlora_kit.adapter_files.folder import read_adapter

Change = Callable[[str, Tensor, torch.Generator], Tensor | None]


def low_rank(rank: int, size: float = 0.05, *, only: str = "") -> Change:
    """Adds a product of that rank to every matrix whose name holds ``only``."""

    def change(name: str, weight: Tensor, generator: torch.Generator) -> Tensor | None:
        if weight.dim() < 2 or only not in name:
            return None
        flat = weight.flatten(1)
        left = torch.randn(flat.shape[0], rank, generator=generator)
        right = torch.randn(rank, flat.shape[1], generator=generator)
        return (size / rank * left @ right).reshape(weight.shape)

    return change


def noise(size: float = 0.02, *, only: tuple[str, ...] = ("",)) -> Change:
    """Adds noise, of full rank, to everything whose name holds one of ``only``."""

    def change(name: str, weight: Tensor, generator: torch.Generator) -> Tensor | None:
        wanted = any(part in name for part in only)
        return size * torch.randn(weight.shape, generator=generator) if wanted else None

    return change


@torch.no_grad()
def tune_(model: PreTrainedModel, *changes: Change) -> PreTrainedModel:
    """Change the model's parameters as a fine-tune would have; tied ones once."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        for change in changes:
            if (added := change(name, parameter, generator)) is not None:
                parameter += added.to(parameter.dtype)
    return model.eval()


def pair(model: PreTrainedModel, folder: Path, *changes: Change, **options: Any) -> tuple[Path, Path]:
    """Save the model as it is and as tuned; ``model`` is the tuned one afterwards."""
    model.eval().save_pretrained(folder / "base", **options)
    tune_(model, *changes).save_pretrained(folder / "tuned", **options)
    return folder / "base", folder / "tuned"


def branches(folder: Path) -> dict[str, np.ndarray]:
    """B @ A of each module of a stored adapter, (out, in), float64; its scaling is 1."""
    _, state = read_adapter(folder)
    found = {}
    for key, A in state.items():
        for kind, end in (("lora_A", ".weight"), ("lora_embedding_A", "")):
            if key.endswith(f".{kind}{end}"):
                path = key.removesuffix(f".{kind}{end}")
                B = state[f"{path}.{kind[:-1]}B{end}"]
                found[path.removeprefix("base_model.model.")] = _matrix(B) @ _matrix(A)
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's shards."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def differences(base: Path, tuned: Path) -> dict[str, np.ndarray]:
    """Tuned minus base of every tensor, float64, as it is stored."""
    before, after = tensors(base), tensors(tuned)
    return {name: (after[name].double() - before[name].double()).numpy() for name in before if name in after}


def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(1, 25).reshape(2, 12)}


@torch.no_grad()
def assert_reproduces(
    base: Callable[[], nn.Module], adapter: Path, tuned: nn.Module, given: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """``base`` with the adapter computes what ``tuned`` does, here and in peft."""
    peft = pytest.importorskip("peft", reason="extracted adapters are loaded in the installed peft")
    expected = tuned(**given).logits
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # peft asks for it
        theirs = peft.PeftModel.from_pretrained(base(), str(adapter)).eval()
    for model in (LoraModel.from_pretrained(base().eval(), adapter), theirs):
        found = model(**given).logits
        assert not torch.allclose(base().eval()(**given).logits, expected, rtol=0, atol=10 * tolerance)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def _matrix(factor: Tensor) -> np.ndarray:
    return factor.double().flatten(1).numpy()
