"""Text, tokens or batches: what a model is called with to see its inputs, and what is said where that can't be."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import VOCABULARY, t5, tiny_llama, tokens
from tiny_lm import write_tiny_lm
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel, AutoTokenizer, LlamaForCausalLM, T5Config, T5EncoderModel

from loftq.inputs.text import (
    BUILTIN,
    batches_for,
    builtin_text,
    calibration_batches,
    load_tokenizer,
    text_identity,
    token_rows,
)
from qlora_kit.config.loftq import LoftQConfig
from qlora_kit.errors import ConfigError, StorageError

CONTEXT = 256  # of the tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def model(folder: Path) -> nn.Module:
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("nothing is to be fetched")

    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.mark.usefixtures("_no_network")
@pytest.mark.slow
def test_the_builtin_text_is_the_same_each_time_and_has_prose_and_code(model: nn.Module, tokenizer: Any) -> None:
    first, second = (batches_for(BUILTIN, model, rows=6, window=64, batch=4) for _ in range(2))
    assert [tuple(batch["input_ids"].shape) for batch in first] == [(4, 64), (2, 64)]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    rows = torch.cat([batch["input_ids"] for batch in first])
    assert rows.dtype == torch.int64
    assert len({tuple(row.tolist()) for row in rows}) == 6
    texts = "".join(builtin_text(200_000))
    assert len(texts) >= 200_000
    assert "import " in texts  # code
    assert "statement" in texts  # and the language reference
    assert all(piece in texts for piece in tokenizer.decode(rows[0]).split(tokenizer.eos_token) if piece)


def test_the_builtin_text_does_not_depend_on_where_python_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = tmp_path / "test" / "my-packages" / "lib"
    for name in ("one.py", "part/two.py", "site-packages/other.py", "test/test_one.py", "part/tests/test_two.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    monkeypatch.setattr("loftq.inputs.text.sysconfig.get_path", lambda _: str(root))
    code = {text for text in builtin_text(10**9) if text.startswith("# ")}
    assert code == {"# one.py\n", "# part/two.py\n"}


def decoded(tokenizer: Any, rows: Tensor) -> list[str]:
    return [tokenizer.decode(row) for row in rows]


def test_rows_of_a_file_are_cut_evenly_from_all_of_it(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    text = "".join(f"{number:07d}," for number in range(20))  # a token a byte: 160 in all
    path.write_text(text)
    rows = token_rows(path, tokenizer, rows=3, window=16)
    # Of the ten whole rows the first, the middle and the last, ties to even.
    assert decoded(tokenizer, rows) == [text[16 * k : 16 * k + 16] for k in (0, 4, 9)]
    everything = token_rows(path, tokenizer, rows=100, window=16)
    assert "".join(decoded(tokenizer, everything)) == text


def test_a_long_file_is_sampled_from_its_beginning_to_its_end(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{number:07d}," for number in range(20_000)))
    for rows, window in ((32, 64), (2, 8), (1, 4)):
        found = decoded(tokenizer, token_rows(path, tokenizer, rows=rows, window=window))
        assert len(found) == rows
        # Characters of the file, not the marks between its pieces alone.
        assert all(sum(c in ",0123456789" for c in row) >= window - 1 for row in found)
    found = decoded(tokenizer, token_rows(path, tokenizer, rows=64, window=64))
    numbers = [int(part) for row in found for part in row.split(",") if len(part) == 7]
    assert min(numbers) < 1_000
    assert max(numbers) > 19_000
    thirds = {number * 3 // 20_000 for number in numbers}
    assert thirds == {0, 1, 2}


def test_texts_of_every_length_around_the_sampled_one_can_be_cut(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    for rows, window in ((1, 4), (1, 5), (3, 11)):
        for length in (8 * rows * window + extra for extra in (-1, 0, 1, 2, 70)):
            path.write_text("x" * length)
            assert token_rows(path, tokenizer, rows=rows, window=window).shape == (rows, window)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path: path.write_text("short"),
            r"expected at least one row of 64 tokens, found 6 tokens in all; pass a longer",
        ),
        (lambda path: path.write_bytes(b"\xff\xfe" * 99), r"expected UTF-8 text, found other bytes .*; convert it"),
        (lambda path: None, r"expected a text file or 'builtin', found no such file; correct the path"),
        (lambda path: path.mkdir(), r"expected a text file or 'builtin', found a folder; correct the path"),
    ],
    ids=["too short", "not UTF-8", "not there", "a folder"],
)
def test_a_file_that_can_t_be_used_is_refused_by_its_path(
    write: Any, message: str, tmp_path: Path, model: nn.Module
) -> None:
    path = tmp_path / "text.txt"
    write(path)
    with pytest.raises(StorageError, match=rf"^calibration {path}: {message}"):
        batches_for(path, model, rows=4, window=64)


@pytest.mark.usefixtures("_no_network")
def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    message = (
        rf"calibration: expected a tokenizer in '{tmp_path}', found none \(.+\); put the tokenizer's files beside "
        "the model, or pass token ids or batches"
    )
    with pytest.raises(StorageError, match=message):
        load_tokenizer(tmp_path)
    with pytest.raises(StorageError, match="expected a tokenizer in 'the folder of the model', found none"):
        batches_for(BUILTIN, tiny_llama(), rows=1, window=8)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            torch.zeros(4),
            r"of shape \(rows, tokens\), found torch.float32 of shape \(4,\); pass whole numbers",
        ),
        (torch.zeros(2, 3), r"token ids of shape \(rows, tokens\), found torch.float32 of shape \(2, 3\)"),
        (torch.zeros(0, 3, dtype=torch.int64), r"found torch.int64 of shape \(0, 3\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"found torch.int64 of shape \(2, 0\)"),
        (
            torch.tensor([[0, VOCABULARY]]),
            r"token ids from 0 to 63, as many as .* found 0 to 64; pass those of the model's",
        ),
        (torch.tensor([[-1, 5]]), r"token ids from 0 to 63, .* found -1 to 5; pass those"),
        (5, r"'builtin', a text file, token ids \(rows, tokens\) or batches, found int; pass calibration="),
        (3.5, r"or batches, found float"),
        ([], r"at least one batch, .* found \[\]; pass \[\{'input_ids': ...\}\]"),
        ([[1, 2, 3]], r"a dictionary of what the model is called with, found \['list'\]"),
        ({"input_ids": torch.zeros(1, 2)}, r"found \['str'\]; pass \[\{'input_ids': ...\}\]"),
    ],
    ids=lambda value: "",
)
def test_sources_of_another_kind_are_refused(source: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^calibration: expected (.* )?{message}"):
        batches_for(source, tiny_llama(), rows=4, window=8)


def test_token_ids_are_split_into_batches() -> None:
    ids = torch.randint(VOCABULARY, (11, 7), dtype=torch.int32)
    batches = batches_for(ids, tiny_llama(), rows=1, window=1, batch=4)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 3]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), ids.long())


@pytest.mark.parametrize(("rows", "sizes"), [(1, [1]), (2, [1, 1]), (7, [4, 3]), (16, [8, 8]), (17, [8, 8, 1])])
def test_calibration_of_two_rows_has_two_batches(rows: int, sizes: list[int]) -> None:
    """A text's later part is what its first is held against."""
    options = LoftQConfig(calibration=torch.ones(rows, 4, dtype=torch.int64))
    assert [len(batch["input_ids"]) for batch in calibration_batches(options, tiny_llama())] == sizes


@pytest.mark.parametrize(("sizes", "expected"), [([16], [8, 8]), ([3], [2, 1]), ([1], [1]), ([3, 1], [3, 1])])
def test_a_lone_batch_of_rows_is_parted(sizes: list[int], expected: list[int]) -> None:
    own = [
        {"input_ids": torch.ones(rows, 4, dtype=torch.int64), "attention_mask": torch.ones(rows, 4)} for rows in sizes
    ]
    found = calibration_batches(LoftQConfig(calibration=own), tiny_llama())
    assert [len(batch["input_ids"]) for batch in found] == [len(batch["attention_mask"]) for batch in found] == expected


def test_a_text_of_fewer_rows_than_asked_for_is_parted(tmp_path: Path, model: nn.Module, tokenizer: Any) -> None:
    """It would be one batch."""
    (tmp_path / "text.txt").write_text("word " * 12)
    options = LoftQConfig(calibration=tmp_path / "text.txt", calibration_rows=16, calibration_tokens=8)
    rows = token_rows(tmp_path / "text.txt", tokenizer, rows=16, window=8)
    assert 2 <= len(rows) <= 8
    found = calibration_batches(options, model)
    assert [len(batch["input_ids"]) for batch in found] == [(len(rows) + 1) // 2, len(rows) // 2]


def test_what_isn_t_rows_stays_one_batch() -> None:
    own = [{"input_ids": torch.ones(2, 4, dtype=torch.int64), "image_sizes": torch.ones(5, 2)}]
    assert len(calibration_batches(LoftQConfig(calibration=own), tiny_llama())) == 1


def test_batches_are_taken_as_they_are_and_not_written_to() -> None:
    own = tokens(padded=True)
    own[1]["use_cache"] = True
    before = [dict(batch) for batch in own]
    for source in (own, iter(own), tuple(own)):
        batches = batches_for(source, tiny_llama(), rows=1, window=1)
        assert [set(batch) for batch in batches] == [{"input_ids", "attention_mask", "use_cache"}] * 3
        # Blocks may be computed twice, and a cache would then hold everything twice.
        assert all(batch["use_cache"] is False for batch in batches)
        assert all(torch.equal(a["attention_mask"], b["attention_mask"]) for a, b in zip(batches, own, strict=True))
    assert [set(batch) for batch in own] == [set(batch) for batch in before]
    assert own[1]["use_cache"] is True


@pytest.mark.slow
def test_a_window_that_is_longer_than_the_context_is_cut_to_it(model: nn.Module) -> None:
    for window, expected in ((64, 64), (CONTEXT - 1, CONTEXT - 1), (CONTEXT, CONTEXT - 2), (4096, CONTEXT - 2)):
        [batch] = batches_for(BUILTIN, model, rows=2, window=window)
        # Two short of the longest, since some models count positions from beyond the padding token.
        assert batch["input_ids"].shape == (2, expected)
        assert model(**batch).logits.shape[1] == expected


def test_an_encoder_decoder_goes_on_from_its_own_text() -> None:
    ids = torch.randint(VOCABULARY, (2, 7))
    model = t5()
    [batch] = batches_for(ids, model, rows=1, window=1)
    assert torch.equal(batch["decoder_input_ids"], ids)
    model(**batch)
    mask = (torch.arange(7) < 5).long().expand(2, -1)
    [batch] = batches_for([{"input_ids": ids, "attention_mask": mask}], model, rows=1, window=1)
    assert torch.equal(batch["decoder_attention_mask"], mask), "its padding is padding there too"
    for given in ("labels", "decoder_input_ids"):
        [batch] = batches_for([{"input_ids": ids, given: ids[:, :3].contiguous()}], model, rows=1, window=1)
        assert set(batch) == {"input_ids", given, "use_cache"}
        model(**batch)


def test_models_are_given_only_what_they_take() -> None:
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    heads = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 24, "num_attention_heads": 2}
    ids = torch.randint(VOCABULARY, (2, 7))
    for model in (T5EncoderModel(T5Config(**sizes)), AlbertModel(AlbertConfig(vocab_size=VOCABULARY, **heads))):
        [batch] = batches_for(ids, model, rows=1, window=1)
        assert set(batch) == {"input_ids"}
        model(**batch)

    class Plain(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    assert [set(batch) for batch in batches_for(ids, Plain(), rows=1, window=1)] == [{"input_ids"}]


def test_the_identity_changes_with_the_contents_and_with_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one")
    first = text_identity(path)
    assert first.startswith("text.txt, 3 bytes, ")
    assert text_identity(str(path)) == first
    path.write_text("two")
    assert text_identity(path) != first
    path.write_text("one")
    assert text_identity(path) == first
    ids = torch.arange(6).view(2, 3)
    sources: list[Any] = [
        BUILTIN,
        ids,
        ids + 1,
        ids.view(3, 2),
        ids.int(),
        [{"input_ids": ids}],
        [{"input_ids": ids + 1}],
        [{"labels": ids}],
        [{"input_ids": ids}, {"input_ids": ids}],
    ]
    assert text_identity(BUILTIN) == f"builtin, Python {sys.version_info.major}.{sys.version_info.minor}"
    found = [text_identity(source) for source in sources]
    assert len(set(found)) == len(found)
    assert found == [text_identity(source) for source in sources]
    assert text_identity([{"input_ids": ids.clone()}]) == found[5]
