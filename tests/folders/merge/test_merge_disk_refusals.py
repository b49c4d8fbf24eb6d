"""What a merge on disk refuses, by name, with nothing half done; and what its check of the output finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_merges import gpt2, llama, on_disk, save_adapter, save_base, tensors
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import qlora_kit.folders.merge.run
from loftq.disk.stream import stream
from loftq.disk.task import Task
from qlora_kit import AdapterError, LoftQConfig, LoraConfig, MergeError, QLoRAKitError, StorageError
from qlora_kit.folders.merge.run import merge_folders

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def edited(adapter: Path, folder: Path, change: Any, **config: Any) -> Path:
    """A copy of ``adapter`` with its tensors (and config) changed."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    change(state)
    save_file({key: value.contiguous() for key, value in state.items()}, file, {"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


def refused(
    error: type[QLoRAKitError], match: str, base: Path, adapters: list[Path], out: Path, **options: Any
) -> None:
    with pytest.raises(error, match=match):
        on_disk(base, adapters, out, **options)
    assert not out.exists(), "nothing is left"


def test_options(bases: dict[str, Path], adapter: Path, second: Path, tmp_path: Path) -> None:
    base, out = bases["bfloat16"], tmp_path / "out"
    refused(MergeError, r"nothing to merge: expected at least one adapter", base, [], out)
    refused(MergeError, r"one stands twice", base, [adapter, adapter], out)
    refused(
        MergeError, r"expected one for each of the 2 adapters, found \[1\]", base, [adapter, second], out, weights=[1]
    )
    for weight in (0, float("nan"), True, "1"):
        refused(MergeError, r"expected a finite number other than 0", base, [adapter], out, weights=[weight])
    refused(MergeError, r"into='bf61': expected 'same' or one of.*closest are", base, [adapter], out, into="bf61")
    refused(MergeError, r"rounding='error-feedback': expected", base, [adapter], out, rounding="error-feedback")
    refused(MergeError, r"found 'scale-search'; leave rounding out", base, [adapter], out, rounding="scale-search")
    refused(MergeError, r"found none", base, [adapter], out, into="same", rounding="scale-search")
    with pytest.raises(StorageError, match=r"expected a folder of its own for the merged model"):
        on_disk(base, [adapter], adapter)
    refused(StorageError, r"base='nowhere': expected a folder or a repository", Path("nowhere"), [adapter], out)
    refused(StorageError, r"adapters='.*none': expected a folder or a repository", base, [tmp_path / "none"], out)


def test_embeddings_alone_can_t_be_merged_into_few_bits(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(bases["bfloat16"], tmp_path / "adapter", ["embed_tokens"])
    match = r"into='nf4': expected at least one adapted linear layer to quantize, found none"
    refused(MergeError, match, bases["bfloat16"], [adapter], tmp_path / "out", into="nf4")


def test_adapters_of_another_model(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    base, out = bases["bfloat16"], tmp_path / "out"

    def renamed(state: dict[str, Tensor]) -> None:
        for side in ("lora_A", "lora_B"):
            state[f"{Q.replace('q_proj', 'q_projj')}.{side}.weight"] = state.pop(f"{Q}.{side}.weight")

    def narrow(state: dict[str, Tensor]) -> None:
        state[f"{Q}.lora_A.weight"] = state[f"{Q}.lora_A.weight"][:, :32]

    def extra(state: dict[str, Tensor]) -> None:
        state["base_model.model.model.norm.weight"] = torch.ones(64)

    match = (
        r"found 2 that don't: \['.*q_projj.lora_A.weight', .*closest in the model: \['model.layers.0.self_attn.q_proj"
    )
    refused(StorageError, match, base, [edited(adapter, tmp_path / "renamed", renamed)], out)
    match = r"model.layers.0.self_attn.q_proj: expected factors of a \(64, 64\) weight \(out, in\), found \(4, 32\)"
    refused(StorageError, match, base, [edited(adapter, tmp_path / "narrow", narrow)], out)
    match = r"found 1 that don't: \['base_model.model.model.norm.weight'\]"
    refused(StorageError, match, base, [edited(adapter, tmp_path / "extra", extra)], out)


def test_values_that_aren_t_finite(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    base, out, path = bases["bfloat16"], tmp_path / "out", r"model\.layers\.0\.self_attn\.q_proj"

    def put(side: str, value: float) -> Any:
        def change(state: dict[str, Tensor]) -> None:
            state[f"{Q}.lora_{side}.weight"][0] = value

        return change

    nan = edited(adapter, tmp_path / "nan", put("A", float("nan")))
    refused(MergeError, rf"{path}: adapter .* holds NaN or infinite values", base, [nan], out)
    huge = edited(adapter, tmp_path / "huge", put("B", 3e38))
    refused(MergeError, rf"{path}: expected a finite merged weight", base, [huge], out, into="float32")
    large = edited(adapter, tmp_path / "large", put("B", 1e7))
    refused(MergeError, rf"{path}: .*finite in torch.float16", base, [large], out, into="float16")
    refused(MergeError, rf"{path}: .*finite in torch.float16|{path}: .*65504", base, [large], out, into="int8")
    on_disk(base, [large], out, into="bfloat16")


def test_an_unadapted_value_that_overflows(adapter: Path, tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    base = save_base(model, tmp_path / "base")
    match = r"model\.norm\.weight: a value overflows torch\.float16; merge into a wider dtype"
    refused(MergeError, match, base, [adapter], tmp_path / "out", into="float16")


def test_copies_and_biases(bases: dict[str, Path], gpt2_dir: Path, tmp_path: Path) -> None:
    base, out = bases["bfloat16"], tmp_path / "out"
    first = save_adapter(base, tmp_path / "first", ["q_proj"], modules_to_save=["lm_head"])
    other = save_adapter(base, tmp_path / "other", ["v_proj"], modules_to_save=["lm_head"], seed=2)
    head = save_adapter(base, tmp_path / "head", ["lm_head"])
    match = r"lm_head.weight: expected at most one adapter with its own tensor here, found .*first and .*other"
    refused(MergeError, match, base, [first, other], out)
    match = r"lm_head.weight: expected weight 1 for an adapter that trained this tensor whole, found 0.5"
    refused(MergeError, match, base, [first], out, weights=[0.5])
    refused(AdapterError, r"lm_head: expected a module that one adapter trains whole", base, [first, head], out)
    biases = save_adapter(gpt2_dir, tmp_path / "biases", ["c_attn"], bias="lora_only")
    refused(MergeError, r"c_attn.bias: expected weight 1", gpt2_dir, [biases], out, weights=[2.0])


@pytest.mark.slow
def test_the_base_that_an_adapter_makes_up_for(bases: dict[str, Path], tmp_path: Path) -> None:
    loftq = LoftQConfig(loftq_bits=4)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="loftq", loftq_config=loftq)
    quantized, out = tmp_path / "quantized", tmp_path / "out"
    stream(Task(bases["float32"], quantized, config))
    adapter = quantized / "loftq_init"
    match = r"expected the quantized base model .* found one in 16 or 32 bits .*check_backbone=False"
    refused(StorageError, match, bases["float32"], [adapter], out)
    match = r"expected the quantized base model .* found another .*check_backbone=False"
    refused(StorageError, match, bases["fp4-double"], [adapter], out)
    on_disk(bases["float32"], [adapter], out, check_backbone=False)
    on_disk(quantized, [adapter], tmp_path / "right")


def test_bases_that_can_t_be_read(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Any, source: str = "bfloat16") -> Path:
        folder = tmp_path / name
        shutil.copytree(bases[source], folder)
        change(folder)
        return folder

    def settings(**values: Any) -> Any:
        def change(folder: Path) -> None:
            found = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**found, **values}))

        return change

    def without(part: str) -> Any:
        def change(folder: Path) -> None:
            kept = {name: t for name, t in tensors(folder).items() if not name.endswith(part)}
            save_file(kept, folder / "model.safetensors", {"format": "pt"})

        return change

    out = tmp_path / "out"
    gptq = broken("gptq", settings(quantization_config={"quant_method": "gptq"}))
    refused(
        StorageError,
        r"quantized by one of \['bitsandbytes', 'qlora_kit'\], found quant_method='gptq'",
        gptq,
        [adapter],
        out,
    )
    other = broken("other", settings(intermediate_size=96))
    refused(
        StorageError,
        r"down_proj.weight: expected a tensor of shape \(64, 96\), as config.json says",
        other,
        [adapter],
        out,
    )
    lost = broken("lost", without("layers.0.self_attn.q_proj.weight"))
    match = (
        r"lost: expected all weights of a LlamaForCausalLM, found 1 missing \(model.layers.0.self_attn.q_proj.weight\)"
    )
    refused(StorageError, match, lost, [adapter], out)
    for name in (
        "norm.weight",
        "layers.1.input_layernorm.weight",
        "embed_tokens.weight",
        "layers.1.mlp.up_proj.weight",
    ):
        less = broken(f"without-{name}", without(f"model.{name}"))
        refused(StorageError, rf"found 1 missing \(model\.{name}\); finish the download", less, [adapter], out)
    for name, part, source in (("bnb", "weight.absmax", "nf4"), ("packed", ".scales", "nf3"), ("int8", ".SCB", "int8")):
        less = broken(name, without(part), source)
        refused(StorageError, r"q_proj|down_proj|tensor of a quantized one is missing", less, [adapter], out)
    unknown = broken("unknown", lambda folder: _rename(folder, "layers.0.mlp.up_proj", "layers.0.mlp.upp_proj"), "nf4")
    refused(
        StorageError, r"expected quantized tensors of modules that LlamaForCausalLM has, found", unknown, [adapter], out
    )
    refused(StorageError, r"expected config.json", tmp_path, [adapter], out)


def _rename(folder: Path, old: str, new: str) -> None:
    state = {name.replace(old, new): tensor for name, tensor in tensors(folder).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_tensors_that_the_model_has_no_name_for(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    """Kept under their names: floats in the dtype asked for."""
    base = tmp_path / "base"
    shutil.copytree(bases["bfloat16"], base)
    extra = {"model.layers.0.experts.3.w1.weight": torch.randn(8, 4), "model.counts": torch.arange(5)}
    save_file({**tensors(base), **extra}, base / "model.safetensors", {"format": "pt"})
    on_disk(base, [adapter], tmp_path / "out", into="bfloat16")
    found = tensors(tmp_path / "out")
    assert torch.equal(
        found["model.layers.0.experts.3.w1.weight"], extra["model.layers.0.experts.3.w1.weight"].bfloat16()
    )
    assert torch.equal(found["model.counts"], extra["model.counts"])


@pytest.mark.parametrize("into", ["bfloat16", "nf4"])
@pytest.mark.parametrize("what", ["a value", "a shape", "a name", "a tensor"])
@pytest.mark.slow
def test_what_was_written_is_read_back(
    what: str, into: str, bases: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards are changed between writing and checking."""
    verify, name = qlora_kit.folders.merge.run.verify_output, "model.layers.0.mlp.down_proj.weight"

    def tampered(plan: Any, out: Path, *arguments: Any) -> int:
        state = tensors(out)
        if what == "a value":
            state[name].view(torch.uint8).view(-1)[1] ^= 64
        elif what == "a shape":
            state[name] = state[name].view(-1, 2)
        elif what == "a name":
            state[name + "s"] = state.pop(name)
        else:
            del state[name]
        (out / "model.safetensors").unlink()
        save_file(state, out / "model.safetensors", {"format": "pt"})
        return verify(plan, out, *arguments)

    monkeypatch.setattr(qlora_kit.folders.merge.run, "verify_output", tampered)
    with pytest.raises(
        StorageError, match=r"expected (what the base|shape|the bytes|the \d+ tensors that were written)"
    ):
        on_disk(bases["bfloat16"], [adapter], tmp_path / "out", into=into)
    assert not (tmp_path / "out").exists()


def test_dtypes_of_parts_and_old_configs(adapter: Path, tmp_path: Path) -> None:
    """Older configs say ``torch_dtype``; nothing of it stays."""
    base = save_base(llama(), tmp_path / "base", "float32")
    settings = json.loads((base / "config.json").read_text())
    settings["torch_dtype"] = settings.pop("dtype")
    (base / "config.json").write_text(json.dumps(settings))
    merge_folders(base, [adapter], tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["dtype"], "torch_dtype" in found) == ("bfloat16", False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_transposed_factors_don_t_pass(gpt2_dir: Path, tmp_path: Path) -> None:
    adapter = save_adapter(gpt2_dir, tmp_path / "adapter", ["c_attn"])

    def swapped(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if "lora_A" in key]:
            other = key.replace("lora_A", "lora_B")
            state[key], state[other] = state[other].T, state[key].T

    bad = edited(adapter, tmp_path / "bad", swapped)
    refused(StorageError, r"c_attn: expected factors of a \(192, 64\) weight", gpt2_dir, [bad], tmp_path / "out")
    assert type(gpt2()).__name__ == "GPT2LMHeadModel"
