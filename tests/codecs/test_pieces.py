"""Pieces of a matrix are all of its rows, each once and in order."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.codecs import pieces


@pytest.mark.parametrize("multiple", [1, 2, 8, 64, 192])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 47), (64, 64), (100, 3), (5, 0), (0, 5)])
def test_rows(shape: tuple[int, int], multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 200)
    found = list(pieces.row_pieces(shape, multiple))
    assert [row for rows in found for row in range(rows.start, rows.stop)] == list(range(shape[0]))
    assert all(rows.start * shape[1] % multiple == 0 for rows in found)
    matrix = torch.randn(shape)
    assert torch.equal(pieces.assembled(((rows, matrix[rows]) for rows in found), shape, matrix.device), matrix)


def test_a_piece_is_of_the_size_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 200)
    assert [rows.stop - rows.start for rows in pieces.row_pieces((64, 10))] == [20, 20, 20, 4]
    assert [rows.stop - rows.start for rows in pieces.row_pieces((3, 1000))] == [1, 1, 1]
