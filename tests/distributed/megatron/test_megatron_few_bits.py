"""QLoRA over Megatron's sharded linears: sharded, then quantized; the same codes and numbers at any world size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

CLOSE = {"rtol": 1e-4, "atol": 2e-6}
Few = dict[int, list[dict[str, Any]]]


@pytest.fixture(
    params=[
        pytest.param("nf4", marks=pytest.mark.slow),
        pytest.param("signed2", marks=pytest.mark.engines),
        pytest.param("nf4 by sequence", marks=pytest.mark.engines),
    ]
)
def few(request: pytest.FixtureRequest) -> Few:
    kind = request.param
    found = request.getfixturevalue("runs" if kind == "nf4" else "more_runs")
    return {size: [rank[kind] for rank in found[size]] for size in (1, 2)}


def test_linears_stay_sharded_linears(few: Few) -> None:
    for run in (*few[1], *few[2]):
        assert {"QuantizedColumnParallelLinear", "QuantizedRowParallelLinear"} <= set(run["types"])
        change = (run["quantized"] - run["dense"]).abs().max()
        assert 1e-3 < change < 1.5
        torch.testing.assert_close(run["quantized"], few[1][0]["quantized"], **CLOSE)


def test_ranks_hold_the_codes_of_one_process(few: Few) -> None:
    (one,), (two, _) = few[1], few[2]
    assert one["weights"].keys() == two["weights"].keys()
    assert len([path for path in one["weights"] if "linear" in path]) == 8
    for path, weight in one["weights"].items():
        assert torch.equal(weight, two["weights"][path]), path


def test_losses_and_gradients_are_the_same(few: Few) -> None:
    (one,), several = few[1], few[2]
    assert one["losses"][-1] < one["losses"][0] - 0.1
    for rank in several:
        torch.testing.assert_close(torch.tensor(rank["losses"]), torch.tensor(one["losses"]), rtol=0, atol=5e-6)
        for path, pair in one["gradients"].items():
            for found, expected in zip(rank["gradients"][path], pair, strict=True):
                torch.testing.assert_close(found, expected, **CLOSE)
    assert all(torch.equal(several[0]["replicas"][path], several[1]["replicas"][path]) for path in one["replicas"])


def test_files_bring_adapters_back(few: Few) -> None:
    for run in (*few[1], *few[2]):
        assert torch.equal(run["loaded"], run["logits"])


def test_a_merge_into_float32_keeps_all(few: Few) -> None:
    for run in (*few[1], *few[2]):
        torch.testing.assert_close(run["dense again"], run["logits"], rtol=1e-4, atol=5e-6)


def test_a_merge_in_place_is_requantized_and_taken_back(few: Few) -> None:
    (one,) = few[1]
    for run in (one, *few[2]):
        assert torch.equal(run["unmerged"], run["logits"])
        assert not torch.equal(run["merged"], run["logits"])
        torch.testing.assert_close(run["merged"], one["merged"], rtol=0, atol=0.02)  # a code may round the other way


@pytest.mark.slow
def test_blocks_across_ranks_are_refused(runs: Any) -> None:
    for rank in [found["refusals"] for found in runs[2]]:
        assert "CodecError" in rank["blocks"]
        assert "row-sharded layer" in rank["blocks"]
        assert "pass blocksize=16" in rank["blocks"] or "pass blocksize=32" in rank["blocks"]
        assert "double_quant=False" in rank["double"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a fused linear", "parts", "a table"])
def test_rows_with_adapters_of_their_own_are_refused(what: str, runs: Any) -> None:
    for rank in runs[2]:
        assert "AdapterError" in rank["refusals"][f"rows of {what}"]
        assert "expected one adapter for all rows over a layer that is sharded" in rank["refusals"][f"rows of {what}"]


@pytest.mark.slow
def test_starts_that_quantize_are_refused_on_parts(runs: Any) -> None:
    for rank in runs[2]:
        said = rank["refusals"]["loftq on parts"]
        assert said.startswith("CodecError: decoder.layers.0.self_attention.linear_qkv.linear_q: ")
        assert "rows of a fused one; quantize_ the model first" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["column", "column, bias left to others", "row", "row, bias left to others"])
def test_biases_are_added_or_left_as_ever(name: str, runs: Any) -> None:
    for rank in runs[2]:
        found, expected = rank["quantized linears"][name]
        assert found.keys() == expected.keys()
        for what, value in expected.items():
            torch.testing.assert_close(found[what], value, rtol=1e-5, atol=1e-5)
