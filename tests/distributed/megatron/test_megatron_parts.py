"""Adapters on q, k, v, gate and up of fused linears: equal to one on the fused linear, and everything an adapter is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

CLOSE = {"rtol": 1e-4, "atol": 2e-6}


@pytest.fixture(params=[1, 2])
def run(request: pytest.FixtureRequest, runs: Any) -> dict[str, Any]:
    return runs[request.param][0]["parts"]  # type: ignore[no-any-return]


def test_parts_have_paths_of_their_own(run: dict[str, Any]) -> None:
    first = [path for path in run["plan"] if ".0." in path]
    attention, mlp = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.0.mlp.linear_fc1"
    assert first == [
        *(f"{attention}.linear_{part}" for part in "qkv"),
        *(f"{mlp}.linear_fc1_{part}" for part in ("gate", "up")),
    ]


def test_they_can_be_planned_before(run: dict[str, Any]) -> None:
    before, done = run["plans"]
    assert before == done
    assert "FusedPart" in before


def test_with_one_first_factor_they_are_the_fused_adapter(run: dict[str, Any]) -> None:
    torch.testing.assert_close(run["tied"], run["fused"], **CLOSE)
    fused, parts = run["gradients of fused"], run["gradients of parts"]
    for path, (A, B) in fused.items():
        own = [pair for part, pair in parts.items() if part.rpartition(".")[0] == path]
        torch.testing.assert_close(sum(a for a, _ in own), A, **CLOSE)
        # The same rows in another order.
        rows = torch.cat([b for _, b in own])
        assert rows.shape == B.shape
        torch.testing.assert_close(rows.norm(dim=1).sort().values, B.norm(dim=1).sort().values, **CLOSE)


def test_training_is_the_same_at_every_world_size(runs: Any) -> None:
    (one,), several = ([rank["parts"] for rank in runs[size]] for size in (1, 2))
    for rank in several:
        torch.testing.assert_close(torch.tensor(rank["losses"]), torch.tensor(one["losses"]), rtol=0, atol=5e-6)
    assert one["losses"][-1] < one["losses"][0] - 0.02
    for path, (A, B) in one["factors"].items():
        torch.testing.assert_close(several[0]["factors"][path][0], A, rtol=0, atol=2e-4)
        torch.testing.assert_close(several[0]["factors"][path][1], B, rtol=0, atol=2e-4)


def test_parts_and_wholes_keep_out_of_each_others_way(run: dict[str, Any]) -> None:
    whole, part, unknown = run["refused"]
    assert "linear_qkv: expected a fused linear without adapters on its parts, found linear_q" in whole
    assert "linear_qkv: expected a fused linear without adapters to put some on its parts" in part
    assert "'linear_r' matches no module of the model; closest names: " in unknown


def test_expressions_mean_parts_too(run: dict[str, Any]) -> None:
    layer = "decoder.layers.1"
    assert run["by expression"] == [
        f"{layer}.self_attention.linear_qkv.linear_q",
        f"{layer}.mlp.linear_fc1.linear_fc1_up",
    ]


def test_megatrons_checkpoints_of_the_base_have_their_keys(run: dict[str, Any]) -> None:
    assert len(run["keys"]) > 15
    assert run["adapted keys"] == run["keys"]


@pytest.mark.parametrize("name", ["self_attention.linear_qkv", "mlp.linear_fc1"])
def test_who_reads_the_fused_weight_computes_with_them(run: dict[str, Any], name: str) -> None:
    """Gradients are whole on every rank, as where the layer is called; so of an adapter on the fused linear itself."""
    for found, count in zip(
        run["read"][name], (1, {"self_attention.linear_qkv": 2, "mlp.linear_fc1": 1}[name]), strict=True
    ):
        assert len(found["called"]) == 1 + 2 * count
        for called, read in zip(found["called"], found["by weight"], strict=True):
            torch.testing.assert_close(read, called, **CLOSE)
            assert called.abs().max() > 1e-3
    assert "expected a fused linear without adapters on its parts to multiply" in run["multiplied"]


def test_files_bring_them_back(run: dict[str, Any]) -> None:
    assert torch.equal(run["loaded"], run["logits"])


def test_files_are_the_same_at_every_world_size(runs: Any, folder: Path) -> None:
    one, two = (load_file(folder / f"parts of {n}" / "adapter_model.safetensors") for n in ("one", "two"))
    assert {key: tensor.shape for key, tensor in one.items()} == {key: tensor.shape for key, tensor in two.items()}
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=2e-4)
    ranks = {len(tensor) for key, tensor in one.items() if key.endswith("linear_v.lora_A.weight")}
    assert ranks == {2}  # by rank_pattern


def test_merges_compute_what_branches_do(run: dict[str, Any]) -> None:
    for merged in ("merged", "merge"):
        torch.testing.assert_close(run[merged], run["logits"], **CLOSE)
    assert torch.equal(run["unmerged"], run["logits"])
    assert all(path.endswith(("linear_qkv", "linear_fc1")) for path in run["layers"])  # accounts of what is stored


def test_the_model_gets_its_own_modules_back(run: dict[str, Any]) -> None:
    assert run["types"]
    assert run["unloaded"]
