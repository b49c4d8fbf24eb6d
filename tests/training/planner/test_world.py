"""What a plan says that each of several GPUs holds and sends, beside what two processes do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs_of_world as jobs
import pytest
from processes import in_processes
from zoo import ZOO

from qlora_kit.training.planner.estimate import Estimator
from qlora_kit.training.planner.settings import Settings
from qlora_kit.training.planner.world import traffic

pytestmark = pytest.mark.slow
KINDS = [("fsdp2", 16), ("fsdp2", 4), ("fsdp2", 2), ("ddp", 16), ("ddp", 4), ("ddp", 2)]
# Pieces are filled up to whole rows, and tables of a few numbers aren't in a plan.
NEAR = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    ZOO["llama"].make().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> list[Any]:
    return in_processes(jobs.steps, folder=folder, kinds=KINDS)


@pytest.mark.parametrize(("engine", "bits"), KINDS)
def test_what_a_gpu_holds(engine: str, bits: int, folder: Path, measured: list[Any]) -> None:
    settings = Settings(bits=bits, rank=jobs.RANK, seq=jobs.SEQ, batch=jobs.BATCH, world_size=2, engine=engine)
    parts = Estimator(folder)(settings).parts
    weights = sum(parts.get(name, 0) for name in ("adapters", "frozen weights", "k-bit scales", "buffers"))
    for rank in measured:
        found = rank[engine, bits]
        assert (found["sharded"] > 0) == (engine == "fsdp2")
        assert weights == pytest.approx(found["weights"], rel=NEAR)
        assert parts["optimizer states"] == pytest.approx(found["states"], rel=NEAR)
        assert found["gradients"] == pytest.approx(parts["adapters"], rel=NEAR)


@pytest.mark.parametrize(("engine", "bits"), KINDS)
def test_what_a_gpu_sends(engine: str, bits: int, folder: Path, measured: list[Any]) -> None:
    settings = Settings(bits=bits, rank=jobs.RANK, seq=jobs.SEQ, batch=jobs.BATCH, world_size=2, engine=engine)
    expected = traffic(Estimator(folder).empty(settings), settings)
    for rank in measured:
        assert rank[engine, bits]["sent"].keys() == expected.keys()
        for what, count in expected.items():
            assert rank[engine, bits]["sent"][what] == pytest.approx(count, rel=NEAR), what


def test_a_model_that_is_cut(folder: Path, measured: list[Any]) -> None:
    size = {"rank": jobs.RANK, "seq": jobs.SEQ, "batch": jobs.BATCH}
    settings = Settings(bits=16, world_size=2, engine="tp", checkpointing=False, **size)
    estimator = Estimator(folder)
    parts, expected = estimator(settings).parts, traffic(estimator.empty(settings), settings)
    for rank in measured:
        found = rank["tp", 16]
        assert found["sharded"] > 0
        assert parts["frozen weights"] + parts["buffers"] == pytest.approx(found["weights"], rel=NEAR)
        assert found["sent"] == pytest.approx(expected, rel=NEAR)
