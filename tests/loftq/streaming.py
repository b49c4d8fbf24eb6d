"""Tiny checkpoints on disk, the streamed command on them, and the same done in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_llama import batch, llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from loftq.disk.task import Task
from loftq.disk.writers import ADAPTER_FOLDER
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora
from qlora_kit.hf_quantizer import record_quantization_

ADAPTER = f"{ADAPTER_FOLDER}/adapter_model.safetensors"
OF_LORA = ("r", "lora_alpha", "use_rslora", "target_modules")


def lora_config(**options: Any) -> LoraConfig:
    """Rank 4 on all linears in two steps, unless ``options`` of either config say otherwise."""
    lora = {"r": 4, "target_modules": "all-linear", **{k: v for k, v in options.items() if k in OF_LORA}}
    loftq = {"loftq_iter": 2, "method": "loftq", **{k: v for k, v in options.items() if k not in OF_LORA}}
    return LoraConfig(
        **{"lora_alpha": lora["r"], **lora},
        init_lora_weights="loftq",
        task_type="CAUSAL_LM",
        loftq_config=LoftQConfig(**loftq),
    )


def task(source: Path, out: Path, *, workers: int = 1, shard_bytes: int = 5 * 10**9, **options: Any) -> Task:
    return Task(source, out, lora_config(**options), shard_bytes=shard_bytes, workers=workers)


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **settings: Any) -> Path:
    llama(**settings).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def save_gpt2(folder: Path) -> Path:
    """Conv1D layers, biases, and a head tied to the embedding."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    return with_biases(model, folder)


def save_qwen2(folder: Path) -> Path:
    """Biases in the attention."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return with_biases(Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=False)), folder)


def with_biases(model: nn.Module, folder: Path) -> Path:
    """Saved with biases that aren't zero, as they are at first."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**batch()).logits


def in_memory(source: Path, folder: Path, **options: Any) -> Tensor:
    """Base in ``folder``, adapter in its subfolder, as without streaming; the adapted model's logits."""
    lora = apply_lora(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), lora_config(**options))
    found = logits(lora)
    lora.save_pretrained(folder / ADAPTER_FOLDER)
    base = lora.unload()
    record_quantization_(base)
    base.save_pretrained(folder)
    return found


def reloaded(folder: Path) -> LoraModel:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return LoraModel.from_pretrained(base, folder / ADAPTER_FOLDER)


def base_tensors(folder: Path) -> dict[str, Tensor]:
    """Of all shards of the folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of the model and the adapter: all but the report, which holds times, and the work folder.

    The adapter's config names the folder of the base, which is taken out.
    """
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.parent.name != ".loftq"]
    own = str(folder.resolve()).encode()
    kept = (f for f in files if not f.name.startswith("loftq_report"))
    return {str(f.relative_to(folder)): f.read_bytes().replace(own, b"OUT") for f in kept}
