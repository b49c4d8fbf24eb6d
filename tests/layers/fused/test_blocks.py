"""Feed-forward blocks: which are known, what they keep, that they compute as their type does, that they go again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_llama import llama
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import qlora_kit
from qlora_kit import AdapterError, LoraConfig, LoraModel, apply_lora
from qlora_kit.layers.fused import blocks

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def neox() -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, hidden_dropout=0.0, attention_dropout=0.0, **SIZES))


def phi3() -> nn.Module:
    return Phi3ForCausalLM(Phi3Config(vocab_size=64, pad_token_id=0, num_key_value_heads=2, **SIZES))


def gpt2(dropout: float = 0.0) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=dropout))


def gated_t5() -> nn.Module:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    more = {"decoder_start_token_id": 0, "pad_token_id": 0, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(feed_forward_proj="gated-gelu", **more, **sizes))


MODELS = {"llama": llama, "neox": neox, "phi3": phi3, "gpt2": gpt2, "t5": gated_t5}


def adapted(model: nn.Module, **config: Any) -> LoraModel:
    torch.manual_seed(0)
    lora = apply_lora(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **config))
    return lora.train()


def fitted(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if getattr(vars(m).get("forward"), "func", None) is blocks._forward]


def losses_and_gradients(lora: LoraModel, kind: str) -> list[Tensor]:
    ids = torch.arange(24).view(2, 12) % 50
    lora.zero_grad()
    with qlora_kit.set_branch(kind):
        torch.manual_seed(1)
        loss = lora(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in lora.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_known_by_structure_and_computed_as_their_type_does(name: str) -> None:
    lora = adapted(MODELS[name]())
    assert len(fitted(lora)) == (4 if name == "t5" else 2)
    plain, ours = (losses_and_gradients(lora, kind) for kind in ("plain", "fused"))
    assert len(plain) == len(ours) > 8
    for expected, found in zip(plain, ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-6)


def test_a_block_with_dropout_of_its_own_is_left_as_it_is() -> None:
    assert not fitted(adapted(gpt2(dropout=0.1)))


@pytest.mark.parametrize("change", ["sum", "scaled", "two results", "extra input"])
def test_one_that_only_looks_like_it_is_left_as_it_is(change: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12)
            self.down, self.act = nn.Linear(12, 8), nn.SiLU()

        def forward(self, x: Tensor, *extra: Tensor) -> Any:
            if change == "extra input":
                return self.down(self.act(self.gate(x)) * self.up(extra[0]))
            hidden = self.act(self.gate(x)) * self.up(x)
            hidden = {"sum": self.act(self.gate(x)) + self.up(x), "scaled": 1.01 * hidden}.get(change, hidden)
            return (self.down(hidden), hidden) if change == "two results" else self.down(hidden)

    model = nn.ModuleDict({"block": Block()})
    apply_lora(model, LoraConfig(r=2, target_modules=["gate", "up", "down"]))
    assert not fitted(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_block_keeps(dtype: torch.dtype) -> None:
    """Its input and what both first linears give; the frozen block keeps three tensors as wide as these."""
    lora = adapted(llama().to(dtype))
    block = fitted(lora)[0]
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, 50, 64, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = block(x)
    assert sorted(found.values()) == [50 * size * dtype.itemsize for size in (64, 96, 96)]
    del held


def test_they_go_with_their_adapters_and_come_with_a_copy() -> None:
    lora = adapted(llama())
    twin = copy.deepcopy(lora)
    (own, other) = fitted(lora)[0], fitted(twin)[0]
    assert vars(other)["forward"].args[0] is other is not own
    model = lora.unload()
    assert not fitted(model)
    assert len(fitted(twin)) == 2
    assert not fitted(twin.merge_and_unload())


def test_hooks_of_the_parts_run() -> None:
    lora = adapted(llama())
    block = fitted(lora)[0]
    calls: list[str] = []
    for name in ("gate_proj", "up_proj", "down_proj", "act_fn"):
        getattr(block, name).register_forward_hook(lambda *given, name=name: calls.append(name))
    block(torch.randn(1, 3, 64))
    assert sorted(calls) == ["act_fn", "down_proj", "gate_proj", "up_proj"]


def test_experts_stored_one_by_one_are_blocks() -> None:
    sizes = {**SIZES, "vocab_size": 64, "num_key_value_heads": 2, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert not fitted(lora)  # experts in one tensor have no linears


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4, 2])
def test_the_same_fine_tune_ends_the_same(bits: int | None) -> None:
    """40 seeded steps on each form; float32, so that only the order of sums differs and what training makes of it."""
    ends = []
    for kind in ("plain", "fused"):
        model = llama()
        if bits:
            qlora_kit.quantize_(model, bits)
        torch.manual_seed(0)
        lora = apply_lora(model, LoraConfig(r=4, target_modules="all-linear")).train()
        optimizer = torch.optim.AdamW((p for p in lora.parameters() if p.requires_grad), lr=3e-3)
        ids = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(5))
        with qlora_kit.set_branch(kind):
            for _ in range(40):
                loss = lora(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(loss.item())
    assert ends[0] < 4.0
    assert abs(ends[0] - ends[1]) < 0.02 * ends[0]


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("name", "count"), [("llama", 12), ("phi3", 8), ("t5", 12)])
def test_gradcheck(name: str, count: int, dropout: float) -> None:
    """Through what is made again, with two adapters; the masks are of the same seed in each call."""
    settings = {"target_modules": "all-linear", "lora_dropout": dropout, "init_lora_weights": False}
    lora = apply_lora(MODELS[name](), LoraConfig(r=2, **settings), "a")
    lora.add_adapter("b", LoraConfig(r=3, **settings))
    lora.set_adapter(["a", "b"])
    block = fitted(lora.double().train())[0]
    width = next(module.in_features for module in block.modules() if isinstance(module, nn.Linear))
    x = torch.randn(2, width, dtype=torch.float64, requires_grad=True)
    trained = [p for p in block.parameters() if p.requires_grad]
    assert len(trained) == count

    def call(*_: Tensor) -> Tensor:
        torch.manual_seed(0)
        return block(x)

    torch.autograd.gradcheck(call, (x, *trained), fast_mode=True)


def test_gradients_of_gradients_are_refused() -> None:
    block = fitted(adapted(llama()))[0]
    x = torch.randn(3, 64, requires_grad=True)
    with pytest.raises(AdapterError, match="create_graph=True"):
        torch.autograd.grad(block(x).square().sum(), x, create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4, 2])
def test_a_scaler_over_float16_finds_the_same_scale(bits: int | None) -> None:
    """Autocast in float16 from a scale that overflows: steps are skipped until it doesn't, on either form alike."""
    ends = []
    for kind in ("plain", "fused"):
        model = llama()
        if bits:
            qlora_kit.quantize_(model, bits)
        lora = apply_lora(model, LoraConfig(r=4, target_modules="all-linear")).train()
        optimizer = torch.optim.AdamW((p for p in lora.parameters() if p.requires_grad), lr=3e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        ids = torch.arange(24).view(2, 12)
        with qlora_kit.set_branch(kind):
            for _ in range(20):
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = lora(input_ids=ids, labels=ids).loss
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        ends.append((loss.item(), scaler.get_scale()))
    (plain, scale), (ours, found) = ends
    assert scale < 2.0**24
    assert max(scale, found) <= 2 * min(scale, found)
    assert abs(ours - plain) < 0.02 * plain


def test_an_activation_that_autocast_computes_in_float32() -> None:
    """Made anew outside autocast it has another dtype; gradients reach both first linears all the same."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.act = nn.Linear(8, 12), nn.Linear(12, 8), nn.Softplus()

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x)))

    lora = adapted(nn.ModuleDict({"block": Block()}))
    assert len(fitted(lora)) == 1
    found = []
    for kind in ("plain", "fused"):
        with qlora_kit.set_branch(kind), torch.autocast("cpu", dtype=torch.bfloat16):
            y = lora.model["block"](torch.linspace(-1, 1, 40).view(5, 8))
        lora.zero_grad()
        y.float().square().sum().backward()
        found.append([p.grad.clone() for p in lora.parameters() if p.grad is not None])
    for plain, ours in zip(*found, strict=True):
        assert (plain - ours).abs().max() <= 0.05 * plain.abs().max()
