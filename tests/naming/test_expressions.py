"""Regular expressions of unknown origin end in time, and mean what Python's own do."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from tiny_llama import llama

from qlora_kit import ConfigError, LoraConfig, make_plan
from qlora_kit.errors import closest
from qlora_kit.naming import Expression, Patterns, expressions

PATHS = ["", "lm_head", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.experts.3.up_proj", "a" * 60]
SLOW = [r"(a+)+$", r"(a|aa)+b", r"(.*)*x", r"(.*.*)+y", ".*" * 40 + "x", r"((a*)*)*b", r"(a|a?)+b"]


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k)_proj",
        r"model\.layers\.\d+\..*",
        r"(?:.*\.)?(?!lm_)\w+",
        r"(?P<x>a)+|.*up_proj$",
        r"^.*experts\.[0-9]{1,2}.*$",
        r"a*+",
        r"(?i).*Q_PROJ",
    ],
)
def test_it_means_what_python_s_own_means(pattern: str) -> None:
    try:
        plain = re.compile(pattern)
    except re.error:  # a possessive repeat, before Python 3.11
        pytest.skip("this Python doesn't know it")
    for path in PATHS:
        assert Expression(pattern).fullmatch(path) == (plain.fullmatch(path) is not None)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", SLOW)
def test_one_that_would_run_for_minutes_ends(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.05)
    begun = time.process_time()
    expression = Expression(pattern, "target_modules")
    for _ in range(200):
        with contextlib.suppress(ConfigError):
            expression.fullmatch("a" * 60 + "!")
    assert time.process_time() - begun < 30


@pytest.mark.slow
def test_many_that_are_each_just_quick_enough_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.002)
    monkeypatch.setattr(expressions, "_AT_ONCE", 0.0)
    monkeypatch.setattr(expressions, "_ALLOWANCE", expressions._Allowance())
    many = {rf"(?:(?:a|aa)+)+[^!a]{{{number + 1}}}": 1 for number in range(500)}
    with pytest.raises(ConfigError, match="with all before it"):
        Patterns(many).value("a" * 12 + "!", 0)


@pytest.mark.slow
def test_thousands_that_are_no_plain_names_are_refused() -> None:
    assert Patterns({f"layers.{n}.q_proj": n for n in range(50_000)}).value("layers.7.q_proj", 0) == 7
    with pytest.raises(ConfigError, match=r"at most 2,000 regular expressions, found more among 50,000"):
        Patterns({rf"layers\.{n}\..*": n for n in range(50_000)})


def test_quick_ones_take_nothing_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "_ALLOWANCE", expressions._Allowance())
    monkeypatch.setattr(expressions, "_AT_ONCE", 1.0)
    patterns = Patterns({rf"model\.layers\.{n}\..*_(q|k)": n for n in range(200)})
    assert [patterns.value(f"model.layers.{n}.to_k", -1) for n in range(200)] == list(range(200))
    assert expressions._ALLOWANCE.left() == expressions.SECONDS


def test_every_field_that_takes_one_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.05)
    slow = "(?:(?:[a-z0-9_]|[a-z0-9_.])+)+[A-Z]"
    for fields in (
        {"target_modules": slow},
        {"target_modules": "all-linear", "exclude_modules": slow},
        {"target_modules": "all-linear", "rank_pattern": {slow: 2}},
        {"target_modules": "all-linear", "alpha_pattern": {slow: 2}},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": slow},
    ):
        with pytest.raises((ConfigError, ValueError), match=r"decided in|matches no|no selected module"):
            make_plan(llama(), LoraConfig(**fields))  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"^\(\?:a\|aa\)\+\[\^!a\]: expected a regular expression that can be decided in"
    ):
        Patterns({"(?:a|aa)+[^!a]": 1}).value("a" * 60 + "!", 0)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "missing"),
        ("(" * 100_000, "nests, or repeats|too|missing|recursion"),
        ("a{1,99999999999}", "nests, or repeats"),
    ],
)
def test_what_is_none_is_said_shortly(pattern: str, said: str) -> None:
    for name, indices in (("target_modules", {}), ("layers_pattern", {"layers_to_transform": 0})):
        with pytest.raises(
            ConfigError, match=rf"{name}.*: expected a valid regular expression, found .*({said})"
        ) as error:
            LoraConfig(**{"target_modules": ["q"], name: pattern, **indices})  # type: ignore[arg-type]
        assert len(str(error.value)) < 600


def test_the_closest_of_very_many_names_are_found_in_seconds() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(100) for j in range(500)]
    begun = time.process_time()
    assert closest("model.layers.37.mlp.expert.41.up_proj.weight", names, 1) == [
        "model.layers.37.mlp.experts.41.up_proj.weight"
    ]
    assert closest("x" * 100_000, names) == []
    assert closest("name", ["x" * 100_000, "nam"]) == ["nam"]
    assert time.process_time() - begun < 30
