"""What "all-linear" and default targets leave out: named, counted, and warned of where it is much."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from qlora_kit import LoraConfig, apply_lora, make_plan, quantize_
from qlora_kit.errors import LeftOutWarning
from qlora_kit.injection.left_out import LARGE

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ALL = LoraConfig(r=2, target_modules="all-linear")


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4))


class Stacked(nn.Module):
    """Matrices in one parameter, which nothing here calls experts."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(8, 3)
        self.bank = nn.ParameterDict({"first": nn.Parameter(torch.randn(3, 8, 8))})
        self.queries = nn.Parameter(torch.randn(1, 4, 8))  # one matrix, whatever its dimensions


def count(model: nn.Module, part: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if part in name)


@pytest.mark.parametrize("config", [ALL, LoraConfig(r=2)], ids=["all-linear", "default"])
def test_stacked_experts_are_named_once_with_their_share(config: LoraConfig) -> None:
    model = mixtral()
    plan = make_plan(model, config)
    stacks = {part.pattern: part for part in plan.left_out if not part.expected}
    above = "model.layers.*.mlp.experts."
    assert list(stacks) == [f"{above}gate_up_proj", f"{above}down_proj"]
    for part in stacks.values():
        assert part.paths == tuple(part.pattern.replace("*", str(layer)) for layer in range(2))
        assert part.module_type == "MixtralExperts"
        assert part.parameters == sum(model.get_parameter(path).numel() for path in part.paths)
        assert part.share == part.parameters / count(model, "")
    assert sum(part.parameters for part in stacks.values()) == count(model, "experts") > 0.7 * count(model, "")
    lines = [line for line in str(plan).splitlines() if "experts" in line]
    assert len(lines) == 2
    share = f"{stacks[f'{above}down_proj'].share:.1%}"
    assert f"{above}down_proj  left out: 2 x MixtralExperts, 12,288 parameters, {share}: a stack of 4 matr" in lines[1]
    data = json.loads(json.dumps(plan.to_dict()))["left_out"]
    assert [part["pattern"] for part in data] == [part.pattern for part in plan.left_out]


def on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


def under_an_adapter(model: nn.Module) -> nn.Module:
    return apply_lora(model, LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["lm_head"]), "first").model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)


def compiled_inside(model: Any) -> nn.Module:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    model.lm_head = torch.compile(model.lm_head)
    return model


def in_few_bits(model: nn.Module) -> nn.Module:
    return quantize_(model, 2, blocksize=16, target_modules=["q_proj", "v_proj"])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch.compile itself
@pytest.mark.parametrize("change", [on_meta, under_an_adapter, compiled, compiled_inside, in_few_bits])
def test_it_is_the_same_whatever_has_been_done_to_the_model(change: Callable[[nn.Module], nn.Module]) -> None:
    expected = make_plan(mixtral(), ALL)
    plan = make_plan(change(mixtral()), ALL)
    assert plan.left_out == expected.left_out
    assert [entry.path for entry in plan.entries] == [entry.path for entry in expected.entries]


def test_stacks_are_found_by_structure() -> None:
    model = Stacked()
    plan = make_plan(model, ALL)
    assert [entry.path for entry in plan.entries] == ["route"]
    assert [(part.paths, part.parameters) for part in plan.left_out] == [(("queries",), 32), (("bank.first",), 192)]
    assert plan.left_out[0].share == 32 / count(model, "")


def test_linears_that_cannot_be_adapted_come_with_their_reason() -> None:
    sizes = {**SIZES, "intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    with torch.device("meta"):
        llama4 = Llama4ForCausalLM(Llama4TextConfig(**sizes, **HEADS, interleave_moe_layer_step=1))
    plan = make_plan(llama4, ALL)
    (router,) = (part for part in plan.left_out if part.module_type == "Llama4Router")
    assert router.pattern == "model.layers.*.feed_forward.router"
    assert "returns a tuple" in router.reason
    assert not any("router" in entry.path for entry in plan.entries)

    plan = make_plan(nn.ModuleDict({"normed": weight_norm(nn.Linear(4, 4)), "out": nn.Linear(4, 4)}), ALL)
    assert [(part.paths, "parametrizations" in part.reason) for part in plan.left_out] == [(("normed",), True)]


def test_what_the_weight_of_another_kind_of_layer_is_computed_from_is_no_stack() -> None:
    model = nn.ModuleDict({"conv": weight_norm(nn.Conv1d(4, 4, 3)), "out": nn.Linear(4, 4)})
    assert make_plan(model, ALL).left_out == ()


def test_what_is_named_is_all_that_was_asked_for() -> None:
    assert make_plan(mixtral(), LoraConfig(target_modules=["q_proj"])).left_out == ()


def test_a_warning_names_what_is_large_and_how_to_say_that_it_is_meant() -> None:
    message = r"target_modules='all-linear' leaves out 78% of the model's parameters.*experts\.gate_up_proj \(51\.\d%"
    with pytest.warns(LeftOutWarning, match=message) as caught:
        lora = apply_lora(mixtral(), ALL)
    assert len(caught) == 1
    with pytest.warns(LeftOutWarning, match="target_modules=None leaves out 78%"):
        apply_lora(mixtral(), LoraConfig(r=2))
    assert lora.plan is not None
    assert lora.plan.left_out == make_plan(mixtral(), ALL).left_out


def test_there_is_none_for_heads_for_small_parts_and_for_what_is_excluded() -> None:
    sizes = {**SIZES, "vocab_size": 4096}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **HEADS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (head,) = make_plan(llama, ALL).left_out
        assert (head.paths, head.reason, head.expected) == (("lm_head",), "the output head", True)
        assert head.share > LARGE
        apply_lora(llama, ALL)
        wide = nn.ModuleDict({"normed": weight_norm(nn.Linear(4, 4)), "out": nn.Linear(64, 64)})
        assert 0 < make_plan(wide, ALL).left_out[0].share < LARGE
        apply_lora(wide, ALL)
        plan = apply_lora(mixtral(), LoraConfig(r=2, target_modules="all-linear", exclude_modules=["experts"])).plan
    assert plan is not None
    assert [part.pattern for part in plan.left_out] == ["lm_head"]


def test_a_stored_adapter_is_loaded_without_a_warning(tmp_path: Any) -> None:
    from qlora_kit import LoraModel

    with pytest.warns(LeftOutWarning):
        apply_lora(mixtral(), ALL).save_pretrained(tmp_path)
    LoraModel.from_pretrained(mixtral(), tmp_path)
