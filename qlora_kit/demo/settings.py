"""What a run of the demo depends on, and the adapters that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.lora import LoftQConfig, LoraConfig
from .models import pick_device, reference_model_path

LOFTQ_STEPS = 5
BLOCKSIZE = 64
DOUBLE_QUANT = {2: True, 4: False}


@dataclass(frozen=True)
class Settings:
    """What a run depends on; alpha equals the rank, so the scaling is 1."""

    model: str
    out: Path
    device: str
    steps: int = 60
    rank: int = 16
    learning_rate: float = 1e-3
    seed: int = 0
    batch: int = 4
    window: int = 256
    held_out_rows: int = 32

    @classmethod
    def make(cls, *, model: str | None, device: str | None, **others: Any) -> Settings:
        """Settings with the reference model and the best device filled in where None is given."""
        return cls(model=model or str(reference_model_path()), device=pick_device(device)[0], **others)

    def lora(self, **start: Any) -> LoraConfig:
        """Adapters on all linear layers, with ``start``'s fields of the configuration."""
        return LoraConfig(
            r=self.rank, lora_alpha=self.rank, target_modules="all-linear", task_type="CAUSAL_LM", **start
        )

    def loftq(self, bits: int, calibration: Any = None, **others: Any) -> LoraConfig:
        """``lora`` with a start at ``bits`` bits: LoftQ's as published, or with a ``calibration`` the best there is."""
        loftq = LoftQConfig(
            loftq_bits=bits,
            loftq_iter=LOFTQ_STEPS,
            blocksize=BLOCKSIZE,
            double_quant=DOUBLE_QUANT[bits],
            method="loftq" if calibration is None else "auto",
            calibration=calibration,
            calibration_tokens=self.window,
        )
        return self.lora(init_lora_weights="loftq", loftq_config=loftq, **others)
