"""A model's life on a GPU: loaded, moved, adapted, merged, saved, loaded again, generating."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from modules_on_device import LINEARS, STORED_BY_BITSANDBYTES, int8
from on_device import DEVICE, need_dtype
from tiny_llama import STORAGES, batch, load
from torch import Tensor, nn

from qlora_kit import LoraConfig, LoraModel, apply_lora, codec_for, merge, quantize_

pytestmark = pytest.mark.cuda
BITSANDBYTES = {"4-bit", "8-bit"}
every_storage = pytest.mark.parametrize("storage", [*STORAGES, "packed"])
casts = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")


def loaded(folder: Path, storage: str, dtype: torch.dtype = torch.float16) -> Any:
    """A small Llama, placed while it is loaded."""
    if storage in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    model: Any = load(folder, "dense" if storage == "packed" else storage, dtype, device_map=DEVICE)
    return quantize_(model, 2) if storage == "packed" else model


def adapted(model: nn.Module, seed: int = 1) -> LoraModel:
    torch.manual_seed(seed)
    return apply_lora(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def on_device(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def codes_of(lora: LoraModel) -> dict[str, list[Tensor]]:
    layers = lora.adapter_layers()
    return {path: [t.cpu().clone() for t in layer.codec.stored(layer.base_layer)] for path, layer in layers.items()}


def assert_same(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for path, tensors in expected.items():
        assert tensors
        assert all(torch.equal(one, two) for one, two in zip(found[path], tensors, strict=True)), path


@pytest.mark.parametrize("kind", [*LINEARS, "int8"])
def test_moves_keep_every_code(kind: str) -> None:
    if kind in [*STORED_BY_BITSANDBYTES, "int8"]:
        pytest.importorskip("bitsandbytes")
    module = int8(torch.float32) if kind == "int8" else LINEARS[kind](torch.float32)
    codec = codec_for(module)
    codes, weight = [t.clone() for t in codec.stored(module)], codec.read(module)
    for device in (DEVICE, "cpu", DEVICE):
        module = module.to(device)
        assert {t.device.type for t in codec.stored(module)} == {device}
        assert all(torch.equal(one.cpu(), two) for one, two in zip(codec.stored(module), codes, strict=True))
        read = codec.read(module)
        assert read.device.type == device
        torch.testing.assert_close(read.cpu(), weight, rtol=1e-6, atol=1e-8)  # double quantization's sums


@casts
@every_storage
def test_an_adapter_comes_back_from_its_file(storage: str, llama_dir: Path, tmp_path: Path) -> None:
    lora = adapted(loaded(llama_dir, storage))
    lora(**on_device(batch())).loss.backward()
    for name, parameter in lora.named_parameters():
        if parameter.requires_grad:
            assert parameter.device.type == DEVICE
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    lora.save_pretrained(tmp_path / "adapter")
    lora.eval()
    with torch.no_grad():
        expected = lora(**on_device(batch())).logits
        again = LoraModel.from_pretrained(loaded(llama_dir, storage), tmp_path / "adapter").eval()
        assert {p.device.type for n, p in again.named_parameters() if "lora_" in n} == {DEVICE}
        assert torch.equal(again(**on_device(batch())).logits, expected)


@casts
@every_storage
def test_unmerging_gives_every_bit_back(storage: str, llama_dir: Path) -> None:
    lora = adapted(loaded(llama_dir, storage)).eval()
    before = codes_of(lora)
    with torch.no_grad():
        apart = lora(**on_device(batch())).logits.float()
        lora.merge_adapter()
        merged = lora(**on_device(batch())).logits.float()
        lora.unmerge_adapter()
        again = lora(**on_device(batch())).logits.float()
    assert_same(codes_of(lora), before)
    assert torch.equal(again, apart)
    assert not torch.equal(merged, apart)
    if storage == "dense":
        assert ((merged - apart).norm() / apart.norm()).item() < 0.01  # float16 weights, and their products


@pytest.mark.parametrize("into", ["float16", "nf4", "signed2"])
@every_storage
def test_a_merge_has_the_cpus_weights(storage: str, into: str, llama_dir: Path) -> None:
    """But for values that lie as near to two levels, of which float32 sums in another order choose either."""
    if into == "nf4":
        pytest.importorskip("bitsandbytes")
    model = adapted(loaded(llama_dir, storage))
    twin = copy.deepcopy(model).to("cpu")
    found, expected = (merge(lora, into=into, force=True) for lora in (model, twin))
    assert [layer.path for layer in found.layers] == [layer.path for layer in expected.layers]
    for layer in found.layers:
        one, two = (report.model.get_submodule(layer.path) for report in (found, expected))
        weight, exact = codec_for(one).read(one).cpu(), codec_for(two).read(two)
        differ = ((weight - exact).abs() > 2e-3 * exact.abs().max()).double().mean().item()
        assert differ <= 2e-3, (layer.path, differ)


@casts
@pytest.mark.parametrize("storage", ["dense", "4-bit", "packed"])
def test_steps_with_a_cache_give_the_logits_of_the_whole(storage: str, llama_dir: Path) -> None:
    """One token at a time takes other kernels than many do."""
    lora = adapted(loaded(llama_dir, storage)).eval()
    ids = batch()["input_ids"][:1].to(DEVICE)
    with torch.no_grad():
        whole, cache, steps = lora(input_ids=ids).logits.float(), None, []
        for i in range(ids.shape[1]):
            out = lora(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits.float())
        found = torch.cat(steps, dim=1)
    assert ((found - whole).norm() / whole.norm()).item() < 0.01
    once, again = (lora.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for _ in range(2))
    assert once.shape == (1, ids.shape[1] + 8)
    assert torch.equal(once, again)
    assert torch.equal(once[:, : ids.shape[1]], ids)
    with lora.disable_adapter():
        base = lora(input_ids=ids).logits.float()
    assert ((base - whole).norm() / whole.norm()).item() > 0.01


@casts
@every_storage
def test_rows_with_adapters_of_their_own(storage: str, llama_dir: Path) -> None:
    """In one batch as with each adapter alone."""
    lora = adapted(loaded(llama_dir, storage)).eval()
    lora.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = batch()["input_ids"].to(DEVICE)
    with torch.no_grad():
        together = lora(input_ids=ids, adapter_names=["other", "default"]).logits.float()
        for row, name in enumerate(["other", "default"]):
            lora.set_adapter(name)
            alone = lora(input_ids=ids).logits[row].float()
            assert ((together[row] - alone).norm() / alone.norm()).item() < 0.01, name
            lora.set_adapter("default" if name == "other" else "other")
            assert ((lora(input_ids=ids).logits[row].float() - alone).norm() / alone.norm()).item() > 0.01, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_storage
@casts
def test_a_model_computes_as_on_the_cpu(storage: str, dtype: torch.dtype, llama_dir: Path) -> None:
    """Logits and gradients of half precision, against float32 on the CPU with the same codes."""
    need_dtype(dtype)
    lora = adapted(loaded(llama_dir, storage, dtype))
    twin = copy.deepcopy(lora).to("cpu").float()
    for module in twin.modules():
        if hasattr(module, "compute_dtype"):  # of k-bit linears
            module.compute_dtype = torch.float32
    results = []
    for model, tensors in ((lora, on_device(batch())), (twin, batch())):
        out = model(**tensors)
        out.loss.backward()
        grads = [p.grad.cpu().double().flatten() for p in model.parameters() if p.grad is not None]
        results.append((out.logits.detach().cpu().double(), torch.cat(grads)))
    bound = 0.05 if storage == "8-bit" else {torch.float16: 0.01, torch.bfloat16: 0.06}[dtype]
    for found, exact in zip(*results, strict=True):
        assert ((found - exact).norm() / exact.norm()).item() < bound
