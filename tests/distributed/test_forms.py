"""Layers that torch's ``parallelize_module`` shares out, adapted: losses and gradients are those of one process, in
whatever form inputs come and outputs leave, and nothing but tensors of rank r is told for it."""

from __future__ import annotations

from typing import Any

import jobs_of_forms as jobs
import pytest
from processes import in_processes
from sharded_nets import INNER, LINEARS, RANK, WIDTH, WORDS

pytestmark = pytest.mark.slow

TOKENS = 2 * 6
PLANS = ["plain", "dtensors", "gathered", "sequence", "sequence of dtensors"]
# Sums of float32 in another order, over three steps: 4e-7 where it was measured. A term left out is 1e-1 at least.
ROUNDING = 4e-6


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return in_processes(jobs.everything, 2)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("plan", PLANS)
def test_losses_and_gradients_are_those_of_one_process(
    found: list[dict[str, Any]], plan: str, bits: int | None
) -> None:
    for rank in found:
        mine = rank["trained"][f"{plan}, {bits} bits"]
        assert mine["losses"] < ROUNDING
        assert mine["gradients"] < ROUNDING


@pytest.mark.parametrize("bits", [None, 4])
def test_the_plain_form_drops_what_one_process_drops(found: list[dict[str, Any]], bits: int | None) -> None:
    assert found[0]["plain"][f"sequence, {bits} bits"]["gradients"] < ROUNDING


@pytest.mark.parametrize("plan", PLANS)
def test_each_process_holds_its_part(found: list[dict[str, Any]], plan: str) -> None:
    for bits in (None, 4):
        mine = found[0]["trained"][f"{plan}, {bits} bits"]
        assert {mine["families"][name] for name in LINEARS} == {"ShardedLinearAdapter"}
        assert mine["parts"]["up"] == (INNER // 2, WIDTH)
        assert mine["parts"]["down"] == (WIDTH, INNER // 2)
    if plan != "gathered":
        assert found[0]["trained"][f"{plan}, None bits"]["families"]["table"] == "ShardedEmbeddingAdapter"


def test_only_tensors_of_rank_r_are_told(found: list[dict[str, Any]]) -> None:
    for rank in (mine["traffic"] for mine in found):
        for plan, (forward, backward) in rank.items():
            for _, size in [*forward, *backward]:
                assert size <= RANK * max(TOKENS, INNER), plan
        # A column's z is told backward, a row's forward: once each, for two layers of either kind.
        assert rank["plain"] == ([("all-reduce", RANK * TOKENS)] * 2, [("all-reduce", RANK * TOKENS)] * 2)
        assert rank["gathered"][0] == [("all-gather", RANK * INNER)] * 4
        assert rank["gathered"][1] == []


def test_in_eval_as_one_process(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert max(rank["in eval"].values()) < 1e-5


def test_how_layers_are_shared_out_is_read_from_the_plan(found: list[dict[str, Any]]) -> None:
    mine = found[0]["shardings"]
    assert mine["plain"] == {
        "table": ("row", (WIDTH, WORDS), "features", "whole"),
        **dict.fromkeys(("up", "other"), ("column", (INNER, WIDTH), "whole", "features")),
        **dict.fromkeys(("down", "back"), ("row", (WIDTH, INNER), "features", "whole")),
        "head": ("column", (WORDS, WIDTH), "whole", "whole"),
    }
    assert mine["dtensors"]["table"] == ("column", (WIDTH, WORDS), "whole", "whole")
    assert mine["gathered"]["down"] == ("row", (WIDTH, INNER), "whole", "whole")
    assert mine["sequence"]["up"] == ("column", (INNER, WIDTH), "sequence", "features")
    assert mine["sequence"]["down"] == ("row", (WIDTH, INNER), "features", "sequence")
    assert mine["sequence"]["head"] == ("column", (WORDS, WIDTH), "sequence", "whole")


@pytest.mark.engines
@pytest.mark.parametrize("plan", ["dtensors", "gathered", "sequence of dtensors"])
def test_parts_need_not_be_equal(plan: str) -> None:
    for mine in in_processes(jobs.of_dense, 3, plan=plan):  # 128 by 3: 43, 43 and 42
        assert max(mine.values()) < ROUNDING
