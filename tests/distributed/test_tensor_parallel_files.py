"""Adapters on shared models are saved in the usual layout, as one process saves them, and load at any world size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs_of_tensor_parallel_files as jobs
import pytest
import torch
from processes import in_processes
from torch import Tensor

from qlora_kit import LoraModel

KINDS = ["dense", "4 bits", "2 bits", "LoftQ"]
# float32 sums in another order, in logits of magnitude 1.
ROUNDING = 5e-6


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Adapters of every kind saved by one process, and their logits."""
    folder, found = tmp_path_factory.mktemp("one"), {}
    for kind in KINDS:
        lora = jobs.lora(kind, shared=False)
        lora.save_pretrained(folder / kind)
        found[kind] = jobs.logits(lora)
    return folder, found


@pytest.fixture(scope="module")
def two(one: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[dict[str, Tensor], ...]]]:
    """The same saved by two, which load what one has saved."""
    folder = tmp_path_factory.mktemp("two")
    return folder, in_processes(jobs.saved_and_loaded, 2, folder=folder, others=one[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_of_one_process(one: Any, two: Any, kind: str) -> None:
    (mine, _), (theirs, _) = one, two
    assert (mine / kind / "adapter_config.json").read_bytes() == (theirs / kind / "adapter_config.json").read_bytes()
    assert _contents(mine / kind / "adapter_model.safetensors") == _contents(
        theirs / kind / "adapter_model.safetensors"
    )


def _contents(file: Path) -> tuple[dict[str, Any], bytes]:
    """A file's header, in which the order of metadata is left to chance, and the bytes of its tensors."""
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_compute_and_load_what_one_does(one: Any, two: Any, kind: str) -> None:
    for computed, loaded in two[1]:
        torch.testing.assert_close(computed[kind], one[1][kind], rtol=0, atol=ROUNDING)
        torch.testing.assert_close(loaded[kind], one[1][kind], rtol=0, atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "4 bits", "2 bits"])
def test_one_loads_what_two_have_saved(one: Any, two: Any, kind: str) -> None:
    lora = LoraModel.from_pretrained(jobs.model(jobs.KINDS[kind], shared=False), two[0] / kind).eval()
    assert torch.equal(jobs.logits(lora), one[1][kind])


@pytest.mark.engines
def test_three_load_what_one_has_saved(one: Any) -> None:
    for rank in in_processes(jobs.loaded, 3, folder=one[0], kinds=KINDS):
        for kind in KINDS:
            torch.testing.assert_close(rank[kind], one[1][kind], rtol=0, atol=ROUNDING)


@pytest.mark.engines
def test_a_file_of_other_sizes_is_refused_by_all(one: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "adapter_config.json").write_bytes((one[0] / "dense" / "adapter_config.json").read_bytes())
    state = load_file(one[0] / "dense" / "adapter_model.safetensors")
    part = {key: tensor[: len(tensor) // 2] if "lora_B" in key else tensor for key, tensor in state.items()}
    save_file({key: tensor.contiguous() for key, tensor in part.items()}, tmp_path / "adapter_model.safetensors")
    for said in in_processes(jobs.misfit, 2, folder=tmp_path):
        assert "mis-shaped" in said
        assert "lora_B" in said
