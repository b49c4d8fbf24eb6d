"""What a refused merge advises: each setting that its message names keeps the share that the message says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from merge_nets import PATHS, adapted, assert_same_bits, bits
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_kit import LoraConfig, LoraModel, MergeError, apply_lora, merge
from qlora_kit.training.preparation.quantize import quantize_

NOT_TRIED = "With statistics=TEXT rounding='error-feedback' may keep more (not tried: it looks at the inputs)."


def small(storage: str) -> LoraModel:
    torch.manual_seed(3)
    return adapted(storage, size=3e-3)


def moments(diagonal: bool = False) -> dict[str, Tensor]:
    """Of inputs that a few directions dominate."""
    found = {}
    for seed, (path, width) in enumerate(zip(PATHS, (64, 96, 64), strict=True)):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(400, 8, generator=draw) @ torch.randn(8, width, generator=draw)
        x = x + 0.2 * torch.randn(400, width, generator=draw)
        found[path] = x.T @ x / len(x)
    return {path: R.diagonal().clone() for path, R in found.items()} if diagonal else found


def said_by(lora: LoraModel, **asked: Any) -> str:
    before = bits(lora)
    with pytest.raises(MergeError, match=r"of the delta to survive rounding into") as caught:
        merge(lora, **asked)
    assert_same_bits(lora, before)
    return str(caught.value)


def advised(said: str) -> dict[str, str]:
    return dict(re.findall(r"((?:rounding='[a-z-]+')|(?:residual_rank=\d+)) keeps (-?[\d.]+%)", said))


def as_option(setting: str) -> dict[str, Any]:
    name, value = setting.split("=")
    return {name: int(value) if value.isdigit() else value.strip("'")}


@pytest.mark.parametrize(
    ("storage", "asked", "expected"),
    [
        ("nf4", {}, ["rounding='scale-search'", "rounding='error-feedback'"]),
        ("packed-affine3-double", {}, ["rounding='scale-search'", "rounding='error-feedback'"]),
        ("nf4-double", {"rounding": "scale-search"}, ["rounding='error-feedback'"]),
        # Nothing keeps twice the delta, so all that is left to try is tried.
        (
            "packed-nf3",
            {"rounding": "error-feedback", "least_retained": 2.0},
            ["residual_rank=8", "residual_rank=16", "residual_rank=32"],
        ),
        (
            "nf4",
            {"residual_rank": 8, "least_retained": 2.0, "residual_dtype": torch.bfloat16},
            ["rounding='scale-search'", "rounding='error-feedback'", "residual_rank=16", "residual_rank=32"],
        ),
    ],
)
@pytest.mark.slow
def test_with_moments_of_the_inputs(storage: str, asked: dict[str, Any], expected: list[str]) -> None:
    said = said_by(small(storage), statistics=moments(), **asked)
    found = advised(said)
    assert list(found)[: len(expected)] == expected
    assert "not tried" not in said
    for setting, share in found.items():
        options = {**asked, **as_option(setting)}
        report = merge(small(storage), statistics=moments(), force=True, **options)
        assert f"{report.kept:.1%}" == share, setting


@pytest.mark.parametrize("diagonal", [False, True])
def test_without_whole_moments_error_feedback_is_named_and_not_tried(diagonal: bool) -> None:
    statistics = moments(diagonal=True) if diagonal else None
    said = said_by(small("nf4"), statistics=statistics)
    assert NOT_TRIED in said
    found = advised(said)
    assert list(found) == ["rounding='scale-search'", "residual_rank=8"]
    for setting, share in found.items():
        report = merge(small("nf4"), statistics=statistics, force=True, **as_option(setting))
        assert f"{report.kept:.1%}" == share, setting


@pytest.mark.slow
def test_on_the_original_base(tmp_path: Path) -> None:
    """Rounded anew: the weight to round isn't the one that is stored plus the delta."""
    tiny_llama.llama(num_hidden_layers=1, intermediate_size=64).save_pretrained(tmp_path)

    def lora() -> LoraModel:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        adapter = apply_lora(quantize_(model, quant_type="nf3"), config).eval()
        with torch.no_grad():
            for layer in adapter.adapter_layers().values():
                layer.factors("default")[1].mul_(0.01)
        return adapter

    said = said_by(lora(), base="original", least_retained=2.0)
    for setting, share in advised(said).items():
        report = merge(lora(), base="original", force=True, **as_option(setting))
        assert f"{report.kept:.1%}" == share, setting
