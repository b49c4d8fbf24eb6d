"""The engines train as one process does: losses and gathered gradients step by step, and the engine is really there."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import jobs_of_engines as jobs
import pytest
import torch
from engine_models import BASES, in_one_process, seed_of
from processes import in_processes
from torch import Tensor

from qlora_kit import set_branch
from qlora_kit.adapter_files.tensors import adapter_state

#: Losses differ by the order of sums. In float32 that is the last bits of a number near 5; in a bfloat16 model a
#: product over half the rows rounds elsewhere, and ten steps carry it on.
LOSS = {"bf16": 2e-3}
#: Gradients, relative to the largest element of their tensor, for the same reasons.
GRADIENT = {"bf16": 0.2}
#: Two adapters that aren't at zero, of one model: larger activations, of which the same share is rounded.
LARGER = {"two adapters": 10.0}

QUICK = [("ddp", "nf4", ""), ("fsdp2", "nf4", ""), ("fsdp2", "2-bit", ""), ("fsdp2", "bf16", "")]
QUICK += [("fsdp2", "nf4", "dropout checkpointing")]
HARD = ("embeddings", "tied embeddings", "copies", "two adapters", "checkpointing", "eval", "biases")
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
ALL = [(engine, kind, "") for engine in ENGINES for kind in BASES] + [
    (engine, kind, case) for engine in ("ddp", "fsdp2", "zero3") for kind in ("float32", "nf4") for case in HARD
]
DROPOUT = [
    (engine, kind, case)
    for engine in ENGINES
    for kind in ("float32", "nf4")
    for case in ("dropout", "dropout checkpointing")
]
ALL += DROPOUT
ALL += [(engine, kind, "merge-aware") for engine in ("ddp", "fsdp2", "zero2") for kind in ("nf4", "2-bit")]
without_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install --no-build-isolation '.[deepspeed]'"
)


def marked(run: jobs.Run) -> Any:
    marks = [pytest.mark.slow if run in QUICK else pytest.mark.engines]
    if run[0].startswith("zero"):
        marks.append(without_deepspeed)
    return pytest.param(run, marks=marks, id=" ".join(run).strip())


RUNS = [marked(run) for run in ALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("engines"))


@cache
def found(group: str, folder: str) -> list[Any]:
    cases = QUICK if group == "quick" else [run for run in ALL if run not in QUICK and run[0] == group]
    return in_processes(jobs.runs, cases=cases, folder=folder, timeout=900)


@pytest.fixture
def ranks(run: jobs.Run, folder: str) -> list[Any]:
    """What each rank has of ``run``; those of one engine are done by the same processes."""
    return [rank[run] for rank in found("quick" if run in QUICK else run[0], folder)]


@cache
def expected(kind: str, case: str, branch: str) -> tuple[list[float], list[dict[str, Tensor]], dict[str, Tensor]]:
    with set_branch(branch):
        losses, gradients, lora, _ = in_one_process(kind, case)
    return losses, gradients, adapter_state(lora)


def branch_of(engine: str, case: str) -> str:
    """The form that draws the masks which the engine's draws: another form has others of the same seed."""
    return "plain" if engine == "zero3" and "dropout" in case else "auto"


@pytest.mark.filterwarnings("ignore:.*tied to lm_head:UserWarning")
@pytest.mark.parametrize("run", RUNS)
def test_it_trains_as_one_process_does(run: jobs.Run, ranks: list[Any]) -> None:
    engine, kind, case = run
    losses, gradients, state = expected(kind, case, branch_of(engine, case))
    mean = torch.tensor([rank[0] for rank in ranks]).mean(0)
    assert (mean - torch.tensor(losses)).abs().max() < LOSS.get(kind, 2e-6)
    for step, own in enumerate(gradients):
        for name, gradient in own.items():
            bound = GRADIENT.get(kind, 5e-5) * LARGER.get(case, 1.0) * gradient.abs().max()
            for rank in ranks:
                other = rank[1][step][name]
                assert other.shape == gradient.shape
                assert (other - gradient).abs().max() <= bound, f"step {step}, {name}"
    saved = ranks[0][3]
    assert saved.keys() == state.keys()
    assert all(saved[key].shape == value.shape and saved[key].dtype == value.dtype for key, value in state.items())
    # AdamW moves by at most the learning rate a step, and so far apart rounding takes them at most.
    bound = 0.02 if kind == "bf16" else 1e-4
    assert all((saved[key] - value).abs().max() < bound for key, value in state.items())


@pytest.mark.parametrize("run", RUNS)
def test_whole_copies_are_equal_to_the_bit(run: jobs.Run, ranks: list[Any]) -> None:
    own, other = (rank[4] for rank in ranks)
    assert bool(own) == (run[0] in ("ddp", "zero2"))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("run", [marked(run) for run in DROPOUT])
def test_ranks_drop_out_by_masks_of_their_own(run: jobs.Run, ranks: list[Any]) -> None:
    """The bound of ``test_it_trains_as_one_process_does`` tells these masks from one rank's for all rows."""
    engine, kind, case = run
    own = ranks[0][1][0]
    with set_branch(branch_of(engine, case)):
        _, (first, *_), _, _ = in_one_process(kind, case, seeds=[seed_of(0)] * 2)
    assert all((own[name] - same).abs().max() > 1e-2 * same.abs().max() for name, same in first.items())


@pytest.mark.parametrize("run", RUNS)
def test_the_engine_is_there(run: jobs.Run, ranks: list[Any]) -> None:
    engine, kind, _ = run
    for rank in ranks:
        about = rank[2]
        assert about["is_lora"]
        IS_THERE[engine](about, kind)


def ddp_is_there(about: dict[str, Any], kind: str) -> None:
    assert about["is_ddp"]
    assert about["model"] == "DistributedDataParallel"


def fsdp2_is_there(about: dict[str, Any], kind: str) -> None:
    assert about["is_fsdp"]
    assert about["model"] == "FSDPLlamaForCausalLM"
    assert all(kind == "int8" and name.endswith("base_layer.weight") for name in about["whole"])
    for name, shape in about["shapes"].items():
        if name not in about["whole"] and shape[0] % 2 == 0:
            assert about["own"][name] * 2 == torch.Size(shape).numel(), name


def zero2_is_there(about: dict[str, Any], kind: str) -> None:
    assert (about["model"], about["optimizer"]) == ("DeepSpeedEngine", "DeepSpeedZeroOptimizer")
    assert not about["partitions"]
    assert about["trained"] <= 2 * about["stepped"] <= about["trained"] + 64  # half of it, filled up


def zero3_is_there(about: dict[str, Any], kind: str) -> None:
    assert (about["model"], about["optimizer"]) == ("DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3")
    assert about["partitions"].keys() == about["shapes"].keys()
    for name, shape in about["shapes"].items():
        assert about["own"][name] == 0, name
        assert about["partitions"][name] == -(-torch.Size(shape).numel() // 2)


IS_THERE = {"ddp": ddp_is_there, "fsdp2": fsdp2_is_there, "zero2": zero2_is_there, "zero3": zero3_is_there}
