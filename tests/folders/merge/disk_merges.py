"""Models and adapters on disk, and their merge by two ways that must agree: from folder to folder, and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from qlora_kit import LoraConfig, LoraModel, apply_lora, merge, quantize_
from qlora_kit.folders.merge.run import WORK_FOLDER, FolderMergeReport, merge_folders
from qlora_kit.hf_quantizer import record_quantization_

STORAGES = ("float32", "bfloat16", "nf4", "fp4-double", "int8", "nf3", "signed2-double", "trellis2-double")


def llama(tied: bool = False, **settings: Any) -> LlamaForCausalLM:
    """Two layers, 64 wide; rows of 128, whole blocks of 64."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **tokens, "tie_word_embeddings": tied, **settings}))


def gpt2() -> GPT2LMHeadModel:
    """Conv1D layers, biases that aren't zero, and a head tied to the embedding."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def save_base(model: Any, folder: Path, storage: str = "float32", **options: Any) -> Path:
    """``model`` in ``folder``, in the storage that the platform makes of it."""
    kind, _, double = storage.partition("-")
    if storage in ("float32", "bfloat16", "float16"):
        model.to(getattr(torch, storage)).save_pretrained(folder, **options)
    elif kind in ("nf4", "fp4", "int8"):
        model.save_pretrained(folder / "dense")
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": bool(double)}
        config = BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else four))
        loaded = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
        loaded.save_pretrained(folder, **options)
    else:
        quantize_(model, quant_type=kind, double_quant=bool(double))
        record_quantization_(model)
        model.save_pretrained(folder, **options)
    return folder


def save_adapter(base: Path, folder: Path, targets: Any = "all-linear", *, seed: int = 1, **config: Any) -> Path:
    """An adapter of rank 4 that has learned something, trained on ``base``."""
    torch.manual_seed(seed)
    ours = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **config)
    lora = apply_lora(AutoModelForCausalLM.from_pretrained(base), ours)
    with torch.no_grad():
        for layer in lora.adapter_layers().values():
            for factor in layer.adapter_tensors("default").values():
                factor.normal_(std=0.1)
        for saved in lora.saved_modules().values():
            for parameter in saved.modules_to_save["default"].parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    lora.save_pretrained(folder)
    return folder


def in_memory(base: Path, adapters: list[Path], out: Path, **options: Any) -> nn.Module:
    """Load, merge, ``save_pretrained``; the merged model."""
    lora = LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], "0")
    for number, adapter in enumerate(adapters[1:], 1):
        lora.load_adapter(adapter, str(number))
    lora.set_adapter([str(number) for number in range(len(adapters))])
    report = merge(lora, force=True, **options)
    # Left over from loading codes, and what it says of them can't be undone by transformers.
    vars(report.model).pop("_weight_conversions", None)
    report.model.save_pretrained(out)
    return report.model


def on_disk(base: Path, adapters: list[Path], out: Path, **options: Any) -> FolderMergeReport:
    return merge_folders(base, adapters, out, **{"force": True, **options})


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's shards."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        # Bit for bit: codes may be stored as floats, and be NaN as such.
        assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], value))), name


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=torch.arange(1, 25).reshape(2, 12)).logits


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds paths, and the work folder."""
    files = [f for f in folder.rglob("*") if f.is_file() and WORK_FOLDER not in f.parts]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.name != "merge_report.json"}
