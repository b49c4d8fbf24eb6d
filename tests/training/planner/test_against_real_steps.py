"""What a plan says, beside what a real step of the same model holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from measured import measured_peak
from zoo import ZOO

from qlora_kit import set_branch
from qlora_kit.training.planner import plan_memory

# Tables of a few numbers aren't in a plan, nor what a packed weight is looked up in: 3 bits take most of that, and no
# more for a large layer than for a tiny one.
NEAR = {16: 0.05, 8: 0.02, 4: 0.02, 3: 0.1, 2: 0.02}
SIZE = {"rank": 8, "seq": 96, "batch": 2}
# Grouped heads, a tied head, Conv1D, experts, layers of two kinds.
CASES = [
    *(("llama", bits, checkpointing) for bits in (16, 8, 4, 2) for checkpointing in (True, False)),
    *(("llama-tied", bits, True) for bits in (4, 3)),
    *(("gpt2", bits, checkpointing) for bits in (16, 4, 2) for checkpointing in (True, False)),
    *(("mixtral", 4, checkpointing) for checkpointing in (True, False)),
    *((name, 4, True) for name in ("qwen3-moe", "gemma3-text", "deepseek-v3", "mamba", "bloom")),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qlora_kit.errors.LeftOutWarning")  # stacks of experts
@pytest.mark.parametrize(("name", "bits", "checkpointing"), CASES)
def test_the_peak_is_that_of_a_real_step(name: str, bits: int, checkpointing: bool, tmp_path: Path) -> None:
    member = ZOO[name]
    model = member.make()
    model.config.attn_pdrop = 0.0  # a CPU's fused attention knows no dropout
    model.save_pretrained(tmp_path)
    with set_branch("plain"):  # the fused one computes otherwise on a CPU than on a GPU
        plan = plan_memory(tmp_path, bits=bits, checkpointing=checkpointing, **SIZE)
        real = measured_peak(tmp_path, str(member.model_class), bits=bits, checkpointing=checkpointing, **SIZE)
    assert abs(plan.total / real - 1) < NEAR[bits], f"planned {plan.total:,}, measured {real:,}\n{plan}"
