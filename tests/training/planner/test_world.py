"""What a plan says that each of several GPUs holds and sends, beside what two processes do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs_of_world as jobs
import pytest
from folders import config_folder
from processes import in_processes
from tiny_llama import llama
from typer.testing import CliRunner
from zoo import ZOO

from qlora_kit.cli import app
from qlora_kit.errors import ConfigError
from qlora_kit.training.planner import plan_memory
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


@pytest.mark.engines
@pytest.mark.parametrize("stage", [2, 3])
def test_what_a_gpu_holds_by_deepspeed(stage: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    size: dict[str, Any] = {"dtype": "float32", "rank": jobs.RANK, "seq": jobs.SEQ, "batch": jobs.BATCH}
    size["targets"] = ("q_proj", "v_proj")
    parts = Estimator(folder)(Settings(bits=16, world_size=2, engine=f"zero{stage}", **size)).parts
    for found in in_processes(jobs.step_by_zero, stage=stage, folder=folder):
        assert parts["adapters"] + parts["frozen weights"] == pytest.approx(found["weights"], rel=NEAR)
        assert parts["optimizer states"] == pytest.approx(found["states"], rel=NEAR)


def test_more_gpus_hold_less_each(tmp_path: Path) -> None:
    folder = tmp_path / "heads for eight"
    llama(num_attention_heads=8, num_key_value_heads=8).save_pretrained(folder)
    size = {"rank": 4, "seq": 64}
    alone = plan_memory(folder, **size)
    assert alone.traffic == {}
    for engine in ("fsdp2", "zero3", "tp"):
        two, eight = (plan_memory(folder, world_size=count, engine=engine, **size) for count in (2, 8))
        weights = [plan.estimate.parts["frozen weights"] for plan in (two, eight)]
        assert weights[0] > weights[1]
        assert sum(eight.traffic.values()) > sum(two.traffic.values())
        assert two.to_dict()["traffic"] == two.traffic
        assert f"on 8 GPUs by {engine}" in str(eight)
        assert "each of the 8 GPUs sends" in str(eight)
    ddp = plan_memory(folder, world_size=8, engine="ddp", **size)
    assert ddp.estimate.parts["frozen weights"] > two.estimate.parts["frozen weights"], (
        "which is of the last engine, tp"
    )


def test_only_what_is_cut_before_it_is_quantized_has_its_scales_cut(folder: Path) -> None:
    parts = {
        engine: plan_memory(folder, rank=4, seq=64, world_size=2, engine=engine).estimate.parts["k-bit scales"]
        for engine in ("ddp", "fsdp2", "zero3", "tp")
    }
    assert parts["ddp"] == parts["fsdp2"] == parts["zero3"]
    assert parts["tp"] == pytest.approx(parts["ddp"] / 2, rel=0.01)


def test_sharing_out_is_offered_where_it_saves(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, "llama", layers=16)
    size = {"rank": 4, "seq": 64, "bits": 16, "chunked_loss": True, "optimizer": "sgd"}
    ddp = plan_memory(folder, world_size=8, **size)
    tight = plan_memory(folder, world_size=8, memory=ddp.total - 1 + 3 * 2**28, **size)
    offered = next(change for change in tight.changes if "engine" in change.options)
    assert offered.options == {"engine": "fsdp2"}
    assert offered.total == plan_memory(folder, world_size=8, engine="fsdp2", **size).total


def test_what_cannot_be_shared_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine: expected one of .*found 'fsdp'; did you mean 'fsdp2'"):
        plan_memory(folder, engine="fsdp")
    with pytest.raises(ConfigError, match="world_size: expected an integer of at least 1, found 0"):
        plan_memory(folder, world_size=0)
    bert = config_folder(tmp_path, "bert")
    with pytest.raises(ConfigError, match=r"engine: expected a model that transformers has a plan of .*engine='fsdp2'"):
        plan_memory(bert, rank=4, seq=64, world_size=2, engine="tp")
    heads = r"world_size: expected a number of GPUs that divides the 2 heads .*found 3; pass world_size=2"
    with pytest.raises(ConfigError, match=heads):
        plan_memory(folder, rank=4, seq=64, world_size=3, engine="tp")


def test_the_command(folder: Path) -> None:
    words = f"plan --model {folder} --rank 4 --seq 64 --world-size 4 --engine zero3".split()
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 0, outcome.output
    assert "each of the 4 GPUs sends" in outcome.output
