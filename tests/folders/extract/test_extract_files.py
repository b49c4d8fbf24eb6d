"""The best low-rank part of a difference: against float64, with every number of the report, streamed and exact."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.extraction import best_share, least_rank, squared_values
from tiny_llama import llama
from torch import Tensor
from transformers import LlamaForCausalLM
from tuned_models import assert_reproduces, branches, differences, inputs, low_rank, noise, pair, tensors

from qlora_kit import LoraConfig, LoraModel
from qlora_kit.checkpoints.shards import ShardReader
from qlora_kit.folders.extract.run import best_branch, extract_folders

# float32 products and decompositions of matrices of this size, against float64.
CLOSE = 1e-5
ONLY_PROJECTIONS = low_rank(3, only="proj")


def base_of(folder: Path) -> Any:
    return lambda: LlamaForCausalLM.from_pretrained(folder)


# -- the factors -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 50),
    energy=st.none() | st.floats(0.01, 1.0),
    inner=st.integers(1, 40),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_eckart_young(
    rows: int, columns: int, rank: int, energy: float | None, inner: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((rows, inner), (inner, columns)))
    difference = scale * left @ right
    A, B = best_branch(difference, None if energy is not None else rank, energy)
    wanted = min(rank, rows, columns) if energy is None else A.shape[0]
    assert A.shape == (wanted, columns)
    assert B.shape == (rows, wanted)
    exact = difference.double().numpy()
    lost = np.linalg.norm(exact - B.double().numpy() @ A.double().numpy()) ** 2 / np.linalg.norm(exact) ** 2
    assert 1 - lost == pytest.approx(best_share(exact, wanted), abs=CLOSE)
    if energy is not None:  # float32 cannot tell shares apart that are closer than its rounding
        assert least_rank(exact, energy - CLOSE) <= wanted <= least_rank(exact, min(1.0, energy + CLOSE))
    # Balanced: row i of A and column i of B have one norm, and are orthogonal to the others.
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-3, atol=1e-3 * float(A.norm()))


def test_at_full_energy_the_rank_is_that_of_the_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(150, 7, generator=generator) @ torch.randn(7, 90, generator=generator)
    A, _ = best_branch(difference, None, 1.0)
    assert A.shape[0] == 7


@pytest.mark.parametrize(("shape", "rank"), [((1024, 1100), 8), ((1024, 1030), 80)])
@pytest.mark.slow
def test_wide_noise_is_held_as_well_as_it_can_be(shape: tuple[int, int], rank: int) -> None:
    """The flattest spectrum there is, by both of the fast solvers."""
    difference = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    A, B = best_branch(difference, rank)
    held = 1 - float((difference.double() - B.double() @ A.double()).norm() / difference.double().norm()) ** 2
    assert held == pytest.approx(best_share(difference.numpy(), rank), rel=1e-3)


# -- the adapter -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [3, 5])
def test_a_known_delta_comes_back(rank: int, tmp_path: Path) -> None:
    model = llama()
    base, tuned = pair(model, tmp_path, ONLY_PROJECTIONS)
    report = extract_folders(base, tuned, tmp_path / "out", rank)
    assert_reproduces(base_of(base), tmp_path / "out", model, inputs())
    assert len(report.modules) == 14
    assert report.others == ()
    for row in report.modules:
        assert row.captured == pytest.approx(1, abs=1e-9)
        assert row.error < 1e-5
    assert report.captured == pytest.approx(1, abs=1e-9)
    assert report.left == 0
    config = LoraConfig.from_pretrained(tmp_path / "out")
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config.r, config.lora_alpha, config.target_modules) == (rank, rank, projections)
    assert (config.task_type, config.inference_mode, config.bias) == ("CAUSAL_LM", True, "none")
    assert config.base_model_name_or_path == str(base)


def test_every_number_of_the_report(tmp_path: Path) -> None:
    """Everything differs and has full rank, so that each module is cut and much is left out."""
    base, tuned = pair(llama(), tmp_path, noise())
    report = extract_folders(base, tuned, tmp_path / "out", 5)
    exact, stored, found = differences(base, tuned), tensors(base), branches(tmp_path / "out")
    whole = sum(np.linalg.norm(d) ** 2 for d in exact.values())
    held = 0.0
    assert found.keys() == {row.path for row in report.modules}
    for row in report.modules:
        d = exact[f"{row.path}.weight"]
        size, lost = np.linalg.norm(d), np.linalg.norm(d - found[row.path])
        assert row.rank == 5
        assert row.size == pytest.approx(size, rel=CLOSE)
        assert row.relative == pytest.approx(size / float(stored[f"{row.path}.weight"].double().norm()), rel=CLOSE)
        assert row.captured == pytest.approx(best_share(d, 5), rel=CLOSE)
        assert row.error == pytest.approx(lost / size, rel=CLOSE)
        held += size**2 - lost**2
    adapted = {f"{row.path}.weight" for row in report.modules}
    assert {tensor.name for tensor in report.others} == exact.keys() - adapted
    for tensor in report.others:
        size = np.linalg.norm(exact[tensor.name])
        assert tensor.stored == "left"
        assert tensor.size == pytest.approx(size, rel=CLOSE)
        assert tensor.relative == pytest.approx(size / float(stored[tensor.name].double().norm()), rel=CLOSE)
    assert report.total == pytest.approx(whole, rel=CLOSE)
    assert report.captured == pytest.approx(held / whole, rel=CLOSE)
    assert report.left == pytest.approx(sum(np.linalg.norm(exact[t.name]) ** 2 for t in report.others) / whole)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["captured"] == report.captured
    assert plain["modules"][0]["path"] == "model.layers.0.self_attn.q_proj"
    text = str(report)
    assert "model.layers.*.input_layernorm.weight" in text
    assert "LEFT OUT: 2 tensors" in text
    assert "whole='changed'" in text
    assert f"{report.left:.4%} is in tensors left out" in text


@pytest.mark.slow
@pytest.mark.parametrize("energy", [0.3, 0.9])
def test_an_energy_gives_each_module_its_own_rank(energy: float, tmp_path: Path) -> None:
    base, tuned = pair(llama(), tmp_path, noise(0.02, only=("layers.0",)), low_rank(9, 0.3, only="layers.0.mlp"))
    report = extract_folders(base, tuned, tmp_path / "out", energy=energy)
    exact = differences(base, tuned)
    ranks = {row.path: row.rank for row in report.modules}
    assert ranks == {path: least_rank(exact[f"{path}.weight"], energy) for path in ranks}
    assert len(set(ranks.values())) > 2
    assert all(row.captured >= energy for row in report.modules)
    again = LoraModel.from_pretrained(base_of(base)(), tmp_path / "out")
    assert {layer.r["default"] for layer in again.adapter_layers().values()} == {max(ranks.values())}
    assert f"filled up with zeros to rank {max(ranks.values())}" in str(report)
    extract_folders(base, tuned, tmp_path / "own", energy=energy, own_ranks=True)
    own = LoraModel.from_pretrained(base_of(base)(), tmp_path / "own")
    assert {path: layer.r["default"] for path, layer in own.adapter_layers().items()} == ranks
    assert {layer.scaling["default"] for one in (own, again) for layer in one.adapter_layers().values()} == {1.0}


@pytest.mark.slow
def test_a_rank_beyond_the_dimensions_is_the_whole_difference(tmp_path: Path) -> None:
    model = llama(hidden_size=40, intermediate_size=50)
    base, tuned = pair(model, tmp_path, noise(0.05, only=("proj",)))
    report = extract_folders(base, tuned, tmp_path / "out", 45)
    assert {row.path.rpartition(".")[2]: row.rank for row in report.modules}["k_proj"] == 20
    assert {row.rank for row in report.modules} == {40, 20}
    assert_reproduces(base_of(base), tmp_path / "out", model, inputs())


def test_modules_without_a_difference_get_no_branch(tmp_path: Path) -> None:
    changed = ("layers.1.self_attn.q_proj", "layers.0.mlp.down_proj")
    model = llama()
    base, tuned = pair(model, tmp_path, *(low_rank(2, only=name) for name in changed))
    report = extract_folders(base, tuned, tmp_path / "out", 2)
    assert {row.path for row in report.modules} == {f"model.{name}" for name in changed}
    assert len(report.equal) == 12
    assert "model.layers.0.self_attn.q_proj" in report.equal
    assert f"without a difference, so without a branch: {', '.join(report.equal)}" in str(report)
    assert_reproduces(base_of(base), tmp_path / "out", model, inputs())
    lora = LoraModel.from_pretrained(base_of(base)(), tmp_path / "out")
    assert set(lora.adapter_layers()) == {f"model.{name}" for name in changed}


def test_targets_may_be_names_a_regex_and_exclusions(tmp_path: Path) -> None:
    base, tuned = pair(llama(), tmp_path, noise())
    for fields, expected in (
        ({"target_modules": ["q_proj", "embed_tokens"]}, 3),
        ({"target_modules": r".*\.1\..*(up|down)_proj"}, 2),
        ({"exclude_modules": ["mlp.up_proj", "k_proj"]}, 10),
    ):
        out = tmp_path / f"out-{expected}"
        report = extract_folders(base, tuned, out, 2, **fields)  # type: ignore[arg-type]
        again = LoraModel.from_pretrained(base_of(base)(), out)
        assert set(again.adapter_layers()) == {row.path for row in report.modules}
        assert len(report.modules) == expected
        # What isn't targeted is named, adaptable or not.
        assert len(report.modules) + len(report.others) == len(tensors(base))


def test_other_types_shards_and_factors(tmp_path: Path) -> None:
    """A bfloat16 base in many shards under a float32 tuned model in one; float32 and bfloat16 factors."""
    model = llama()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="50KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    model.float()
    _, tuned = pair(model, tmp_path / "second", ONLY_PROJECTIONS)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        out = tmp_path / str(dtype)
        report = extract_folders(tmp_path / "base", tuned, out, 3, dtype=dtype)
        assert {t.dtype for t in tensors(out).values()} == {dtype}
        # The report counts the rounding of the factors that are stored.
        exact, found = differences(tmp_path / "base", tuned), branches(out)
        for row in report.modules:
            d = exact[f"{row.path}.weight"]
            assert row.error == pytest.approx(np.linalg.norm(d - found[row.path]) / np.linalg.norm(d), abs=1e-6)
            assert row.error < tolerance


def test_half_precision_leaves_its_rounding_in_the_difference(tmp_path: Path) -> None:
    """The tuned weights were rounded to bfloat16, so no rank 3 branch is all of the difference; energy tells."""
    model = llama().to(torch.bfloat16)
    base, tuned = pair(model, tmp_path, ONLY_PROJECTIONS)
    report = extract_folders(base, tuned, tmp_path / "out", 3)
    exact = differences(base, tuned)
    for row in report.modules:
        d = exact[f"{row.path}.weight"]
        assert (squared_values(d) > 1e-9 * squared_values(d)[0]).sum() > 3
        assert row.captured == pytest.approx(best_share(d, 3), rel=CLOSE)
        assert 0.99 < row.captured < 1


def test_no_more_than_a_few_tensors_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair(llama(num_hidden_layers=4), tmp_path, noise())
    read, alive, most, times = ShardReader.tensor, weakref.WeakSet(), 0, {}  # type: ignore[var-annotated]

    class Kept(Tensor):
        pass

    def watched(reader: ShardReader, name: str) -> Tensor:
        nonlocal most
        tensor = read(reader, name).as_subclass(Kept)
        alive.add(tensor)
        most = max(most, len(alive))
        times[reader.folder.name, name] = times.get((reader.folder.name, name), 0) + 1
        return tensor

    monkeypatch.setattr(ShardReader, "tensor", watched)
    extract_folders(base, tuned, tmp_path / "out", 2)
    assert most <= 3
    assert set(times.values()) == {1}
    assert len(times) == 2 * len(tensors(base))
