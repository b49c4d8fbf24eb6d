"""LoftQ starts computed on a GPU: as near to the weights as those of the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import DEVICE
from tiny_llama import llama
from torch import Tensor

import loftq
from loftq.disk.stream import stream
from loftq.disk.task import Task
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora
from qlora_kit.codecs import codec_for

pytestmark = pytest.mark.cuda
# Values between two levels fall either way by the order of float32 sums, and the alternation goes on from there.
RELATIVE = 2e-3


@pytest.mark.parametrize("method", ["loftq", "pissa"])
@pytest.mark.parametrize("solver", ["auto", "full", "krylov", "subspace"])
@pytest.mark.parametrize("kind", ["nf4", "signed2", "lloyd3", "int8"])
def test_one_weight(kind: str, solver: str, method: str) -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(2)) * 0.02
    options: dict[str, Any] = {"quant_type": kind, "steps": 3, "scaling": 2.0, "method": method, "solver": solver}
    cpu, gpu = loftq.factorize(weight, 8, **options), loftq.factorize(weight.to(DEVICE), 8, **options)
    assert {t.device.type for t in (gpu.A, gpu.B, gpu.quantized.codes)} == {DEVICE}
    assert gpu.error == pytest.approx(cpu.error, rel=RELATIVE)
    assert gpu.zero_error == pytest.approx(cpu.zero_error, rel=1e-5)
    # What is reported is what is returned: in float64, on the CPU.
    stored = gpu.quantized.dequantize().cpu().double()
    left = weight.double() - stored - 2.0 * gpu.B.cpu().double() @ gpu.A.cpu().double()
    assert (left.norm() / weight.double().norm()).item() == pytest.approx(gpu.error, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_model(bits: int) -> None:
    if bits in (4, 8):
        pytest.importorskip("bitsandbytes")
    dense = llama()
    weights = {path: module.weight.detach().double() for path, module in dense.named_modules() if is_linear(module)}
    settings = LoftQConfig(loftq_bits=bits, loftq_iter=3, method="loftq")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=settings)
    cpu, gpu = (apply_lora(copy.deepcopy(dense).to(device), config) for device in ("cpu", DEVICE))
    expected, found = errors(cpu, weights), errors(gpu, weights)
    assert len(found) == len(expected) == 14
    for path, error in expected.items():
        assert found[path] == pytest.approx(error, rel=RELATIVE), path
    assert {p.device.type for p in gpu.parameters()} == {DEVICE}


def test_a_stored_model_on_several_places_of_it(tmp_path: Path) -> None:
    """Layers take turns on the devices that they are spread over."""
    llama().save_pretrained(tmp_path / "source")
    settings = LoftQConfig(loftq_bits=2, loftq_iter=3, method="loftq")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=settings)
    cpu = stream(Task(tmp_path / "source", tmp_path / "cpu", config))
    places = (f"{DEVICE}:0", f"{DEVICE}:{max(torch.cuda.device_count(), 1) - 1}")
    found = stream(Task(tmp_path / "source", tmp_path / "gpu", config, device=places[0], devices=places))
    assert [row.path for row in found.layers] == [row.path for row in cpu.layers]
    for row, expected in zip(found.layers, cpu.layers, strict=True):
        assert row.error == pytest.approx(expected.error, rel=RELATIVE), row.path


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def errors(lora: LoraModel, weights: dict[str, Tensor]) -> dict[str, float]:
    """||W - Q - s B A|| / ||W|| by path, in float64."""
    found = {}
    for path, layer in lora.adapter_layers().items():
        stored = codec_for(layer.base_layer).read(layer.base_layer).cpu().double()
        A, B = (factor.detach().cpu().double() for factor in layer.factors("default"))
        left = weights[path] - stored - layer.scaling["default"] * B @ A
        found[path] = (left.norm() / weights[path].norm()).item()
    return found
