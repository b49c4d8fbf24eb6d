"""Tensors set aside on the disk come back bit for bit, and leave no file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_kit.checkpoints.spill import Spill, set_data_
from qlora_kit.errors import StorageError


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    floats = [torch.randn(3, 5).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    floats[0][0, 0], floats[0][1, 1] = float("nan"), float("-inf")
    whole = [torch.randint(-9, 9, (7,)).to(dtype) for dtype in (torch.int8, torch.int32, torch.int64)]
    others = [torch.tensor([True, False]), torch.tensor(2.5), torch.empty(0, 4), torch.arange(12.0).view(3, 4).T]
    tree = {"floats": floats, "rest": (whole, others), "plain": ["text", None, 3, torch.float32]}
    with Spill(tmp_path) as spill:
        first, second = spill.keep(tree), spill.keep(torch.ones(2))
        expected = [tensor.clone() for tensor in (*floats, *whole, *others)]
        for tensor in (*floats, *whole):
            tensor.zero_()
        for _ in range(2):  # in any order and as often as wanted
            assert second().tolist() == [1, 1]
            back = first()
            assert back["plain"] == ["text", None, 3, torch.float32]
            for found, wanted in zip((*back["floats"], *back["rest"][0], *back["rest"][1]), expected, strict=True):
                assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
                assert torch.equal(
                    found.contiguous().reshape(-1).view(torch.uint8), wanted.contiguous().reshape(-1).view(torch.uint8)
                )
        assert back["floats"][0].data_ptr() != first()["floats"][0].data_ptr(), "new tensors each time"
        parameter = torch.nn.Parameter(torch.zeros(2))
        set_data_(parameter, second)
        assert parameter.tolist() == [1, 1]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none: expected a folder that can be written to, found none .*scratch="):
        Spill(tmp_path / "none")


def test_an_error_closes_the_file(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    spill.keep(torch.ones(3))
    spill.__exit__(RuntimeError, RuntimeError("inside"), None)
    assert spill._file.closed
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_in_memory_is_bounded_and_the_rest_is_written(tmp_path: Path) -> None:
    with Spill(tmp_path) as spill:
        spill._room = 100
        small, large = torch.randn(20), torch.randn(10)  # 80 bytes, and 40 for which no room is left
        kept, written = spill.keep(small), spill.keep(large)
        assert spill._file.seek(0, 2) == large.nbytes
        expected = small.clone(), large.clone()
        small.zero_()
        large.zero_()
        assert torch.equal(kept(), expected[0])
        assert torch.equal(written(), expected[1])
        assert kept().data_ptr() != kept().data_ptr(), "new tensors each time"
