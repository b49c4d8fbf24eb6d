"""What a plan answers, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from folders import config_folder
from typer.testing import CliRunner

from qlora_kit.cli import app
from qlora_kit.errors import ConfigError, StorageError, TargetError
from qlora_kit.training.planner import MemoryPlan, Settings, plan_memory
from qlora_kit.training.planner.cards import CARDS, CONTEXT, card_named
from qlora_kit.training.planner.search import largest

SIZE = {"rank": 4, "seq": 64, "batch": 2}
pytestmark = pytest.mark.slow  # each plan runs a dozen steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config_folder(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def plan(folder: Path) -> MemoryPlan:
    return plan_memory(folder, gpu="t4", memory=CONTEXT + 2**24, compare=True, **SIZE)


def test_it_is_a_table_and_plain_data(plan: MemoryPlan, tmp_path: Path) -> None:
    text = str(plan)
    assert all(name in text for name in plan.estimate.parts)
    assert f"{plan.estimate.preparing:,}" in next(line for line in text.splitlines() if "while it is prepared" in line)
    assert "t4 has no bfloat16" in text
    assert plan.settings.dtype == "float16"
    assert plan.fits
    assert sum(plan.to_dict()["parts"].values()) == plan.total
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["total"] == plan.total


def test_fewer_bits_take_less(plan: MemoryPlan) -> None:
    assert plan.by_bits is not None
    totals = [plan.by_bits[bits] for bits in (4, 3, 2)]
    assert totals == sorted(totals, reverse=True)
    assert plan.by_bits[4] == plan.total


def test_the_largest_fit_and_the_next_do_not(folder: Path) -> None:
    plan = plan_memory(folder, **SIZE)
    memory = int(plan.total * 2.5) + CONTEXT
    fitted = plan_memory(folder, memory=memory, **SIZE)
    assert fitted.largest is not None
    assert fitted.largest >= 2
    room = memory - CONTEXT
    assert plan_memory(folder, **{**SIZE, "batch": fitted.largest}).total <= room
    assert plan_memory(folder, **{**SIZE, "batch": fitted.largest + 2}).total > room
    assert fitted.longest == 128  # the model has no more places


def test_changes_are_what_they_say(folder: Path) -> None:
    settings = {**SIZE, "checkpointing": False, "attention": "eager"}
    asked = plan_memory(folder, **settings)
    plan = plan_memory(folder, memory=asked.total * 3 // 4 + CONTEXT, **settings)
    assert not plan.fits
    assert {"attention", "checkpointing", "batch", "bits"} <= {name for c in plan.changes for name in c.options}
    for change in plan.changes:
        alone = plan_memory(folder, **{**settings, **change.options})
        assert alone.total == change.total == asked.total - change.saves
    assert plan.way
    made = {name: value for change in plan.way for name, value in change.options.items()}
    assert plan_memory(folder, **{**settings, **made}).total == plan.then <= asked.total * 3 // 4
    assert "to make it fit" in str(plan)


def test_a_chunked_loss_is_offered_where_it_saves(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, "llama", vocab_size=8192)
    size = {**SIZE, "batch": 3, "bits": 2}
    plan = plan_memory(folder, memory=plan_memory(folder, **size).total - 1 + CONTEXT, **size)
    assert plan.changes[0].options == {"chunked_loss": True}
    assert plan.way == plan.changes[:1]


def test_where_nothing_helps(folder: Path) -> None:
    least = {"bits": 2, "optimizer": "sgd", "chunked_loss": True, "batch": 1}
    plan = plan_memory(folder, memory=CONTEXT + 1000, **{**SIZE, **least})
    assert (plan.longest, plan.largest, plan.way) == (0, 0, ())
    assert "nothing here makes it fit" in str(plan)


def test_a_batch_more_and_dropout_and_accumulation_cost(folder: Path) -> None:
    base = plan_memory(folder, **SIZE).total
    for more in ({"batch": 3}, {"dropout": 0.1}, {"accumulation": 2}, {"rank": 8}):
        assert plan_memory(folder, **{**SIZE, "checkpointing": False, **more}).total > base
    assert plan_memory(folder, optimizer="paged-adamw", **SIZE).estimate.paged > 0


def test_a_merge_that_is_trained_for_costs_its_weights(folder: Path) -> None:
    without = plan_memory(folder, **SIZE)
    asked = plan_memory(folder, merge_aware="NF4", compare=True, **SIZE)
    kept = asked.estimate.parts["weights as they will be merged"]
    assert kept > without.estimate.parts["k-bit weights"]
    assert asked.total - without.total == pytest.approx(kept, rel=0.1)
    assert "trained for a merge into nf4" in str(asked)
    assert asked.by_bits is not None
    assert asked.by_bits[2] < asked.total
    same = plan_memory(folder, merge_aware="same", compare=True, **SIZE)
    assert same.by_bits is not None
    assert same.by_bits[16] == plan_memory(folder, bits=16, **SIZE).total  # there nothing is rounded
    assert same.by_bits[4] == asked.by_bits[4] == asked.total
    tight = plan_memory(folder, merge_aware="nf4", memory=without.total + CONTEXT, **SIZE)
    assert {"merge_aware": None} in [change.options for change in tight.changes]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge_aware": "nf5"}, "merge_aware: expected 'same' or one of"),
        ({"dropout": 0.1}, "dropout: expected 0 with merge_aware"),
        ({"world_size": 2, "engine": "zero3"}, "engine: expected one that leaves"),
        ({"world_size": 2, "engine": "tp"}, "engine: expected one that leaves"),
    ],
)
def test_merges_that_cannot_be_trained_for(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_memory(folder, **{**SIZE, "merge_aware": "nf4", **settings})


def test_a_merge_into_16_bits_rounds_nothing(folder: Path) -> None:
    with pytest.raises(TargetError, match="merge_aware='same'"):
        plan_memory(folder, bits=16, merge_aware="same", **SIZE)


def test_an_encoder_is_planned_too(tmp_path: Path) -> None:
    plan = plan_memory(config_folder(tmp_path, "bert", layers=4), **SIZE)
    assert plan.estimate.parts["activations, kept for the backward"] > 0
    assert "logits and loss" not in plan.estimate.parts


def test_images_are_planned_too(tmp_path: Path) -> None:
    assert plan_memory(config_folder(tmp_path, "vit"), batch=2, rank=4).total > 0


@pytest.mark.parametrize(("quant_type", "bits"), [("nf3", 3), ("int8", 8), ("trellis2", 2)])
def test_a_type_says_its_bits(quant_type: str, bits: int) -> None:
    assert Settings(quant_type=quant_type).bits == bits
    assert f"{bits} bits ({quant_type})" in str(Settings(bits=16, quant_type=quant_type))


def test_dtypes_by_the_names_that_merges_know() -> None:
    found = Settings(dtype="fp16", adapter_dtype="bf16")
    assert (found.dtype, found.adapter_dtype) == ("float16", "bfloat16")


def test_cards_before_ampere_have_no_flash_attention(folder: Path) -> None:
    long = {**SIZE, "seq": 4096, "dtype": "float16", "chunked_loss": True}
    assert plan_memory(folder, gpu="t4", **long).total > 2 * plan_memory(folder, gpu="h100", **long).total


@pytest.mark.parametrize("name", ["T4", "NVIDIA Tesla T4", "t4"])
def test_cards_by_their_names(name: str) -> None:
    assert card_named(name) is CARDS["t4"]
    assert card_named("RTX 4090") is CARDS["4090"]
    assert card_named("A100-SXM-80GB") is CARDS["a100-80"]


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_weights_that_are_stored_otherwise(method: str, folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    told = f"stored by {method}: planned as if it came in 16 bits, its linear layers in nf4"
    plan = plan_memory(tmp_path, **SIZE)
    assert told in plan.notes
    assert plan.total == plan_memory(folder, **SIZE).total
    assert not any("stored by" in note for note in plan_memory(folder, **SIZE).notes)


def test_the_search_asks_little_of_a_line() -> None:
    asked = []
    assert largest(lambda n: asked.append(n) or 100 + 7 * n, 1000, 1, 1, 4096) == 128
    assert len(asked) <= 5


def test_the_search_finds_the_edge_of_a_parabola() -> None:
    for room in (1, 100, 10_000, 12_345_678):
        found = largest(lambda n: 3 * n + n * n // 50, room, 2048, 64, 1 << 16)
        best = max((n for n in range(64, 1 << 16, 64) if 3 * n + n * n // 50 <= room), default=0)
        assert best - max(64, best // 50) <= found <= best


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"gpu": "h101"}, ConfigError, r"gpu: expected a GPU that is known here, found 'h101'; pass one of \['h100'"),
        ({"bits": 5}, ConfigError, r"bits: expected one of \[16, 8, 4, 3, 2\], found 5; pass bits=4"),
        ({"optimizer": "adam"}, ConfigError, "optimizer: expected one of .*found 'adam'; did you mean 'adamw'?"),
        ({"seq": 0}, ConfigError, "seq: expected an integer of at least 1, found 0"),
        ({"memory": 0}, ConfigError, "memory: expected a number of bytes, found 0"),
        ({"sequence": 5}, ConfigError, r"settings: expected some of .*found \['sequence'\]"),
        ({"targets": ("q_prj",)}, TargetError, "target_modules: 'q_prj' matches no module"),
    ],
)
def test_what_cannot_be_planned(arguments: dict, error: type[Exception], text: str, folder: Path) -> None:
    with pytest.raises(error, match=text):
        plan_memory(folder, **{**SIZE, **arguments})


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(StorageError, match="model='no/where': expected a folder or a repository on the Hub, found nei"):
        plan_memory("no/where")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    words = f"plan --model {folder} --rank 4 --seq 64 --memory 790MiB --merge-aware nf4 --json {out}".split()
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 0, outcome.output
    assert "fits" in outcome.output
    settings = json.loads(out.read_text())["settings"]
    assert (settings["rank"], settings["merge_aware"]) == (4, "nf4")
    outcome = CliRunner().invoke(app, ["plan", "--model", str(folder), "--gpu", "t5"])
    assert outcome.exit_code == 1
    assert "--gpu: expected a GPU that is known here, found 't5'" in outcome.output
