"""accelerate and transformers' Trainer with several processes: the engine is there, states hold the adapters alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jobs_of_accelerate as jobs
import pytest
import torch
from engine_models import BASES, adapted, batch, in_one_process
from processes import in_processes
from safetensors.torch import load_file

from qlora_kit import LoraModel

RUNS = [
    pytest.param(engine, kind, marks=pytest.mark.slow if (engine, kind) == ("fsdp2", "nf4") else pytest.mark.engines)
    for engine in ("ddp", "fsdp2")
    for kind in BASES
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accelerate")


@cache
def found(engine: str, quick: bool, folder: Path) -> list[dict[str, Any]]:
    kinds = ["nf4"] if quick else [k for k in BASES if (engine, k) != ("fsdp2", "nf4")]
    return in_processes(jobs.loop, engine=engine, kinds=kinds, folder=str(folder))


@pytest.fixture
def ranks(engine: str, kind: str, folder: Path) -> list[Any]:
    return [rank[kind] for rank in found(engine, (engine, kind) == ("fsdp2", "nf4"), folder)]


@pytest.mark.parametrize(("engine", "kind"), RUNS)
def test_a_loop_of_ones_own(engine: str, kind: str, ranks: list[Any], folder: Path) -> None:
    losses = in_one_process(kind, "copies")[0][:4]
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, abs=2e-3 if kind == "bf16" else 5e-6)
        assert rank["again"] == rank["losses"][2:]  # bit for bit
        assert rank["unwrapped"]
        assert rank[{"ddp": "ddp", "fsdp2": "fsdp"}[engine]]
        assert (rank["dtensors"] > 0) == (engine == "fsdp2")


@pytest.mark.parametrize(("engine", "kind"), RUNS)
def test_its_state_holds_the_adapters_alone(engine: str, kind: str, ranks: list[Any], folder: Path) -> None:
    for rank in ranks:
        assert sorted(rank["keys"]) == sorted(rank["own"])
    own, gathered = (
        load_file(folder / engine / kind / way / "adapter_model.safetensors") for way in ("adapter", "gathered")
    )
    assert own.keys() == gathered.keys()
    assert all(torch.equal(own[key], gathered[key]) for key in own)
    lora = LoraModel.from_pretrained(adapted(kind).unload(), folder / engine / kind / "adapter")
    with torch.no_grad():
        assert lora(input_ids=batch(0)).logits.isfinite().all()


@pytest.mark.engines
@pytest.mark.parametrize("kind", BASES)
def test_the_trainer(kind: str, tmp_path: Path) -> None:
    ranks = in_processes(jobs.trainer, kind=kind, folder=str(tmp_path))
    assert all(rank["ddp"] for rank in ranks)
    losses = in_one_process(kind, "copies")[0][:1]
    assert ranks[0]["losses"][0] == pytest.approx(losses[0], abs=2e-2)  # it logs four digits
    stored = load_file(tmp_path / "final" / "adapter_model.safetensors")
    for name, value in ranks[0]["adapter"].items():
        assert torch.equal(value, ranks[1]["adapter"][name])
    assert len(stored) == len(ranks[0]["adapter"])
    resumed = in_processes(jobs.trainer, kind=kind, folder=str(tmp_path), resume=True)
    for name, value in ranks[0]["adapter"].items():
        assert torch.equal(resumed[0]["adapter"][name], value), name
