"""What modules add to: found in models of many kinds by one forward, and its moments against float64 models."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from small_models import VOCABULARY, WIDTH, bert, captured, gpt2, mixtral, seeded, t5, targets, text, tiny_llama
from test_groups import assert_near, in_double, random_change, replaced_, rows_of
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from loftq.inputs.additions import additions_in
from loftq.inputs.groups import stages
from loftq.inputs.walk import stops_for


def found_in(model: nn.Module, **batch: Any) -> dict[str, str]:
    batch = batch or {"input_ids": text()[0]["input_ids"]}
    with torch.no_grad(), additions_in(model, stops_for(model, targets(model))) as found:
        model(**batch)
    return found


def in_layers(pairs: dict[str, str], prefix: str, count: int = 2) -> dict[str, str]:
    return {f"{prefix}.{k}.{path}": f"{prefix}.{k}.{stream}" for k in range(count) for path, stream in pairs.items()}


ATTENTION = {"self_attn.o_proj": "input_layernorm"}
LLAMA = {**ATTENTION, "mlp.down_proj": "post_attention_layernorm"}
GPT2 = {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"}
# A norm comes after the sum here, so that what is added to is what the first linears are given.
BERT = {"attention.output.dense": "attention.self.value", "output.dense": "intermediate.dense"}


def neox() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2}
    return seeded(lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=2, use_parallel_residual=True)))


def gemma2() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return seeded(lambda: Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny_llama, in_layers(LLAMA, "model.layers")),
        (gpt2, in_layers(GPT2, "transformer.h")),
        (bert, in_layers(BERT, "encoder.layer")),
        (mixtral, in_layers(ATTENTION, "model.layers")),  # its experts' outputs are weighted first
        (neox, {}),  # both branches are added at once
        (gemma2, {}),  # what is added goes through a norm
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_outputs_are_added_to_is_found_by_what_a_forward_does(
    make: Any, expected: dict[str, str], dtype: torch.dtype
) -> None:
    assert found_in(make().to(dtype)) == expected


def test_an_encoder_and_a_decoder_are_found() -> None:
    ids = text()[0]["input_ids"]
    found = found_in(t5(), input_ids=ids, decoder_input_ids=ids[:, :5])
    layer = {"SelfAttention.o": "layer_norm"}, {"EncDecAttention.o": "layer_norm"}, {"DenseReluDense.wo": "layer_norm"}
    expected = {}
    for name, kinds in (("encoder", (layer[0], layer[2])), ("decoder", layer)):
        for block in range(2):
            for number, pairs in enumerate(kinds):
                prefix = f"{name}.block.{block}.layer.{number}"
                expected |= {f"{prefix}.{path}": f"{prefix}.{stream}" for path, stream in pairs.items()}
    assert found == expected


class Adding(nn.Module):
    """Adds in place, and what it adds to has been changed since a layer was given it."""

    def __init__(self, *, changed: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.norm, self.own, self.after = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Identity()
        self.changed, self.twice = changed, twice

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.own(self.norm(x))
        if self.twice:
            y = self.own(y)
        if self.changed:
            x *= 2
        x += y
        return self.after(x)


@pytest.mark.parametrize(("options", "found"), [({}, True), ({"changed": True}, False), ({"twice": True}, False)])
def test_sums_made_in_place_are_found_and_others_aren_t_made_up(options: dict[str, bool], found: bool) -> None:
    model = seeded(lambda: nn.Sequential(nn.ModuleList([Adding(**options)])[0]))
    with torch.no_grad(), additions_in(model, {"0": ["0.own"]}) as streams:
        model(torch.randn(3, WIDTH))
    assert streams == ({"0.own": "0.norm"} if found else {})


def test_a_layer_that_gives_nothing_says_nothing() -> None:
    """Zero plus anything is that thing, wherever it comes from."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.o_proj").weight.zero_()
    assert "model.layers.0.self_attn.o_proj" not in found_in(model)
    assert "model.layers.1.self_attn.o_proj" in found_in(model)


def test_a_layer_whose_output_is_too_small_to_show_says_nothing() -> None:
    """What is lost in rounding could be added to anything: here, to what the feed-forward is given too."""
    model = neox().to(torch.bfloat16)
    with torch.no_grad():
        model.get_submodule("gpt_neox.layers.0.attention.dense").weight.mul_(1e-9)
    found = found_in(model)
    assert "gpt_neox.layers.0.attention.dense" not in found
    # Where the attention adds nothing that shows, the other branch is added to the stream alone.
    assert found == {"gpt_neox.layers.0.mlp.dense_4h_to_h": "gpt_neox.layers.0.post_attention_layernorm"}


class Turned(nn.Module):
    """As Longformer's attention: a layer in it is given tokens before rows, its last one rows before tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.own, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.tanh(self.value(x.transpose(0, 1))).transpose(0, 1)
        return self.norm(x + self.own(inside))


class Turning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Turned() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_same_rows_in_another_order_are_no_stream() -> None:
    """Which one row of text alone wouldn't show."""
    model, batches = seeded(Turning), [{"x": torch.randn(3, 5, WIDTH)} for _ in range(2)]
    for stage in stages(model, batches, targets(model), sequential=True):
        assert all(seen.shortfall is None for seen in stage.seen().values())


def test_rows_that_are_0_at_first_hide_nothing() -> None:
    """As padding on the left, whose embedding is often 0, and what layers without biases make of it."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    ids = torch.cat([torch.zeros(2, 20, dtype=torch.long), text()[0]["input_ids"]], 1)
    assert found_in(model, input_ids=ids, attention_mask=(ids != 0).long()) == in_layers(LLAMA, "model.layers")


class Empty(Adding):
    """Gives back a tensor without entries, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x[..., :0]


def test_tensors_without_entries_are_no_rows() -> None:
    model = seeded(lambda: nn.Sequential(nn.ModuleList([Empty()])[0]))
    with torch.no_grad(), additions_in(model, {"0": ["0.own"]}) as streams:
        model(torch.randn(3, WIDTH))
    assert streams == {"0.own": "0.norm"}


def test_nothing_is_left_behind() -> None:
    model = tiny_llama()
    found_in(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("make", "streams"),
    [
        (tiny_llama, in_layers(LLAMA, "model.layers")),
        (gpt2, in_layers(GPT2, "transformer.h")),
        (bert, in_layers(BERT, "encoder.layer")),
        (gemma2, {}),
    ],
)
@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_what_is_missing_is_that_of_the_model_with_the_earlier_modules_replaced(
    make: Any, streams: dict[str, str], limit: int
) -> None:
    model, batches = make(), text()
    original, plain = copy.deepcopy(model).double(), in_double(batches)
    current = copy.deepcopy(original)
    seen_in = dict[str, float]()
    for number, stage in enumerate(stages(model, batches, targets(model), sequential=True, limit=limit)):
        for path, seen in stage.seen().items():
            if path not in streams:
                assert seen.shortfall is None
                continue
            wanted = [streams[path], path]
            was, became = captured(original, plain, wanted), captured(current, plain, wanted)
            missing, x = (
                rows_of(was[wanted[0]], plain) - rows_of(became[wanted[0]], plain),
                rows_of(became[path], plain),
            )
            assert seen.shortfall is not None
            assert_near(seen.shortfall, missing.T @ x / len(x))
            assert seen.half is not None
            assert seen.half.shortfall is not None
            early = slice((len(plain) + 1) // 2)
            first = [rows_of(each[early], plain[early]) for each in (was[wanted[0]], became[wanted[0]], became[path])]
            assert_near(seen.half.shortfall, (first[0] - first[1]).T @ first[2] / len(first[2]))
            seen_in[path] = float(np.abs(missing).max())
        for path in stage.paths:
            stage.replaced[path] = random_change(model.get_submodule(path), number)
            replaced_(current, path, stage.replaced[path])
    assert seen_in.keys() == streams.keys()
    assert all(size > 1e-3 for path, size in seen_in.items() if path != next(iter(streams)))
