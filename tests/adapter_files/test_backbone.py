"""An adapter that LoftQ started knows the quantized base that it makes up for, and refuses others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from tiny_llama import batch, llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora, codec_for
from qlora_kit.adapter_files.backbone import METADATA_KEY, fingerprint, module_digest
from qlora_kit.codecs.bnb import quantize_linear, quantize_linear_int8
from qlora_kit.codecs.packed import PackedLinear, pack_linear
from qlora_kit.codecs.quantized import quantize_matrix
from qlora_kit.errors import StorageError
from qlora_kit.hf_quantizer import record_quantization_

REFUSAL = r"expected the quantized base model .* \(fingerprint [0-9a-f]{12}\), found another \([0-9a-f]{12}, of"


def weight(seed: int = 0, shape: tuple[int, int] = (64, 128)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def four_bit(seed: int = 0, **options: Any) -> Linear4bit:
    return quantize_linear(nn.Linear(128, 64), weight(seed), **options)


def packed(seed: int = 0, **options: Any) -> PackedLinear:
    return pack_linear(nn.Linear(128, 64), quantize_matrix(weight(seed), "signed2", **options))


def eight_bit(seed: int = 0) -> nn.Module:
    return quantize_linear_int8(nn.Linear(128, 64), weight(seed))


MAKERS = [four_bit, packed, eight_bit]

# -- the fingerprint -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_is_the_same_in_every_storage_type(storage: torch.dtype) -> None:
    assert fingerprint({"a": four_bit(quant_storage=storage)}) == fingerprint({"a": four_bit()})


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU or build doesn't repack (no AVX512_BF16)")
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_is_the_same_after_a_forward_that_repacks(storage: torch.dtype) -> None:
    module = Linear4bit(128, 64, quant_type="nf4", quant_storage=storage).to("cpu").eval()
    before = fingerprint({"a": module})
    with torch.no_grad():
        module(torch.randn(1, 128))
    assert module.weight.quant_state.packing_format_for_cpu
    assert fingerprint({"a": module}) == before


@pytest.mark.slow
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("double_quant", [False, True])
def test_is_the_same_for_packed_layers_after_a_cast(cast: torch.dtype, double_quant: bool) -> None:
    model = nn.Sequential(packed(double_quant=double_quant), nn.Linear(64, 3))
    before = fingerprint({"0": model[0]})
    assert fingerprint({"0": model.to(cast)[0]}) == before


def test_is_the_same_for_dense_weights_held_in_float32_and_bfloat16() -> None:
    half = nn.Linear(128, 64).bfloat16()
    whole = nn.Linear(128, 64)
    whole.weight.data.copy_(half.weight.data)
    assert module_digest(half) == module_digest(whole)


@pytest.mark.parametrize("make", MAKERS)
def test_tells_weights_and_paths_apart(make: Any) -> None:
    same, other = fingerprint({"a": make(0)}), fingerprint({"a": make(1)})
    assert len(same) == 32
    assert same == fingerprint({"a": make(0)})
    assert len({same, other, fingerprint({"b": make(0)}), fingerprint({"a": make(0), "b": make(0)})}) == 4


def test_modules_are_not_exchangeable_and_their_order_is_nothing() -> None:
    first, second = packed(0), packed(1)
    assert fingerprint({"a": first, "b": second}) == fingerprint({"b": second, "a": first})
    assert fingerprint({"a": first, "b": second}) != fingerprint({"a": second, "b": first})


@pytest.mark.parametrize("make", [four_bit, packed, eight_bit])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_one_changed_region_of_the_codes_is_seen(make: Any, part: float) -> None:
    module = make()
    before = module_digest(module)
    flat = codec_for(module).stored(module)[0].view(-1)
    begin = int(part * len(flat))
    flat[begin : begin + len(flat) // 100 + 1] += 1
    assert module_digest(module) != before


def test_types_of_the_same_weight_differ() -> None:
    kinds = [four_bit(), four_bit(quant_type="fp4"), packed(), eight_bit(), nn.Linear(128, 64)]
    assert len({module_digest(module) for module in kinds}) == len(kinds)


# -- adapters that carry it ------------------------------------------------------------------------------------


def start(model: nn.Module, bits: int = 4, **options: Any) -> LoraModel:
    loftq = LoftQConfig(loftq_bits=bits, method="loftq")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=loftq, **options)
    return apply_lora(model, config).eval()


def stored_backbone(folder: Path) -> str | None:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return (file.metadata() or {}).get(METADATA_KEY)


@pytest.fixture(params=[2, 4, 8])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """adapter/ and base/ of a LoftQ start."""
    lora = start(llama(), request.param)
    lora.save_pretrained(tmp_path / "adapter")
    base = lora.unload()
    record_quantization_(base)
    base.save_pretrained(tmp_path / "base")
    return tmp_path


def another(bits_from: Path) -> nn.Module:
    """The same sizes quantized the same way, of other weights."""
    kind = LlamaForCausalLM.from_pretrained(bits_from / "base")
    bits = {"PackedLinear": 2, "Linear4bit": 4, "Linear8bitLt": 8}[type(kind.model.layers[0].mlp.up_proj).__name__]
    torch.manual_seed(5)
    model = LlamaForCausalLM(llama().config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return start(model, bits).unload()


@pytest.mark.slow
def test_a_loftq_adapter_carries_its_backbone_and_finds_it(saved: Path) -> None:
    carried = stored_backbone(saved / "adapter")
    assert carried is not None
    base = LlamaForCausalLM.from_pretrained(saved / "base")
    lora = LoraModel.from_pretrained(base, saved / "adapter")
    assert lora.backbones == {"default": carried}
    assert carried == fingerprint({path: layer.base_layer for path, layer in lora.adapter_layers().items()})


@pytest.mark.parametrize("which", ["dense", "other weights"])
@pytest.mark.slow
def test_other_bases_are_refused_and_left_alone(saved: Path, which: str) -> None:
    base = llama() if which == "dense" else another(saved)
    modules = dict(base.named_modules())
    bits = {name: tensor.clone() for name, tensor in base.state_dict().items() if isinstance(tensor, Tensor)}
    trained = {name: p.requires_grad for name, p in base.named_parameters()}
    with pytest.raises(StorageError, match=REFUSAL) as caught:
        LoraModel.from_pretrained(base, saved / "adapter")
    expected = stored_backbone(saved / "adapter")
    assert expected is not None
    assert expected[:12] in str(caught.value)
    assert {path: id(m) for path, m in base.named_modules()} == {path: id(m) for path, m in modules.items()}
    assert {name: p.requires_grad for name, p in base.named_parameters()} == trained
    state = base.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in bits.items())
    lora = LoraModel.from_pretrained(base, saved / "adapter", check_backbone=False)
    assert lora.backbones == {"default": expected}


@pytest.mark.slow
def test_adding_an_adapter_checks_too(saved: Path) -> None:
    lora = apply_lora(llama(), LoraConfig(r=4, target_modules="all-linear"))
    before = {path: id(layer) for path, layer in lora.adapter_layers().items()}
    with pytest.raises(StorageError, match=REFUSAL):
        lora.load_adapter(saved / "adapter", "second")
    assert sorted(lora.peft_config) == ["default"]
    assert {path: id(layer) for path, layer in lora.adapter_layers().items()} == before
    lora.load_adapter(saved / "adapter", "second", check_backbone=False)
    assert sorted(lora.peft_config) == ["default", "second"]
    kept = lora.adapter_layers()["model.layers.0.mlp.up_proj"].factors("default")[0].clone()
    with pytest.raises(StorageError, match=REFUSAL):
        lora.load_adapter(saved / "adapter", "default")  # which would overwrite it
    assert torch.equal(lora.adapter_layers()["model.layers.0.mlp.up_proj"].factors("default")[0], kept)


@pytest.mark.slow
def test_on_the_right_base_an_adapter_is_added(saved: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(saved / "base")
    lora = apply_lora(base, LoraConfig(r=4, target_modules="all-linear"))
    lora.load_adapter(saved / "adapter", "second")
    assert lora.backbones == {"second": stored_backbone(saved / "adapter")}
    lora.delete_adapter("second")
    assert lora.backbones == {}


@pytest.mark.slow
def test_a_loaded_adapter_is_saved_with_its_backbone(saved: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(saved / "base")
    LoraModel.from_pretrained(base, saved / "adapter").save_pretrained(saved / "again")
    assert stored_backbone(saved / "again") == stored_backbone(saved / "adapter")
    forced = LoraModel.from_pretrained(llama(), saved / "adapter", check_backbone=False)
    forced.save_pretrained(saved / "forced")
    assert stored_backbone(saved / "forced") == stored_backbone(saved / "adapter")


@pytest.mark.slow
def test_a_zero_start_carries_none_and_loads_anywhere(saved: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(saved / "base")
    lora = apply_lora(base, LoraConfig(r=4, target_modules="all-linear"))
    assert lora.backbones == {}
    lora.save_pretrained(saved / "zero")
    assert stored_backbone(saved / "zero") is None
    assert LoraModel.from_pretrained(llama(), saved / "zero").backbones == {}


def test_training_and_merging_leave_the_fingerprint(tmp_path: Path) -> None:
    lora = start(llama(), 2).train()
    before = dict(lora.backbones)
    lora(**batch()).loss.backward()
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    lora.merge_adapter()
    lora.unmerge_adapter()
    lora.save_pretrained(tmp_path)
    assert stored_backbone(tmp_path) == before["default"]


def test_peft_opens_the_file(saved: Path) -> None:
    peft_utils = pytest.importorskip("peft.utils.save_and_load")
    peft_config = pytest.importorskip("peft.config")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft_config.PeftConfig.from_pretrained(str(saved / "adapter"))
        state = peft_utils.load_peft_weights(str(saved / "adapter"), device="cpu")
    assert config.r == 4
    assert len(state) == 2 * 2 * 7
