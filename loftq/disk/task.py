"""What ``loftq init`` is asked for, and what each stored tensor becomes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_kit.config.lora import LoftQConfig, LoraConfig

from ..bits.budget import Budget
from ..inputs.text import text_identity
from ..starts.report import LayerReport

# The hidden folder of the output where a run keeps what it is working on.
WORK_FOLDER = ".loftq"


@dataclass(frozen=True)
class Task:
    """What ``loftq init`` is asked for.

    Attributes:
        source: folder of the 16-bit model.
        out: folder to write; new, empty, or of the same task begun earlier.
        lora: targets, rank, alpha, and in ``loftq_config`` how to quantize.
        shard_bytes: a shard of the output is closed once it holds this much.
        device: where to compute.
        devices: more of that kind, which take turns, a tensor each at a time; none for ``device`` alone.
        workers: tensors that are worked on at a time, on each device.
        outputs: calibrate, to report output errors, where the method itself doesn't ask for it.
        budget: of bits or memory, by which each module's bits are chosen first; None takes those of ``lora``.
        activation_bytes: what activations between blocks may take of memory while calibrating; more goes to files. One
            block's weights may take as much again; more is read anew for every batch.
    """

    source: Path
    out: Path
    lora: LoraConfig
    shard_bytes: int = 5 * 10**9
    device: str = "cpu"
    workers: int = 1
    outputs: bool = False
    budget: Budget | None = None
    activation_bytes: int = 2 << 30
    devices: tuple[str, ...] = ()

    @property
    def underway(self) -> int:
        """Tensors that are worked on at a time."""
        return self.workers * max(1, len(self.devices))

    @property
    def loftq(self) -> LoftQConfig:
        return self.lora.loftq_config or LoftQConfig()

    def options(self) -> dict[str, Any]:
        """All that the output's bytes depend on besides the source."""
        lora = {k: v for k, v in self.lora.to_dict().items() if k not in ("loftq_config", "base_model_name_or_path")}
        method, text = self.loftq.chosen_method, text_identity(self.loftq.calibration)
        loftq = asdict(replace(self.loftq, method=method, calibration=text))
        device = self.device.partition(":")[0]
        budget = None if self.budget is None else self.budget.to_dict()
        own = {"outputs": self.outputs, "budget": budget, "shard_bytes": self.shard_bytes, "device": device}
        return {**lora, **loftq, **own}


@dataclass
class Replacement:
    """What takes a stored tensor's place: tensors of the base and of the adapter by name, and what is noted of it."""

    base: dict[str, Tensor]
    adapter: dict[str, Tensor] = field(default_factory=dict)
    digest: str | None = None
    row: LayerReport | None = None
    change: Tensor | None = None  # Q + sBA - W, where later modules are to see it
