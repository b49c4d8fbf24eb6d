"""What is refused before the first step, and by which words; and the parts of the engines that one process can show."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jobs_of_sameness
import pytest
import torch
import torch.distributed as dist
from engine_models import adapted, base, batch, optimizer, trained
from processes import in_processes
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qlora_kit import AdapterError, CodecError, ConfigError, LoraConfig, LoraModel, apply_lora, quantize_
from qlora_kit.codecs.bnb import quantize_linear
from qlora_kit.compat.state import get_peft_model_state_dict, set_peft_model_state_dict
from qlora_kit.distributed import prepare, repeated_blocks
from qlora_kit.distributed.sameness import stored_in_codes
from qlora_kit.distributed.zero import partition

pytestmark = pytest.mark.slow


@pytest.fixture
def group() -> Iterator[None]:
    """This process as one of several, the only one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Block(nn.Module):
    """A linear in 4 bits, whose bytes call themselves ``storage``, and one of float32."""

    def __init__(self, storage: torch.dtype) -> None:
        super().__init__()
        linear = nn.Linear(64, 64)
        self.coded = quantize_linear(linear, linear.weight.data, quant_storage=storage)
        self.plain = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(self.coded(x))


class Blocks(nn.Module):
    def __init__(self, storage: torch.dtype = torch.uint8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(storage) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def coded(storage: torch.dtype = torch.uint8) -> LoraModel:
    return apply_lora(Blocks(storage), LoraConfig(r=2, target_modules=["coded", "plain"], init_lora_weights=False))


def bf16_policy() -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16)


@pytest.mark.usefixtures("group")
def test_codes_that_a_policy_would_cast_are_refused() -> None:
    lora = coded(torch.float32)
    message = (
        r"layers\.0\.coded\.base_layer\.weight: expected 4-bit codes .* found codes stored as torch\.float32 under "
    )
    message += r"param_dtype=torch\.bfloat16.*bnb_4bit_quant_storage=torch\.bfloat16 or torch\.uint8"
    with pytest.raises(AdapterError, match=message):
        prepare(lora, "fsdp2", mp_policy=bf16_policy())
    assert not any(isinstance(p, DTensor) for p in lora.parameters())
    for layer in lora.model.layers:
        fully_shard(layer, mp_policy=bf16_policy())
    with pytest.raises(AdapterError, match=message):  # by hand too
        fully_shard(lora, mp_policy=bf16_policy())


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_any_storage_will_do_where_none_casts_it(storage: torch.dtype) -> None:
    lora = coded(storage)
    x = torch.randn(3, 64)
    whole = lora(x)
    policy = bf16_policy() if storage is not torch.float32 else MixedPrecisionPolicy()
    prepare(lora, "fsdp2", mp_policy=policy)
    bound = 0.05 if storage is not torch.float32 else 1e-6  # bfloat16's products
    assert (lora(x).float() - whole).abs().max() < bound * whole.abs().max()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("by_hand", [False, True])
def test_several_dtypes_in_a_block_are_refused(by_hand: bool) -> None:
    lora = adapted("bf16", "biases")
    message = r"expected trained parameters of one dtype .* 14 of torch\.float32 \(.*lora_A.*\); 1 of torch\.bfloat16|"
    message += r"expected trained parameters of one dtype .* torch\.bfloat16 \(.*down_proj\.base_layer\.bias"
    lora.model.model.layers[0].mlp.down_proj.bias.data = lora.model.model.layers[0].mlp.down_proj.bias.data.bfloat16()
    if by_hand:
        for layer in lora.model.model.layers:
            fully_shard(layer)
    with pytest.raises(AdapterError, match=message):
        fully_shard(lora) if by_hand else prepare(lora, "fsdp2")
    if not by_hand:
        assert not any(isinstance(p, DTensor) for p in lora.parameters())
        bias = lora.model.model.layers[0].mlp.down_proj.bias
        bias.data = bias.data.float()  # as the message says
        run = prepare(lora, "fsdp2", optimizer=optimizer)
        run.backward(run.model(input_ids=batch(0), labels=batch(0)).loss)
        run.step()


@pytest.mark.usefixtures("group")
def test_int8_weights_stay_whole() -> None:
    lora = adapted("int8")
    fully_shard(lora.model.model.layers[0])
    with pytest.raises(
        AdapterError, match=r"q_proj\.base_layer\.weight: expected an int8 weight whole .*ignored_params"
    ):
        fully_shard(lora)
    lora = adapted("int8")
    prepare(lora, "fsdp2")
    whole = [name for name, p in lora.named_parameters() if not isinstance(p, DTensor)]
    assert len(whole) == 14
    assert all(name.endswith("base_layer.weight") for name in whole)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_fully_shard_on_the_wrapper(kind: str) -> None:
    lora = adapted(kind)
    expected = lora(input_ids=batch(0)).logits
    own, shown = type(lora), lora.__class__
    fully_shard(lora)
    assert isinstance(lora, FSDPModule)
    assert isinstance(lora, LoraModel)
    assert isinstance(lora, shown)
    assert type(lora).__mro__[1:3] == (FSDPModule, own)
    assert lora.__class__ is shown  # what it passes for
    assert (lora(input_ids=batch(0)).logits - expected).abs().max() < 1e-5
    assert type(adapted(kind)) is LoraModel  # nobody else's type has changed


@pytest.mark.usefixtures("group")
def test_generate_gathers_too() -> None:
    lora = adapted("nf4").eval()
    ids = batch(0)[:1, :4]
    expected = lora.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    prepare(lora, "fsdp2")
    assert torch.equal(lora.generate(input_ids=ids, max_new_tokens=3, do_sample=False), expected)


def test_what_prepare_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = adapted("float32")
    with pytest.raises(
        ConfigError, match=r"expected one of \['ddp', 'fsdp2', 'zero2', 'zero3'\].*did you mean 'fsdp2'"
    ):
        prepare(lora, "fsdp")
    with pytest.raises(AdapterError, match=r"expected a process group, found none; start the script with torchrun"):
        prepare(lora, "ddp")
    with pytest.raises(AdapterError, match="expected what apply_lora returns, found LlamaForCausalLM"):
        prepare(base("float32"), "ddp")
    with pytest.raises(ConfigError, match="expected 3, as the engine 'zero3' says, found 2"):
        partition(lora, 3, optimizer(list(trained(lora).values())), {"zero_optimization": {"stage": 2}})
    aware = adapted("nf4", "merge-aware")
    with pytest.raises(AdapterError, match=r"q_proj: expected adapters that compute beside their base under ZeRO-3"):
        partition(aware, 3, optimizer(list(trained(aware).values())))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"pip install 'qlora-kit\[deepspeed\]'"):
        partition(lora, 2, optimizer(list(trained(lora).values())))
    with pytest.raises(
        AdapterError, match=r"coded\.base_layer\.weight: expected 4-bit codes that DeepSpeed's bf16 mode"
    ):
        partition(coded(torch.float32), 2, optimizer([nn.Parameter(torch.ones(2))]), {"bf16": {"enabled": True}})


@pytest.mark.usefixtures("group")
def test_what_prepare_refuses_in_a_group() -> None:
    lora = adapted("float32")
    with pytest.raises(ConfigError, match=r"engine 'zero2': expected optimizer=\.\.\."):
        prepare(lora, "zero2")
    lora.requires_grad_(False)
    with pytest.raises(AdapterError, match=r"expected parameters that train, found none; call set_adapter"):
        prepare(lora, "ddp")


@pytest.mark.usefixtures("group")
def test_adapters_chosen_after_ddp_are_refused() -> None:
    lora = adapted("float32", "two adapters")
    lora.set_adapter("default")
    run = prepare(lora, "ddp")
    run.model(input_ids=batch(0))
    lora.set_adapter("second")
    with pytest.raises(AdapterError, match=r"second\.weight: expected the parameters to train that trained when"):
        run.model(input_ids=batch(0))


@pytest.mark.engines
def test_processes_with_different_models(tmp_path: Path) -> None:
    first, second = in_processes(jobs_of_sameness.odd_ones, folder=str(tmp_path), patience=20)
    same = r"expected the same model with adapters in every process, found .* in process 0 and .* in process 1 \("
    for rank in (first, second):
        for engine in ("ddp", "fsdp2"):
            assert re.search(rf"0\.self_attn\.q_proj: {same}", rank["alpha"][engine])
            assert re.search(rf"0\.self_attn\.q_proj: {same}", rank["rank"][engine])
            assert re.search(rf"0\.self_attn\.k_proj: {same}", rank["target"][engine])
        assert rank["drawn"] < 1e-5  # the first one's
        assert re.search(r"1\.mlp\.up_proj\.weight: expected the same codes .* torch\.manual_seed", rank["codes"])
    assert "Not a directory" in first["unwritten"]
    assert re.search("rank 0: .*Not a directory", second["unwritten"])
    assert (tmp_path / "step-1" / "optimizer.safetensors").is_file()


@pytest.mark.usefixtures("group")
def test_a_model_in_parts_is_refused() -> None:
    lora = adapted("float32")
    prepare(lora, "fsdp2")
    for engine in ("ddp", "fsdp2"):
        with pytest.raises(AdapterError, match=r"expected a model that each process has whole, found one that is in"):
            prepare(lora, engine)


@pytest.mark.usefixtures("group")
def test_adapters_combined_on_a_sharded_model_are_refused() -> None:
    lora = prepare(adapted("float32", "two adapters"), "fsdp2").lora
    with pytest.raises(AdapterError, match=r"'mix': expected a model with whole weights, found one that FSDP2 has"):
        lora.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mix", combination_type="cat")
    assert list(lora.peft_config) == ["default", "second"]


@pytest.mark.usefixtures("group")
def test_a_model_in_pieces_is_not_quantized() -> None:
    model = base("float32")
    fully_shard(model)
    with pytest.raises(CodecError, match=r"quantize_: expected a model with whole weights, found one that FSDP2 has"):
        quantize_(model, 2)


def test_a_model_is_quantized_while_a_zero3_configuration_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers then builds every model in DeepSpeed's way, the one without weights too that tells where its loader
    would put quantized layers."""
    from transformers.integrations import deepspeed as integration

    class Configuration:
        config: ClassVar[dict[str, Any]] = {}

        def is_zero3(self) -> bool:
            return True

    monkeypatch.setattr(integration, "_hf_deepspeed_config_weak_ref", None)
    configuration = Configuration()
    integration.set_hf_deepspeed_config(configuration)
    model = quantize_(base("float32"), 4)
    assert model.config.quantization_config.load_in_4bit
    assert integration.is_deepspeed_zero3_enabled()


@pytest.mark.usefixtures("group")
def test_a_bias_of_the_outermost_group_is_set_aside_after_an_evaluation() -> None:
    """The evaluation leaves that group whole, in parameters that FSDP2 throws away."""
    model = base("float32")
    model.lm_head.bias = nn.Parameter(torch.zeros(model.config.vocab_size))
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"], bias="all"))
    prepare(lora, "fsdp2").lora.eval()
    with torch.no_grad():
        begun = lora(input_ids=batch(0)).logits
        lora.reshard()
        lora.model.lm_head.bias += 1
        trained_on = lora(input_ids=batch(0)).logits
        with lora.disable_adapter():
            lora.reshard()  # as saving does
            off = lora(input_ids=batch(0)).logits
        assert torch.equal(off, begun)
        assert torch.equal(lora(input_ids=batch(0)).logits, trained_on)
        assert torch.allclose(trained_on, begun + 1)


@pytest.mark.usefixtures("group")
def test_what_is_loaded_after_an_evaluation_stays() -> None:
    lora, other = adapted("float32", "embeddings"), adapted("float32", "embeddings", seed=9)
    prepare(lora, "fsdp2").lora.eval()
    with torch.no_grad():
        lora(input_ids=batch(0))  # leaves the outermost group whole
    set_peft_model_state_dict(lora, get_peft_model_state_dict(other))
    lora.reshard()
    found = get_peft_model_state_dict(lora)
    assert all(torch.equal(found[key], value) for key, value in get_peft_model_state_dict(other).items())


def test_blocks_are_found_by_structure() -> None:
    lora = adapted("float32", "copies")
    assert repeated_blocks(lora) == list(lora.model.model.layers)
    nested = nn.Sequential(nn.ModuleList([Blocks(), Blocks()]), nn.ModuleList([nn.Linear(2, 2)]))
    assert repeated_blocks(nested) == list(nested[0])
    assert repeated_blocks(nn.Linear(2, 2)) == []


def test_storage_in_codes_is_known() -> None:
    names = stored_in_codes(adapted("2-bit"))
    assert "model.model.layers.0.self_attn.q_proj.base_layer.weight" in names
    assert "model.model.layers.0.self_attn.q_proj.base_layer.scales" in names
    assert not [name for name in names if "lora" in name or "norm" in name or "embed" in name]
    assert len([name for name in names if name.endswith("base_layer.weight")]) == 14
    assert stored_in_codes(adapted("bf16")) == []
