"""Adapters where weights are read past their modules: gradients, eval, caches and merges say the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from qlora_kit import LoraConfig, LoraModel, apply_lora, merge

# Sums of some hundred float32 products in another order, relative to what the adapter changes.
FLOAT32 = 2e-5
# What a model's own steps with a cache are off from the whole text at once: Nemotron-H's by 3e-4.
WITH_CACHE = 1e-3


class Attend(nn.Module):
    """torch's own attention with its options."""

    def __init__(self, *, need_weights: bool, batch_first: bool, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=batch_first, **options)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=self.need_weights)[0]


class Encode(nn.Module):
    """torch's encoder, which in eval leaves out what is padding."""

    def __init__(self, *, layers: int = 1, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=not norm_first)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, 3:] = True
        return self.encoder(x, src_key_padding_mask=padding)[:, :3]


def check(model: nn.Module, targets: Any, run: Callable[[Any], Tensor]) -> LoraModel:
    """Gradients reach every factor, and training and eval give the same; the model, in eval."""
    torch.manual_seed(0)
    lora = apply_lora(model, LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    trained = run(lora.train())
    trained.square().sum().backward()
    without = [n for n, p in lora.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    with torch.no_grad():
        adapted = run(lora.eval())
        with lora.disable_adapter():
            size = (run(lora) - adapted).norm()
        assert size > 1e-3 * adapted.norm()
        assert (trained - adapted).norm() < FLOAT32 * size
    return lora


@torch.no_grad()
def check_merged(lora: LoraModel, run: Callable[[Any], Tensor]) -> None:
    adapted = run(lora)
    with lora.disable_adapter():
        size = (run(lora) - adapted).norm()
    assert (run(merge(lora, into="float32").model) - adapted).norm() < FLOAT32 * size


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("build", "targets"),
    [
        *(
            (lambda w=w, b=b: Attend(need_weights=w, batch_first=b), ["out_proj"])
            for w in (False, True)
            for b in (False, True)
        ),
        (lambda: Attend(need_weights=False, batch_first=True, kdim=16, vdim=16, add_bias_kv=True), ["out_proj"]),
        (Encode, ["linear1", "linear2", "out_proj"]),
        (lambda: Encode(layers=2), ["linear1"]),
        (lambda: Encode(norm_first=True), ["out_proj", "linear2"]),
    ],
)
def test_torchs_own_attention(build: Callable[[], nn.Module], targets: list[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    lora = check(build(), targets, lambda model: model(x))
    check_merged(lora, lambda model: model(x))


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
SSM = {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
NEXT = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8},
    **{"shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]},
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}
NEMOTRON = {
    **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "chunk_size": 8, "head_dim": 8},
    **{"layers_block_type": ["mamba", "attention"], "n_groups": 1},
}
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mamba": ("Mamba", {"state_size": 4}, ["dt_proj", "conv1d", "x_proj", "out_proj"]),
    "falcon-mamba": ("FalconMamba", {"state_size": 4}, ["dt_proj", "conv1d", "x_proj", "out_proj"]),
    "mamba2": ("Mamba2", SSM, ["conv1d", "out_proj"]),
    "falcon-h1": ("FalconH1", {**HEADS, **H1, "head_dim": 8, "mamba_n_groups": 1}, ["conv1d", "out_proj"]),
    "jamba": ("Jamba", {**HEADS, **JAMBA, "mamba_d_state": 4}, ["dt_proj", "conv1d"]),
    "lfm2": ("Lfm2", {**HEADS, "layer_types": ["conv", "full_attention"]}, ["conv.conv"]),
    "qwen3-next": ("Qwen3Next", {**HEADS, **NEXT}, ["conv1d"]),
    "nemotron-h": ("NemotronH", {**HEADS, **NEMOTRON}, ["conv1d", "out_proj"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "settings", "targets"), MODELS.values(), ids=MODELS)
def test_state_space_models(stem: str, settings: dict[str, Any], targets: list[str]) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**{**SMALL, **settings})
    model = getattr(transformers, f"{stem}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # so that each layer matters
            if parameter.dim() == 2 and parameter.std() < 0.1:
                parameter.normal_(std=0.1)
    words = torch.randint(1, 64, (1, 9))

    def run(model: Any) -> Tensor:
        return model(input_ids=words, use_cache=False).logits

    lora = check(model, targets, run)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    written = lora.generate(words[:, :5], **options)
    cached = torch.stack(written.logits, dim=1)
    with torch.no_grad():
        whole = lora(input_ids=written.sequences[:, :-1], use_cache=False).logits[:, -4:]
        with lora.disable_adapter():
            size = (lora(input_ids=written.sequences[:, :-1], use_cache=False).logits[:, -4:] - whole).norm()
    assert (cached - whole).norm() < WITH_CACHE * size
    check_merged(lora, run)
    merged = torch.stack(model.generate(words[:, :5], **options).logits, dim=1)
    assert (cached - merged).norm() < FLOAT32 * size


@torch.no_grad()
def test_rwkv_rescales_its_layers_with_their_adapters() -> None:
    torch.manual_seed(0)
    sizes = {"attention_hidden_size": 32, "intermediate_size": 64, "context_length": 16, "rescale_every": 1}
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**SMALL, **sizes))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.2)
    words = torch.randint(1, 64, (1, 9))
    lora = apply_lora(model, LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    trained = lora.train()(input_ids=words).logits
    rescaled = lora.eval()(input_ids=words).logits
    # Between scales of 1 and 1/2 lie the layer norms' epsilons.
    torch.testing.assert_close(rescaled, trained, rtol=1e-3, atol=1e-3)
    assert torch.equal(lora.train()(input_ids=words).logits, trained)
    lora.eval()(input_ids=words)
    merged = merge(lora, into="float32").model
    torch.testing.assert_close(merged(input_ids=words).logits, rescaled, rtol=1e-4, atol=1e-5)
