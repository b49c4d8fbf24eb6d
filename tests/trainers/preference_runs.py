"""TRL's trainers beyond SFTTrainer on the tiny model: what each takes, and two steps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpointing import ARGUMENT
from datasets import Dataset
from training_runs import arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

PAIRS = [{"prompt": f"number {i}", "chosen": f" before {i + 1}", "rejected": f" before {i}"} for i in range(8)]
JUDGED = [{"prompt": f"number {i}", "completion": f" before {i + 1}", "label": i % 2 == 0} for i in range(8)]
PROMPTS = [{"prompt": f"number {i}"} for i in range(8)]
GENERATION = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}

TRAINERS: dict[str, tuple[Any, Any, list[dict[str, Any]], dict[str, Any]]] = {
    "DPO": (DPOTrainer, DPOConfig, PAIRS, {}),
    "KTO": (KTOTrainer, KTOConfig, JUDGED, {}),
    "ORPO": (ORPOTrainer, ORPOConfig, PAIRS, {"remove_unused_columns": False}),
    "GRPO": (GRPOTrainer, GRPOConfig, PROMPTS, GENERATION),
    "Reward": (RewardTrainer, RewardConfig, PAIRS, {}),
}
#: Those that compare with a reference model.
REFERENCED = ["DPO", "KTO", "GRPO"]


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def base_for(name: str, lm: Path) -> Any:
    """A float32 base: in it, equal numbers are equal to the last bit."""
    if name != "Reward":
        return AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32)
    torch.manual_seed(0)  # of a head that is new
    return LlamaForSequenceClassification.from_pretrained(lm, dtype=torch.float32, num_labels=1, pad_token_id=0)


def trainer_of(name: str, model: Any, lm: Path, out: Path, *, peft_config: Any = None, **settings: Any) -> Any:
    kind, config, rows, own = TRAINERS[name]
    plain = {"bf16": False, ARGUMENT: False, "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4}
    given = {"reward_funcs": length_reward} if name == "GRPO" else {}
    return kind(
        model=model,
        args=arguments(config, out, **{**plain, **own, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(lm),
        **given,
        **({} if peft_config is None else {"peft_config": peft_config}),
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
