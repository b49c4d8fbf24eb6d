"""What to merge into, by any name that scripts have for it."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import llama

from qlora_kit import ConfigError, LoraConfig, MergeError, apply_lora, merge
from qlora_kit.merging.task import storage_name

NAMES = {
    "bfloat16": (torch.bfloat16, "bfloat16", "bf16", "BF16", "torch.bfloat16"),
    "float16": (torch.float16, torch.half, "float16", "fp16", "half", "torch.float16"),
    "float32": (torch.float32, torch.float, "float32", "fp32", "float"),
    "nf4": ("nf4", "NF4"),
    "same": ("same",),
}


def test_names() -> None:
    for name, others in NAMES.items():
        assert {storage_name(other) for other in others} == {name}
    for other in (torch.int32, "bf15", 5, None, ["bf16"]):
        assert storage_name(other) == other


@pytest.mark.parametrize("into", [torch.bfloat16, "bf16", torch.float16])
def test_a_merge_in_memory_understands_them(into: object) -> None:
    lora = apply_lora(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    report = merge(lora, into=into)  # type: ignore[arg-type]
    assert report.into == storage_name(into)
    assert report.model.model.layers[0].self_attn.q_proj.weight.dtype == getattr(torch, report.into)


def test_what_is_none_of_them_is_said() -> None:
    lora = apply_lora(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(MergeError, match=r"into=torch.int32: expected 'same' or one of"):
        merge(lora, into=torch.int32)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "eva", "orthogonal", "lora_ga", "mica"])
def test_peft_s_other_starts_say_what_to_use(start: str) -> None:
    with pytest.raises(ConfigError, match=rf"init_lora_weights: expected one of .*found '{start}'; .*pass init_lora_"):
        LoraConfig(init_lora_weights=start)
    if start.startswith("pissa"):
        with pytest.raises(ConfigError, match=r"LoftQConfig\(method='pissa'\)"):
            LoraConfig(init_lora_weights=start)
