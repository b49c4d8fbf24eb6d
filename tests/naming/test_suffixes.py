"""Names by last components: the tables against the plain definition, on all names that paths can have."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_kit.naming import Patterns, Suffixes, ends_with, pattern_value
from qlora_kit.naming.suffixes import suffixes

COMPONENT = st.sampled_from(["a", "b", "ab", "0", "q_proj"])
PATH = st.lists(COMPONENT, min_size=1, max_size=4).map(".".join)


def test_a_name_means_whole_components() -> None:
    assert list(suffixes("layers.0.q_proj")) == ["q_proj", "0.q_proj", "layers.0.q_proj"]
    assert ends_with("layers.0.q_proj", "q_proj")
    assert ends_with("q_proj", "q_proj")
    assert not ends_with("layers.0.q_proj", "proj")
    assert not ends_with("layers.10.q_proj", "0.q_proj")


@given(st.lists(PATH, max_size=6), st.lists(PATH, max_size=3))
def test_tables_say_what_ends_with_says(paths: list[str], names: list[str]) -> None:
    table = Suffixes(paths)
    unique = list(dict.fromkeys(paths))
    assert table.matching(names) == [path for path in unique if any(ends_with(path, name) for name in names)]
    for name in names:
        assert table.of(name) == [path for path in unique if ends_with(path, name)]
        assert (name in table) == bool(table.of(name))


def first_fit(path: str, patterns: dict[str, int]) -> int:
    """The definition, pattern by pattern."""
    for pattern, value in patterns.items():
        if ends_with(path, pattern) or re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path):
            return value
    return -1


EXPRESSION = st.sampled_from([r".*\.a", r"^a\.b", r"[ab]+\.0", r"a|b", r"(q|k)_proj"])


@given(PATH, st.dictionaries(st.one_of(PATH.filter(lambda path: "." not in path), EXPRESSION), st.integers(0, 9)))
@pytest.mark.slow
def test_the_first_pattern_that_fits_counts(path: str, patterns: dict[str, int]) -> None:
    assert Patterns(patterns).value(path, -1) == pattern_value(path, patterns, -1) == first_fit(path, patterns)


@pytest.mark.parametrize(("path", "value"), [("x.a.b", 1), ("a.b", 1), ("x.aXb", -1), ("x.b", 2), ("b", 2)])
def test_a_dot_in_a_plain_name_is_a_dot(path: str, value: int) -> None:
    assert Patterns({"a.b": 1, "b": 2}).value(path, -1) == value
