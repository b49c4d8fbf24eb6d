"""megatron-core's GPTModel: the same numbers at every world size, in training, files and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

# Losses of about 4 in float32: sums in another order, over ten steps.
LOSSES = {"rtol": 0, "atol": 5e-6}
# Gradients and logits of about 0.1 to 1.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}
# Factors after ten steps of Adam at 1e-2, which divides gradients by their own size: rounding comes out larger.
STEPPED = {"rtol": 0, "atol": 2e-4}


@pytest.fixture
def one(runs: Any) -> dict[str, Any]:
    return runs[1][0]["life"]  # type: ignore[no-any-return]


@pytest.fixture
def two(runs: Any) -> list[dict[str, Any]]:
    return [rank["life"] for rank in runs[2]]


@pytest.fixture(params=["life", "life by sequence"])
def several(request: pytest.FixtureRequest, runs: Any) -> list[dict[str, Any]]:
    return [rank[request.param] for rank in runs[2]]


def test_starts_are_the_same(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    for rank in several:
        torch.testing.assert_close(rank["start"], one["start"], **CLOSE)


def test_losses_are_the_same(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    for rank in several:
        torch.testing.assert_close(torch.tensor(rank["losses"]), torch.tensor(one["losses"]), **LOSSES)
    assert one["losses"][-1] < one["losses"][0] - 0.2


def test_gradients_are_the_same(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    assert len(one["gradients"]) == 10
    for rank in several:
        for path, pair in one["gradients"].items():
            for found, expected in zip(rank["gradients"][path], pair, strict=True):
                assert expected.abs().max() > 1e-5
                torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, path=path: f"{path}: {text}")


def test_megatron_finds_the_norm_of_all_gradients(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    whole = torch.stack([g.norm() for pair in one["gradients"].values() for g in pair]).norm()
    for run in (one, *several):
        assert run["norm"] == pytest.approx(float(whole), rel=1e-4)


def test_factors_after_steps_are_the_same(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    for path, pair in one["factors"].items():
        for found, expected in zip(several[0]["factors"][path], pair, strict=True):
            torch.testing.assert_close(found, expected, **STEPPED, msg=lambda text, path=path: f"{path}: {text}")


def test_replicas_are_equal_after_steps(several: list[dict[str, Any]]) -> None:
    first, second = (rank["replicas"] for rank in several)
    assert len(first) == 10
    assert all(torch.equal(first[path], second[path]) for path in first)


def test_merges_compute_what_branches_do(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    for run in (one, *several):
        for merged in ("merged", "taken out"):
            torch.testing.assert_close(run[merged], run["logits"], **CLOSE)
        assert torch.equal(run["unmerged"], run["logits"])
        assert "MegatronLinear" not in run["types"]
        assert {"ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding"} <= set(run["types"])


def test_files_of_one_process_load_in_two(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    torch.testing.assert_close(two[0]["loaded"], one["logits"], **CLOSE)


def test_files_of_two_processes_load_in_one(runs: Any, two: list[dict[str, Any]]) -> None:
    for rank in runs[2]:
        assert rank["alone"]["sizes"] == [1]  # two that share nothing
        torch.testing.assert_close(rank["alone"]["loaded"], two[0]["logits"], **CLOSE)


def test_what_is_loaded_is_saved_the_same(runs: Any, folder: Path) -> None:
    for before, after in (("one", "two/again"), ("two", "again")):
        first, second = (folder / name / "adapter_model.safetensors" for name in (before, after))
        assert first.read_bytes() == second.read_bytes()


def test_megatrons_checkpoints_of_the_base_have_their_keys(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for run in (one, *two):
        assert len(run["keys"]) > 15
        assert run["adapted keys"] == run["keys"]


def test_the_base_is_as_it_was(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert torch.equal(rank["base"], rank["without"])
        assert (rank["start"] - rank["without"]).abs().max() > 0.1  # the adapters say something
