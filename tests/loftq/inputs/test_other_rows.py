"""Rows of a text that a start hasn't looked at: apart from its own as long as there are others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_runs import add_tokenizer

from loftq.inputs.other_rows import other_rows
from loftq.inputs.text import load_tokenizer, token_rows
from qlora_kit.errors import StorageError

WORDS = 4000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(add_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocabulary=WORDS))


def numbered(file: Path, words: int) -> Path:
    """Words that come once each, so that their numbers say where in the text a row is of."""
    file.write_text(" ".join(f"w{number}" for number in range(1, words + 1)))
    return file


@pytest.mark.parametrize("looked_at", [(20, 10), (10, 20), (4, 50)])
def test_they_share_no_token_with_the_start_s(looked_at: tuple[int, int], tokenizer: Any, tmp_path: Path) -> None:
    text = numbered(tmp_path / "text.txt", 3000)
    seen = set(token_rows(text, tokenizer, rows=looked_at[0], window=looked_at[1]).flatten().tolist())
    found = other_rows(text, tokenizer, rows=20, window=10, looked_at=looked_at)
    assert found.shape == (20, 10)
    assert len(seen & set(found.flatten().tolist())) <= 20, "a row may touch the end of one"
    assert len(set(found.flatten().tolist())) > 190, "none twice, but for words that are cut where the text is"
    assert found.min() < 700, "from all over the text"
    assert found.max() > 2300


def test_where_there_are_no_others_the_start_s_come_besides(tokenizer: Any, tmp_path: Path) -> None:
    text = numbered(tmp_path / "text.txt", 100)
    found = other_rows(text, tokenizer, rows=6, window=10, looked_at=(8, 10))
    seen = {int(row[0]) for row in token_rows(text, tokenizer, rows=8, window=10)}
    assert found.shape == (6, 10)
    assert sum(int(row[0]) in seen for row in found) == 4, "two of ten are others"
    everything = other_rows(text, tokenizer, rows=100, window=10, looked_at=(100, 10))
    assert torch.equal(everything, token_rows(text, tokenizer, rows=100, window=10))


def test_a_text_too_short_for_the_start_is_new_to_it(tokenizer: Any, tmp_path: Path) -> None:
    text = numbered(tmp_path / "text.txt", 60)
    found = other_rows(text, tokenizer, rows=3, window=10, looked_at=(128, 512))
    assert found.shape == (3, 10)
    with pytest.raises(StorageError, match="expected at least one row of 512 tokens"):
        other_rows(text, tokenizer, rows=3, window=512, looked_at=(128, 512))
    with pytest.raises(StorageError, match="no such file"):
        other_rows(tmp_path / "nowhere", tokenizer, rows=3, window=10, looked_at=(3, 10))
