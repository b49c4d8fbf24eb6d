"""A base that LoftQ quantized in memory, saved and loaded again by transformers alone; the adapter then fits it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import printed_by
from safetensors.torch import load_file
from tiny_llama import VOCABULARY, batch, llama
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora, codec_for
from qlora_kit.codecs.codebooks import scheme
from qlora_kit.codecs.packed import PackedLinear
from qlora_kit.config.loftq import DEFAULT_TYPES
from qlora_kit.errors import ConfigError, TargetError
from qlora_kit.hf_quantizer import PackedConfig, record_quantization_, skipped_modules

QUANTIZED = ("PackedLinear", "Linear4bit", "Linear8bitLt")
WAYS = [(2, False), (2, True), (3, False), (3, True), (4, False), (4, True), (8, False)]
LAYERS, LINEARS = 2, 7


def start(model: nn.Module, bits: int, targets: Any = "all-linear", **options: Any) -> LoraModel:
    loftq = LoftQConfig(loftq_bits=bits, loftq_iter=2, method="loftq", **options)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights="loftq", loftq_config=loftq)
    return apply_lora(model, config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**batch()).logits


def save(lora: LoraModel, folder: Path) -> nn.Module:
    lora.save_pretrained(folder / "adapter")
    base = lora.unload()
    record_quantization_(base)
    base.save_pretrained(folder / "base")
    return base


def quantized(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if type(module).__name__ in QUANTIZED}


def packed_base(folder: Path, llama_dir: Path, bits: int = 2, targets: Any = "all-linear", **options: Any) -> nn.Module:
    return save(start(AutoModelForCausalLM.from_pretrained(llama_dir), bits, targets, **options), folder)


# -- saved and loaded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "double_quant"), WAYS)
@pytest.mark.slow
def test_the_adapter_runs_on_the_reloaded_base_bit_for_bit(
    tmp_path: Path, llama_dir: Path, bits: int, double_quant: bool, dtype: torch.dtype, targets: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=dtype)
    lora = start(model, bits, targets, double_quant=double_quant)
    before = logits(lora)
    paths = set(quantized(save(lora, tmp_path)))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    assert set(quantized(base)) == paths, "what wasn't targeted stays dense"
    assert len(paths) == LAYERS * (LINEARS if targets == "all-linear" else 2)
    again = LoraModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), before)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_configuration_names_what_stays_dense(tmp_path: Path, llama_dir: Path, bits: int) -> None:
    base = packed_base(tmp_path, llama_dir, bits, ["q_proj", "v_proj"])
    stored = json.loads((tmp_path / "base/config.json").read_text())["quantization_config"]
    skipped = stored["llm_int8_skip_modules"]
    assert sorted(skipped) == sorted(skipped_modules(base, set(quantized(base))))
    assert len(skipped) == LAYERS * (LINEARS - 2) + 1
    assert "lm_head" in skipped


def test_a_skipped_path_that_ends_a_quantized_one_is_told_apart() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "deep": nn.ModuleDict({"proj": nn.Linear(2, 2)})})
    assert skipped_modules(model, {"deep.proj"}) == ["^proj$"]
    assert skipped_modules(model, {"proj"}) == ["deep.proj"]


@pytest.mark.parametrize("quant_type", ["signed2", "affine3", "lloyd2", "uniform4", "affine8", "trellis2", "trellis3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.slow
def test_a_half_precision_load_keeps_every_bit_of_the_scales(
    tmp_path: Path, llama_dir: Path, quant_type: str, dtype: torch.dtype, double_quant: bool
) -> None:
    base = packed_base(tmp_path, llama_dir, int(quant_type[-1]), quant_type=quant_type, double_quant=double_quant)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    before, after = quantized(base), quantized(loaded)
    for path, module in after.items():
        assert isinstance(module, PackedLinear)
        assert (module.quant_type, module.double_quant) == (quant_type, double_quant)
        assert module.compute_dtype == dtype
        expected = before[path].state_dict()
        assert module.state_dict().keys() == expected.keys()
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == expected[name].dtype in (torch.uint8, torch.float32), name
            assert torch.equal(tensor, expected[name]), name
        assert torch.equal(codec_for(module).read(module), codec_for(before[path]).read(before[path]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.filterwarnings("ignore:.*load report.*")
@pytest.mark.slow
def test_the_backbone_loads_without_its_head(tmp_path: Path, llama_dir: Path, bits: int) -> None:
    base = packed_base(tmp_path, llama_dir, bits)
    bare = AutoModel.from_pretrained(tmp_path / "base")
    found, expected = quantized(bare), quantized(base)
    assert {f"model.{path}" for path in found} == set(expected)
    for path, module in found.items():
        other = expected[f"model.{path}"]
        assert torch.equal(codec_for(module).read(module), codec_for(other).read(other))


def test_a_backbone_saved_alone_loads_with_a_head(tmp_path: Path, llama_dir: Path) -> None:
    base = packed_base(tmp_path, llama_dir).model
    record_quantization_(base)
    base.save_pretrained(tmp_path / "bare")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    assert len(quantized(whole)) == LAYERS * LINEARS
    assert torch.equal(whole.state_dict()["model.layers.1.mlp.up_proj.weight"], base.layers[1].mlp.up_proj.weight)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_layers_are_plain_and_hold_what_was_read(
    tmp_path: Path, llama_dir: Path, dtype: torch.dtype
) -> None:
    base = packed_base(tmp_path, llama_dir, 3)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).dequantize()
    assert not quantized(dense)
    for path, module in quantized(base).items():
        plain = dense.get_submodule(path)
        assert type(plain) is nn.Linear
        assert torch.equal(plain.weight, codec_for(module).read(module).to(dtype))
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again), logits(dense))


@pytest.mark.slow
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_loaded_model_is_saved_unchanged(tmp_path: Path, llama_dir: Path, double_quant: bool) -> None:
    packed_base(tmp_path, llama_dir, 2, double_quant=double_quant)
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.slow
def test_the_file_holds_no_more_than_codes_scales_and_tables(
    tmp_path: Path, llama_dir: Path, bits: int, double_quant: bool
) -> None:
    base = packed_base(tmp_path, llama_dir, bits, double_quant=double_quant)
    stored = load_file(tmp_path / "base/model.safetensors")
    for path, module in quantized(base).items():
        count = module.in_features * module.out_features
        blocks = -(-count // 64)
        scales = blocks + 4 * -(-blocks // 256) + 4 if double_quant else 4 * blocks
        tables = 2 if scheme(module.quant_type).scaling == "range" else 1
        held = {name: t for name, t in stored.items() if name.startswith(f"{path}.")}
        size = sum(tensor.nbytes for tensor in held.values())
        assert size == -(-count * bits // 8) + tables * scales + 4 * 2**bits


@pytest.mark.parametrize("bits", [2, 3])
def test_a_conv1d_model_reloads(tmp_path: Path, bits: int) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None, pad_token_id=0)).eval()
    lora = start(model, bits, ["c_attn", "c_fc", "mlp.c_proj"])
    before = logits(lora)
    save(lora, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert len(quantized(base)) == 2 * 3
    assert torch.equal(logits(LoraModel.from_pretrained(base, tmp_path / "adapter").eval()), before)


def test_modules_of_several_types_are_grouped(tmp_path: Path) -> None:
    model = llama()
    start(model, 2, ["q_proj"]).unload()
    start(model, 3, ["v_proj"], blocksize=32, double_quant=True).unload()
    record_quantization_(model)
    groups = model.config.quantization_config.groups
    assert [(g["quant_type"], g["blocksize"], g["double_quant"]) for g in groups] == [
        (DEFAULT_TYPES[2], 64, False),
        (DEFAULT_TYPES[3], 32, True),
    ]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))


def test_a_dense_model_is_left_without_a_configuration() -> None:
    model = llama()
    record_quantization_(model)
    assert getattr(model.config, "quantization_config", None) is None


# -- damaged folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.update(version=2), ConfigError, "expected version 1 .* found version 2; update qlora-kit"),
        (lambda c: c.update(rotation="x"), ConfigError, r"found version 1 and \['rotation'\]"),
        (lambda c: c["groups"][0].update(zero=1), ConfigError, "groups: expected the fields .* found .*'zero'"),
        (lambda c: c["groups"][0].pop("blocksize"), ConfigError, "groups: expected the fields"),
        (
            lambda c: c["groups"][0]["modules"].append("model.layers.7.mlp.up_proj"),
            TargetError,
            "expected a linear layer at 'model.layers.7.mlp.up_proj', found none in LlamaForCausalLM",
        ),
        (lambda c: c["groups"][0]["modules"].append("model.norm"), TargetError, "a linear layer at 'model.norm'"),
    ],
)
@pytest.mark.slow
def test_a_configuration_that_doesn_t_fit_is_named(
    tmp_path: Path, llama_dir: Path, change: Callable[[dict[str, Any]], Any], error: type[Exception], message: str
) -> None:
    packed_base(tmp_path, llama_dir)
    file = tmp_path / "base/config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def test_a_configuration_survives_its_dictionary() -> None:
    module = PackedLinear(64, 32, quant_type="signed3", double_quant=True)
    config = PackedConfig.of({"a.b": module})
    again = PackedConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert json.loads(json.dumps(config.to_dict()))["quant_method"] == "qlora_kit"


# -- peft ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("bits", [2, 4])
def test_peft_runs_the_adapter_on_the_reloaded_base(tmp_path: Path, bits: int) -> None:
    peft = pytest.importorskip("peft")
    lora = start(llama(intermediate_size=128), bits)  # rows of whole blocks, which bitsandbytes' CPU kernels want
    before = logits(lora)
    save(lora, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    # In training mode, dropout being 0: in evaluation bitsandbytes rounds a CPU's scales to bfloat16.
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).train()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)  # sums of products in another order


# -- registration ----------------------------------------------------------------------------------------------

KNOWN = "import transformers.quantizers.auto as auto; print('qlora_kit' in auto.AUTO_QUANTIZER_MAPPING)"
WAITING = "print(any(getattr(f, 'awaited', '') == 'transformers.quantizers.auto' for f in sys.meta_path))"


REGISTRATIONS = [
    (f"import qlora_kit; {KNOWN}; {WAITING}", "True False"),
    (f"import transformers, qlora_kit; {KNOWN}; {WAITING}", "True False"),
    (f"import transformers.quantizers.auto, qlora_kit; {KNOWN}; {WAITING}", "True False"),
    (f"import transformers; {KNOWN}", "False"),
    (f"import qlora_kit; print('transformers' in sys.modules); {WAITING}", "False True"),
    (f"import qlora_kit.hf_quantizer; {KNOWN}; {WAITING}", "True False"),
    (f"import qlora_kit, importlib; importlib.reload(qlora_kit); {KNOWN}; {WAITING}", "True False"),
    (f"import qlora_kit, importlib; {KNOWN}; importlib.reload(qlora_kit); {WAITING}", "True False"),
    (
        f"import qlora_kit; {KNOWN}; import importlib; importlib.reload(auto); print(auto.__spec__.loader)",
        "True <_frozen_importlib_external.SourceFileLoader",
    ),
]


@pytest.fixture(scope="module")
def registered() -> dict[str, str]:
    # What transformers loads of torch is most of its time, and not the question here.
    scripts = [f"import sys; {script}" for script, _ in REGISTRATIONS]
    return printed_by(scripts, ["torch", "torch.distributed.fsdp", "torch.distributed.tensor"])


@pytest.mark.parametrize(("script", "expected"), REGISTRATIONS)
@pytest.mark.slow
def test_transformers_learns_of_packed_models_whichever_comes_first(
    script: str, expected: str, registered: dict[str, str]
) -> None:
    assert " ".join(registered[f"import sys; {script}"].split()).startswith(expected)
