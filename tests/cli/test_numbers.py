"""Numbers as they are typed on a command line."""

from __future__ import annotations

import re

import pytest

from qlora_kit import ConfigError
from qlora_kit.cli.numbers import gigabytes, parse_bytes, size_or_word, whole_numbers


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * 2**30),
        ("500MB", 500 * 10**6),
        (" 1.5 kib ", 1536),
        ("300000", 300_000),
        (".5KB", 500),
        ("7b", 7),
        ("1.005KB", 1005),
        ("9007199254740993", 2**53 + 1),
        ("2MiB", 2 * 2**20),
        ("3gb", 3 * 10**9),
    ],
)
def test_sizes_are_read_exactly(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4TB", "-4GB", "4,5GB", "1e9", "four", "4 G B", "\u00b2GB", "9" * 5000])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--memory: expected a number with B, KB, .*found {re.escape(repr(text))}"):
        parse_bytes(text, "--memory")


def test_a_unit_that_was_forgotten_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"^--memory: expected a size with its unit, found '12'; pass 12GiB, or 12B"):
        parse_bytes("12", "--memory")
    assert parse_bytes("1024") == 1024


@pytest.mark.parametrize("size", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_of_gigabytes(size: float) -> None:
    with pytest.raises(ConfigError, match=rf"^--shard-size: expected a number of GB, found {size}; pass --shard-size"):
        gigabytes(size, "--shard-size")
    assert gigabytes(1e-12, "--shard-size") == 1
    assert gigabytes(0.5, "--shard-size") == 500_000_000


@pytest.mark.parametrize("text", ["", ",", "8,x", "8 16", "\u00b2", "-8", "9" * 5000])
def test_what_is_no_list_of_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--ranks: expected whole numbers with commas between, found"):
        whole_numbers(text, "--ranks")
    assert whole_numbers(" 8, 16,", "--ranks") == (8, 16)
    assert whole_numbers(None, "--ranks") == ()


def test_a_size_or_a_word() -> None:
    assert [size_or_word(text) for text in ("64", "row", "\u00b2", None)] == [64, "row", "\u00b2", None]
