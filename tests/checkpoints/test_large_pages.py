"""Copies that lie in memory of their own, one after the other."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from qlora_kit.checkpoints import large_pages
from qlora_kit.checkpoints.large_pages import LargePages


def test_copies_are_whole_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "_PIECE", 256)
    pages = LargePages()
    tensors = [
        torch.randn(3, 5),
        torch.randn(4, 6, dtype=torch.bfloat16).T,
        torch.arange(7, dtype=torch.int8),
        torch.empty(0, 3),
        torch.tensor(2.5),
        torch.randn(200),  # more than a piece
        torch.tensor([True, False]),
    ]
    copies = [pages.copy(tensor) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(copy, tensor)
        assert copy.is_contiguous()
    expected = [tensor.clone() for tensor in tensors]
    for number, copy in enumerate(copies):
        copy.zero_()
        assert all(torch.equal(copies[k], expected[k]) for k in range(number + 1, len(copies))), number


def test_a_system_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MAP_PRIVATE")
    assert torch.equal(LargePages().copy(torch.arange(5)), torch.arange(5))


def test_memory_is_given_back_with_the_last_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[int] = []
    real = mmap.mmap

    class Counted(real):  # type: ignore[misc,valid-type]
        def __del__(self) -> None:
            mapped.remove(id(self))

    def counted(*arguments: int, **keywords: int) -> mmap.mmap:
        memory = Counted(*arguments, **keywords)
        mapped.append(id(memory))
        return memory

    monkeypatch.setattr(mmap, "mmap", counted)
    pages = LargePages()
    first, second = pages.copy(torch.ones(10)), pages.copy(torch.ones(20))
    assert len(mapped) == 1
    del pages, first
    gc.collect()
    assert len(mapped) == 1
    assert second.sum() == 20
    del second
    gc.collect()
    assert not mapped
