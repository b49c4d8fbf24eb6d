"""PEFT's keywords that aren't implemented, and what is mistyped, are refused wherever a model would swallow them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_kit import AdapterError, LoraConfig, LoraModel, apply_lora

IDS = torch.arange(16).view(2, 8)


class Swallows(nn.Module):
    """Takes any keyword, and has one of its own that looks like PEFT's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor, task_ids: Tensor | None = None, **keywords: Any) -> Tensor:
        self.seen = {"task_ids": task_ids, **keywords}
        return self.proj(x)

    def generate(self, x: Tensor, **keywords: Any) -> Tensor:
        return self(x, **keywords)


def llama() -> LoraModel:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0))
    return apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()


def swallows() -> LoraModel:
    return apply_lora(Swallows(), LoraConfig(r=2, target_modules=["proj"]))


@pytest.mark.parametrize("keyword", ["adapter_name", "adapters", "adaptor_names", "adpater_names"])
def test_what_is_mistyped_for_rows_with_their_own_adapter_is_refused(keyword: str) -> None:
    lora, rows = llama(), {keyword: ["default", "__base__"]}
    with pytest.raises(
        AdapterError, match=f"{keyword}=.*'default'.*looks like PEFT's adapter_names: adapter_names=\\["
    ):
        lora(input_ids=IDS, **rows)
    with pytest.raises(AdapterError, match=f"{keyword}=.*adapter for each row"):
        lora.generate(IDS, max_new_tokens=2, **rows)
    for call in (swallows(), swallows().generate):
        with pytest.raises(AdapterError, match="adapter for each row"):
            call(torch.ones(2, 4), **rows)


def test_names_for_rows_reach_no_model() -> None:
    lora, x = swallows().eval(), torch.ones(2, 4)
    for call in (lora, lora.generate):
        call(x, adapter_names=["default", "__base__"], other=1)
        assert lora.model.seen == {"task_ids": None, "other": 1}


@pytest.mark.parametrize("keyword", ["alora_offsets", "task_ids"])
def test_other_keywords_of_peft_too(keyword: str) -> None:
    with pytest.raises(AdapterError, match=f"{keyword}=.*isn't implemented|{keyword}=.*aren't implemented"):
        llama()(input_ids=IDS, **{keyword: [1, 2]})


def test_what_says_nothing_and_what_is_the_models_own_passes() -> None:
    lora, x = swallows(), torch.ones(2, 4)
    lora(x, adapter_names=None, task_ids=IDS, layer_names="a", parameter_names="b", mask_ids=1)
    assert lora.model.seen == {"task_ids": IDS, "layer_names": "a", "parameter_names": "b", "mask_ids": 1}
    llama()(input_ids=IDS, adapter_names=None)
    assert llama().generate(IDS, max_new_tokens=2, do_sample=False, adapter_names=None).shape == (2, 10)


@pytest.mark.slow
def test_compiled_and_patched_models_refuse_them_too() -> None:
    lora, x = swallows(), torch.ones(2, 4)
    assert torch.compile(lora, backend="eager", fullgraph=True)(x).shape == (2, 4)
    forward = lora.forward
    lora.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(AdapterError, match="alora_offsets"):
        lora(x, alora_offsets=[1, 1])


def test_generate_is_the_models_own_where_it_has_one() -> None:
    assert not hasattr(apply_lora(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"])), "generate")
    lora = swallows()
    lora.generate = "replaced"
    assert lora.generate == "replaced"
