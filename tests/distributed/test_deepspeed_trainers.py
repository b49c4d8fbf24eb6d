"""DeepSpeed where accelerate, or transformers' Trainer, starts it: it is there, and trains as one process does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jobs_of_deepspeed as jobs
import pytest
import torch
from engine_models import BASES, adapted, base, in_one_process, of_parameter, optimizer, train, trained
from jobs_of_sharded_files import files_of
from processes import in_processes
from safetensors.torch import load_file
from test_engines import LOSS, without_deepspeed
from test_sharded_files import here

pytestmark = [pytest.mark.engines, without_deepspeed]

STAGES = (2, 3)
BY_TRAINER = ("float32", "nf4")
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


def is_there(stage: int, rank: dict[str, Any]) -> None:
    kind = {2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}[stage]
    assert (rank["engine"], rank["optimizer"]) == ("DeepSpeedEngine", kind)
    if stage == 3:
        assert rank["partitions"] == {
            name: -(-torch.Size(shape).numel() // 2) for name, shape in rank["shapes"].items()
        }
    else:
        assert not rank["partitions"]
        assert rank["trained"] <= 2 * rank["stepped"] <= rank["trained"] + 64  # half of it, filled up


# -- accelerate --------------------------------------------------------------------------------------------------


@cache
def looped(folder: Path) -> list[dict[jobs.Run, Any]]:
    runs = [(stage, kind) for stage in STAGES for kind in BASES]
    return in_processes(jobs.loop, runs=runs, folder=str(folder / "loop"), timeout=600)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_loop_of_ones_own(stage: int, kind: str, folder: Path) -> None:
    losses = in_one_process(kind, "copies")[0]
    for rank in (found[stage, kind] for found in looped(folder)):
        is_there(stage, rank)
        assert rank["processes"] == 2
        assert rank["unwrapped"]
        assert rank["losses"] == pytest.approx(losses[:4], abs=LOSS.get(kind, 2e-6))
        assert rank["again"] == rank["losses"][2:]  # bit for bit
        assert rank["state"] == sorted(rank["names"])  # the adapters alone
    place = folder / "loop" / f"{stage} {kind}"
    adapted(kind, "copies").save_pretrained(folder / "own" / kind)
    assert files_of(place / "begun") == files_of(folder / "own" / kind)
    own = (place / "adapter" / FILE).read_bytes()
    assert all((place / way / FILE).read_bytes() == own for way in ("again", "gathered"))
    go_on = here(place / "checkpoint", kind, 2, 2)  # in one process
    assert go_on == pytest.approx(losses[2:4], abs=LOSS.get(kind, 5e-6))


def test_accelerate_told_to_stay_on_a_cpu_leaves_deepspeed_out(folder: Path) -> None:
    """A surprise to notice the end of: docs/ENGINES.md says so."""
    assert [rank[0, "float32"] for rank in looped(folder)] == ["DistributedDataParallel"] * 2


def test_what_is_loaded_once_zero3_is_there(tmp_path: Path) -> None:
    """Of a dense model nothing is in one place; one that is quantized as it loads is whole, and trains."""
    base("float32").save_pretrained(tmp_path)
    lora = jobs.nf4_loaded(tmp_path)
    stepped = optimizer(list(trained(lora).values()))

    def step() -> None:
        stepped.step()
        stepped.zero_grad()

    losses = train(lora, lora, lambda loss: loss.backward(), step, of_parameter, steps=range(3))[0]
    for rank in in_processes(jobs.loaded_later, folder=str(tmp_path)):
        is_there(3, rank)
        assert rank["elements"] == 0
        assert all("load before TrainingArguments(deepspeed=...)" in said for said in rank["said"])
        assert rank["losses"] == pytest.approx(losses, abs=2e-6)
        assert (
            "expected a whole weight to round it with merge_aware, found one that DeepSpeed's ZeRO-3" in rank["aware"]
        )


# -- transformers' Trainer ---------------------------------------------------------------------------------------


@cache
def by_one(folder: Path) -> dict[jobs.Run, Any]:
    return in_processes(jobs.trainer, size=1, runs=[(0, kind) for kind in BY_TRAINER], folder=str(folder / "one"))[0]


@cache
def by_two(folder: Path, peft: bool) -> list[dict[jobs.Run, Any]]:
    runs = [(stage, kind) for stage in STAGES for kind in BY_TRAINER]
    place = str(folder / f"two {peft}")
    return in_processes(jobs.trainer, runs=runs, folder=place, peft=peft, timeout=600)


@pytest.mark.parametrize("peft", [True, False], ids=["with PEFT", "without PEFT"])
@pytest.mark.parametrize("kind", BY_TRAINER)
@pytest.mark.parametrize("stage", STAGES)
def test_the_trainer(stage: int, kind: str, peft: bool, folder: Path) -> None:
    expected = by_one(folder)[0, kind]
    for rank in (found[stage, kind] for found in by_two(folder, peft)):
        is_there(stage, rank)
        assert rank["losses"] == pytest.approx(expected["losses"], abs=5e-6)
        assert rank["again"] == rank["losses"][2:]
    place, one = folder / f"two {peft}" / f"{stage} {kind}", folder / "one" / f"0 {kind}"
    own = (place / "final" / FILE).read_bytes()
    assert all((place / way / FILE).read_bytes() == own for way in ("resumed", "final by every rank"))
    for part in ("checkpoint-2", "final"):
        stored, wanted = load_file(place / part / FILE), load_file(one / part / FILE)
        assert stored.keys() == wanted.keys()
        assert all((stored[key] - value).abs().max() < 1e-5 for key, value in wanted.items())
    assert (place / "checkpoint-2" / FILE).read_bytes() != own
