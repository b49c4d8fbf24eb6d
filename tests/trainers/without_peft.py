"""A script, run by ``test_trainer.py`` in a Python where peft can't be imported: train in 4 bits, save, and resume."""

from __future__ import annotations

import math
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tiny_lm import write_tiny_lm
from training_runs import assert_adapters_only, assert_same, finished, load_storage, sft_trainer, trained, wrapped
from transformers.utils import is_peft_available

assert find_spec("peft") is None
assert not is_peft_available()
torch.set_num_threads(1)
settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


def run(kind: str, lm: Path, out: Path, seed: int, resume: Path | None = None) -> Any:
    lora = wrapped(load_storage(lm, "4-bit"), seed=seed)
    if kind == "Trainer":
        return trained(lora, out, resume=resume, load_best_model_at_end=True, **settings)
    return finished(sft_trainer(lora, lm, out, load_best_model_at_end=True, **settings), resume)


folder = Path(sys.argv[1])
lm = write_tiny_lm(folder / "lm")
for kind in ("Trainer", "SFTTrainer"):  # in this order: what the second one loads, the first has to do without
    out = folder / kind
    whole = run(kind, lm, out, seed=1)
    assert_adapters_only(out / "checkpoint-2", whole)
    resumed = run(kind, lm, out, seed=9, resume=out / "checkpoint-2")
    assert len(whole.losses) == 4
    assert resumed.losses == whole.losses
    assert_same(resumed.adapters, whole.adapters)
    assert not any(name == "peft" or name.startswith("peft.") for name, module in sys.modules.items() if module)
    print(f"{kind}: resumed as uninterrupted, without peft")

# Nobody can tell then that the model is its own reference, but it can be asked before training begins.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # TRL reads it
from preference_runs import losses, trainer_of  # noqa: E402 -- after what has to do without TRL

preferences = trainer_of(
    "DPO", wrapped(load_storage(lm, "4-bit")), lm, folder / "DPO", precompute_ref_log_probs=True, save_strategy="no"
)
preferences.train()
assert preferences.ref_model is None
assert abs(losses(preferences)[0] - math.log(2)) < 1e-6
