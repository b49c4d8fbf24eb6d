"""Adapters on a Llama that two processes share: merged, combined, switched and refused as in one process."""

from __future__ import annotations

import re
from typing import Any

import jobs_of_tensor_parallel_life as jobs
import pytest
from processes import in_processes

pytestmark = pytest.mark.slow

# float32 sums in another order, in logits of magnitude 1.
ROUNDING = 5e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_processes(jobs.everything, 2, folder=tmp_path_factory.mktemp("tied"))


@pytest.mark.parametrize("bits", [None, 4, 2])
def test_merges_are_those_of_one_process_bit_for_bit(found: list[dict[str, Any]], bits: int | None) -> None:
    for rank in found:
        mine = rank["merging"][bits]
        assert mine["merged"]
        assert mine["for good"]
        assert max(mine["merged logits"], mine["logits"]) < ROUNDING
        assert mine["left"] == []


@pytest.mark.parametrize("bits", [None, 4, 2])
def test_what_was_merged_comes_out_again_bit_for_bit(found: list[dict[str, Any]], bits: int | None) -> None:
    assert all(rank["merging"][bits]["unmerged"] for rank in found)


@pytest.mark.parametrize("bits", [None, 4, 2])
def test_the_account_is_of_the_whole_layer(found: list[dict[str, Any]], bits: int | None) -> None:
    assert max(rank["merging"][bits]["account"] for rank in found) < 1e-6


def test_what_one_process_refuses_none_does(found: list[dict[str, Any]]) -> None:
    one, other = (rank["NaN"] for rank in found)
    for way in ("in place", "for good"):
        assert "1 of the 2 processes that share this layer refused its part" in one[way]
        assert "NaN or infinite values" in other[way]
    assert one["unchanged"] == other["unchanged"] == "True"


def test_several_adapters(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["two adapters"]) == 8
        assert max(rank["two adapters"].values()) < ROUNDING


def test_projected_gradients_are_by_whole_factors(found: list[dict[str, Any]]) -> None:
    assert max(rank["LoRA-FA"] for rank in found) < ROUNDING


def test_a_table_and_its_head_share_an_adapter(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["tied"]["held"]
        assert rank["tied"]["gradients"] < ROUNDING


def test_a_model_stored_in_few_bits_is_shared_out_as_it_is_loaded(found: list[dict[str, Any]]) -> None:
    for mine in (rank["stored in few bits"] for rank in found):
        assert mine["same"]
        assert mine["part"] == (64, 64)  # of 64 x 128
        assert mine["logits"] < ROUNDING
        assert mine["gradients"] < 1e-4
        assert mine["generated"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("saved", "StorageError: save_pretrained: expected weights of few bits that this process holds whole"),
        ("mixed", r"TargetError: model.layers.1.self_attn.q_proj: expected one storage for all modules that the plan"),
        ("blocks", r"CodecError: model.layers.0.self_attn.o_proj: a row-sharded layer .*; pass blocksize=32"),
    ],
)
def test_what_transformers_cannot_share_out(found: list[dict[str, Any]], what: str, said: str) -> None:
    for rank in found:
        assert re.search(said, rank["stored in few bits"][what])


def test_a_merged_model_is_saved_whole(found: list[dict[str, Any]]) -> None:
    assert all(rank["merged and saved"] < ROUNDING for rank in found)


def test_a_prepared_model_is_counted_whole_and_weighed_in_part(found: list[dict[str, Any]]) -> None:
    for mine in (rank["prepared"] for rank in found):
        alone, shared = mine["counted"]
        assert alone == shared
        alone, shared = mine["bytes"]
        assert shared < 0.7 * alone
        alone, shared = mine["losses"]
        assert shared == pytest.approx(alone, abs=ROUNDING)


def test_a_base_has_the_fingerprint_that_it_has_in_one_process(found: list[dict[str, Any]]) -> None:
    assert len({name for rank in found for name in rank["fingerprints"]}) == 1


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("random states", r"dropout: expected one random state on all 2 processes .*torch.manual_seed"),
        (
            "blocks",
            r"self_attn.o_proj: a row-sharded layer of 64 x 64 .* each holds 32 side by side; pass blocksize=32$",
        ),
        ("LoftQ's blocks", r"self_attn.o_proj: a row-sharded layer .*; pass blocksize=32$"),
        ("scales in 8 bits", r"found double quantization, .*; pass double_quant=False"),
        ("rows", r"found one for each whole row .*; pass blocksize=32 and a type that has blocks, such as 'uniform8'"),
        ("calibrated", r"q_proj: expected a layer that this process holds whole for method .*loftq init"),
        ("sharded afterwards", r"call parallelize_module on the model first and apply_lora then"),
        (
            "merge_aware",
            r"TargetError: .*q_proj: expected a layer that this process holds whole .*leave merge_aware out",
        ),
        ("rows of a table", r"Embedding: expected one adapter for all rows .*set_adapter"),
        ("rows of a batch", r"expected one adapter for all rows .*set_adapter"),
        ("into another type", r"found into='nf4'; leave that out, or save the adapter and merge it in one process"),
        ("unknown hooks", r"Embedding\(24, 64, .*found hooks that say nothing .*register_sharding"),
    ],
)
def test_what_cannot_be_done_says_what_can(found: list[dict[str, Any]], what: str, said: str) -> None:
    for rank in found:
        assert re.search(said, rank["refused"][what])
