"""Adapters and checkpoints of models in pieces: the files are those of one process, and half ones are refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jobs_of_sharded_files as jobs
import pytest
import torch
from engine_models import BASES, adapted, batch, optimizer, trained
from processes import ProcessesError, in_processes
from test_engines import without_deepspeed

from qlora_kit import LoraModel, merge
from qlora_kit.distributed import load_checkpoint

ENGINES = [
    pytest.param("fsdp2", marks=pytest.mark.slow),
    pytest.param("zero3", marks=[pytest.mark.engines, without_deepspeed]),
]
CASE = "copies biases two adapters"
KINDS = ["nf4"]


@cache
def found(engine: str, folder: Path) -> list[dict[str, Any]]:
    return in_processes(jobs.saves, engine=engine, kind="nf4", folder=str(folder / engine), patience=jobs.PATIENCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture
def ranks(engine: str, folder: Path) -> list[dict[str, Any]]:
    (folder / engine).mkdir(exist_ok=True)
    return found(engine, folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_files_are_those_of_one_process(engine: str, ranks: Any, folder: Path, tmp_path: Path) -> None:
    whole = adapted("nf4", CASE)
    whole.save_pretrained(tmp_path / "own")
    expected = jobs.files_of(tmp_path / "own")
    for way in ("all", "first", "after"):
        files = jobs.files_of(folder / engine / way)
        files.pop("model.safetensors", None)
        assert files == expected, way
    loaded = jobs.files_of(folder / engine / "loaded")  # after two steps, an evaluation, and the file loaded again
    assert loaded["adapter_model.safetensors"] == expected["adapter_model.safetensors"]
    assert loaded["second/adapter_model.safetensors"] != expected["second/adapter_model.safetensors"]
    whole.save_pretrained(tmp_path / "trainer", is_main_process=True, state_dict=None)
    assert jobs.files_of(folder / engine / "trainer") == jobs.files_of(tmp_path / "trainer")


@pytest.mark.parametrize("engine", ENGINES)
def test_half_an_adapter_is_refused(engine: str, ranks: Any, folder: Path) -> None:
    assert "missing or empty or in part" in ranks[0]["partial"]  # the others don't write, and needn't look
    assert "lora_A" in ranks[0]["partial"]
    assert ("stage3_gather_16bit_weights_on_model_save" in ranks[0]["empty"]) == (engine == "zero3")
    assert "expected all of the processes [0, 1] to call it" in ranks[0]["alone"]
    assert f"found that [1] didn't within {jobs.PATIENCE} s" in ranks[0]["alone"]
    assert not (folder / engine / "partial").exists()
    assert not (folder / engine / "alone").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_needs_whole_weights_says_what_to_do(engine: str, ranks: Any, folder: Path) -> None:
    for rank in ranks:
        for merged in (rank["merge"], rank["merge_adapter"]):
            assert "sharded by" in merged
            assert "save_pretrained, on every rank" in merged
        assert "add every adapter before the model is sharded" in rank["add"]
        assert "compute as the base does in `with lora.disable_adapter()`" in rank["unload"]
        assert "leave it out with set_adapter" in rank["delete"]
        assert all(0 < loss < 10 for loss in rank["losses"])  # it trains on


@pytest.mark.parametrize("engine", ENGINES)
def test_switched_off_it_is_the_base(engine: str, ranks: Any, folder: Path) -> None:
    """Trained biases and copies included; and switched on it is as before."""
    base = adapted("nf4", CASE).unload().eval()
    with torch.no_grad():
        expected = base(input_ids=batch(0)).logits
    for rank in ranks:
        assert torch.equal(rank["off"], expected)
        assert torch.equal(rank["on"], rank["on again"])
        assert (rank["on"] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_saved_merges_in_one_process(engine: str, ranks: Any, folder: Path) -> None:
    base = adapted("nf4", "biases").unload()
    report = merge(LoraModel.from_pretrained(base, folder / engine / "all"), into="float32")
    own = adapted("nf4", CASE)
    own.set_adapter("default")
    expected = merge(own, into="float32")
    with torch.no_grad():
        assert torch.equal(report.model(input_ids=batch(0)).logits, expected.model(input_ids=batch(0)).logits)


@pytest.mark.engines
@pytest.mark.parametrize(
    "engine", ["ddp", "fsdp2", *(pytest.param(each, marks=without_deepspeed) for each in ("zero2", "zero3"))]
)
def test_every_base_is_saved_and_merged(engine: str, tmp_path: Path) -> None:
    """In the processes themselves where each has the model whole, else by the saved adapter in one."""
    ranks = in_processes(jobs.saves_and_merges, engine=engine, kinds=list(BASES), folder=str(tmp_path))
    for kind in BASES:
        adapted(kind, "copies").save_pretrained(tmp_path / "own", is_main_process=True)
        assert jobs.files_of(tmp_path / kind / "begun") == jobs.files_of(tmp_path / "own"), kind
        lora = LoraModel.from_pretrained(adapted(kind, "copies").unload(), tmp_path / kind / "stepped")
        with torch.no_grad():
            expected = merge(lora, into="float32").model(input_ids=batch(0)).logits
        for rank in ranks:
            if engine in ("fsdp2", "zero3"):
                assert "sharded by" in rank[kind]
            else:
                assert torch.equal(rank[kind], expected), kind
    for rank in ranks:  # FSDP2 has all of them in pieces, and its loop an optimizer of its own
        later = "expected the parameters to train that trained when"
        assert (later in rank["chosen later"]) == (engine != "fsdp2"), rank["chosen later"]
        assert engine != "fsdp2" or not rank["chosen later"]


# -- checkpoints -----------------------------------------------------------------------------------------------


def here(folder: Path, kind: str, steps: int, more: int) -> list[float]:
    """Go on from ``folder`` in one process."""
    lora = adapted(kind, "copies", seed=99)
    stepped = optimizer(list(trained(lora).values()))
    load_checkpoint(folder, lora, stepped)
    losses = []
    for i in range(more):
        ids = batch(steps + i)
        loss = lora(input_ids=ids, labels=ids).loss
        loss.backward()
        stepped.step()
        stepped.zero_grad()
        losses.append(loss.item())
    return losses


ZERO = [pytest.mark.engines, without_deepspeed]
SAVED = [
    pytest.param("fsdp2", "nf4", ["ddp", "fsdp2"], marks=pytest.mark.engines),
    pytest.param("ddp", "float32", ["fsdp2"], marks=pytest.mark.engines),
    pytest.param("fsdp2", "int8", ["fsdp2"], marks=pytest.mark.engines),
    pytest.param("fsdp2", "2-bit", ["fsdp2"], marks=pytest.mark.engines),
    pytest.param("fsdp2", "bf16", ["fsdp2"], marks=pytest.mark.engines),
    *(pytest.param(e, "nf4", ["fsdp2", "zero2", "zero3"], marks=ZERO) for e in ("zero2", "zero3")),
    *(pytest.param("zero3", kind, ["zero3"], marks=ZERO) for kind in ("float32", "bf16", "int8", "2-bit")),
    *(pytest.param("zero2", kind, ["zero2"], marks=ZERO) for kind in ("float32", "bf16", "int8", "2-bit")),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_goes_on(engine: str, ranks: Any, folder: Path) -> None:
    assert here(folder / engine / "step-3", "nf4", 3, 2) == pytest.approx(ranks[0]["next"], abs=5e-6)


@pytest.mark.parametrize(("engine", "kind", "others"), SAVED)
def test_it_goes_on_with_any_engine_and_number_of_processes(
    engine: str, kind: str, others: list[str], tmp_path: Path
) -> None:
    """Two processes stop after three steps; what one process, three, and others of two do next is what they would."""
    folder = tmp_path / "step-3"
    told = {"kind": kind, "folder": str(folder), "steps": 3, "more": 2}
    losses = in_processes(jobs.trains_and_saves, engine=engine, **told)[0]
    bound = 2e-3 if kind == "bf16" else 5e-6  # sums of other orders, as in test_engines
    assert here(folder, kind, 3, 2) == pytest.approx(losses, abs=bound)
    for other in others:
        size = 2 if other == "ddp" else 4
        resumed = in_processes(jobs.resumes, size=size, engine=other, early=other != "zero2", **told)[0]
        assert resumed == pytest.approx(losses, abs=bound), other


@pytest.mark.parametrize("when", [pytest.param("step", marks=pytest.mark.engines), "checkpoint"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_that_dies_loses_no_checkpoint(engine: str, when: str, tmp_path: Path) -> None:
    with pytest.raises(ProcessesError):
        in_processes(jobs.dies, engine=engine, when=when, folder=str(tmp_path), patience=20, timeout=240)
    assert not (tmp_path / "step-2").exists()
    lora = adapted("nf4", seed=99)
    load_checkpoint(tmp_path / "step-1", lora, optimizer(list(trained(lora).values())))
    if (tmp_path / "said").exists():  # unless the launcher was quicker
        assert (tmp_path / "said").read_text()
