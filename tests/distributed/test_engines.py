"""The engines train as one process does: losses and gathered gradients step by step, and the engine is really there."""

from __future__ import annotations

from functools import cache
from typing import Any

import jobs_of_engines as jobs
import pytest
import torch
from engine_models import BASES, in_one_process
from processes import in_processes
from torch import Tensor

pytestmark = pytest.mark.slow

#: Losses differ by the order of sums. In float32 that is the last bits of a number near 5; in a bfloat16 model a
#: product over half the rows rounds elsewhere, and ten steps carry it on.
LOSS = {"bf16": 2e-3}
#: Gradients, relative to the largest element of their tensor, for the same reasons.
GRADIENT = {"bf16": 0.15}
CASES = [(kind, "") for kind in BASES]


@cache
def expected(kind: str, case: str) -> tuple[list[float], list[dict[str, Tensor]], dict[str, Tensor]]:
    losses, gradients, lora, _ = in_one_process(kind, case)
    from qlora_kit.adapter_files.tensors import adapter_state

    return losses, gradients, adapter_state(lora)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    folder = tmp_path_factory.mktemp("engines")
    return request.param, in_processes(jobs.runs, engine=request.param, cases=CASES, folder=str(folder))


def check_training(ranks: list[Any], kind: str, case: str) -> None:
    losses, gradients, state = expected(kind, case)
    mean = torch.tensor([rank[kind, case][0] for rank in ranks]).mean(0)
    assert (mean - torch.tensor(losses)).abs().max() < LOSS.get(kind, 2e-6)
    for step, own in enumerate(gradients):
        for name, gradient in own.items():
            bound = GRADIENT.get(kind, 5e-5) * gradient.abs().max()
            for rank in ranks:
                other = rank[kind, case][1][step][name]
                assert other.shape == gradient.shape
                assert (other - gradient).abs().max() <= bound, f"step {step}, {name}"
    saved = ranks[0][kind, case][3]
    assert saved.keys() == state.keys()
    for key, value in state.items():
        assert saved[key].shape == value.shape
        assert saved[key].dtype == value.dtype


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_it_trains_as_one_process_does(found: tuple[str, list[Any]], kind: str, case: str) -> None:
    check_training(found[1], kind, case)


@pytest.mark.parametrize("kind", BASES)
def test_the_engine_is_there(found: tuple[str, list[Any]], kind: str) -> None:
    engine, ranks = found
    for rank in ranks:
        about = rank[kind, ""][2]
        assert about["is_lora"]
        if engine == "ddp":
            assert about["is_ddp"]
            assert about["model"] == "DistributedDataParallel"
            continue
        assert about["is_fsdp"]
        assert about["model"] == "FSDPLlamaForCausalLM"
        whole = [name for name in about["whole"] if not (kind == "int8" and "base_layer.weight" in name)]
        assert not whole
        for name, shape in about["shapes"].items():
            if name not in about["whole"] and shape[0] % 2 == 0:
                assert about["own"][name] * 2 == torch.Size(shape).numel(), name
