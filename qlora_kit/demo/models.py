"""Getting the model: the reference one or the user's, dense or 4-bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..checkpoints.model_folder import plainly
from ..compat.neighbours.quieted import quieted
from ..config.checks import check_device
from ..errors import StorageError

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel the reference model lies inside the package; in a checkout it stays where it was trained.
REFERENCE_FOLDERS = (_PACKAGE / "_reference_lm", _PACKAGE.parent / "benchmarks" / "reference_lm")


def reference_model_path() -> Path:
    """The folder of the reference model.

    Raises:
        StorageError: this installation has none.
    """
    for folder in REFERENCE_FOLDERS:
        if (folder / "model.safetensors").exists():
            return folder
    raise StorageError(
        f"the reference model: expected model.safetensors in one of {[str(f) for f in REFERENCE_FOLDERS]}, found "
        "none; reinstall qlora-kit, train it with benchmarks/reference_lm/train.py, or name another with --model"
    )


@dataclass(frozen=True)
class Source:
    """A causal LM by folder or hub name, and where and in what precision it computes.

    A local folder is read without a network; any other name is the user's asking for the hub.
    """

    name: str
    device: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        looks_like_a_folder = os.path.isabs(self.name) or self.name.startswith(".")
        if looks_like_a_folder and not Path(self.name).is_dir():
            raise StorageError(
                f"model={self.name!r}: expected a folder or a name on the hub, found no such folder; correct the path"
            )

    def tokenizer(self) -> Any:
        try:
            local = Path(self.name).is_dir()
            return AutoTokenizer.from_pretrained(self.name, local_files_only=local, trust_remote_code=False)
        except Exception as error:  # transformers' of any kind: no such model, and none that it can read
            raise self._unreadable(error) from error

    def dense(self) -> PreTrainedModel:
        """The stored weights, unquantized, in evaluation mode."""
        return self._load(self.name)

    def four_bit(self) -> PreTrainedModel:
        """Quantized to NF4 by bitsandbytes as it is loaded."""
        return self._load(self.name, quantization_config=self.quantization())

    def quantized(self, folder: Path) -> PreTrainedModel:
        """A 4-bit model that was saved as such, from ``folder``."""
        return self._load(str(folder))

    def quantization(self) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype)

    def _load(self, name: str, **options: Any) -> PreTrainedModel:
        try:
            local = Path(name).is_dir()
            return AutoModelForCausalLM.from_pretrained(
                name,
                dtype=self.dtype,
                device_map={"": self.device},
                local_files_only=local,
                **plainly(name, local_files_only=local),
                **options,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> StorageError:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        return StorageError(
            f"model={self.name!r}: expected a folder, or a name on the hub, of a model with its tokenizer, found "
            f"none ({said}); correct it, or download the model first"
        )


def pick_device(device: str | None) -> tuple[str, torch.dtype]:
    """The device to compute on and the dtype to compute in: bfloat16 on a GPU, float32 on a CPU.

    bfloat16 weights are exact in float32, so on a CPU only the arithmetic differs.

    Raises:
        ConfigError: there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device("device", device)
    return device, torch.bfloat16 if device.startswith("cuda") else torch.float32


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as they are stored, shared ones once, 4-bit scales included."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries' loading bars and advice off the terminal; errors come through, and all is put back after."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with quieted("bitsandbytes", "accelerate"):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
