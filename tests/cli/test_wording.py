"""What a function says, in the words of a command: the rules, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from qlora_kit.cli.wording import Option, Wording, wording_of

WORDS = Wording(
    {
        "into": Option("--into"),
        "rank": Option("--rank"),
        "energy": Option("--energy"),
        "r": Option("--rank"),
        "whole": Option("--whole"),
        "weights": Option("--weight", repeated=True),
        "quant_type": Option("--quant-type"),
        "force": Option("--force", flag=True),
        "double_quant": Option("--double-quant", "--single-quant", flag=True),
        "check_backbone": Option("--any-base", flag=True).negated(),
    },
    {"into", "force", "allow_pickle", "rank_pattern", "scratch"},
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # a value
        ("into='nf4': expected bits", "--into nf4: expected bits"),
        ("pass into='same'", "pass --into same"),
        ("pass rank=32, say", "pass --rank 32, say"),
        ("try energy=0.9.", "try --energy 0.9."),
        ("pass whole=['norm', 'lm_head']", "pass --whole norm,lm_head"),
        ("found weights=[0.5, -1.0]", "found --weight 0.5 --weight -1.0"),
        ("into='.*x y'", "--into '.*x y'"),
        ("pass whole=NAMES", "pass --whole NAMES"),
        ("found rank=None and weights=()", "found no --rank and no --weight"),
        # a flag
        ("or force=True", "or --force"),
        ("found force=False", "found no --force"),
        ("double_quant=True, double_quant=False", "--double-quant, --single-quant"),
        ("or pass check_backbone=False (twice)", "or pass --any-base (twice)"),
        ("found check_backbone=True", "found no --any-base"),
        # a name alone
        ("rank, energy: expected one of the two", "--rank, --energy: expected one of the two"),
        ("model.fc: rank: expected 1", "model.fc: --rank: expected 1"),
        ("leave quant_type out", "leave --quant-type out"),
        ("lower r, or raise the rank", "lower --rank, or raise the rank"),
        ("expected None, found 3", "expected none, found 3"),
        # what only looks like one
        ("out/into: expected a folder", "out/into: expected a folder"),
        ("'quant_type' and x.quant_type and my_quant_type", "'quant_type' and x.quant_type and my_quant_type"),
        ("config.rank=3", "config.rank=3"),
        ("f(r=3)", "f(r=3)"),
        ("sqrt(r) r.weight r=x", "sqrt(r) r.weight --rank x"),
    ],
)
def test_what_the_command_has_an_option_for(text: str, expected: str) -> None:
    assert WORDS(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("found a; pass allow_pickle=True", "found a"),
        ("found a; save it, or pass allow_pickle=True if you trust it", "found a; save it"),
        ("found a; pass scratch=FOLDER, save it, or pass force=True", "found a; save it, or pass --force"),
        ("found a; save it, free some, or pass scratch=FOLDER", "found a; save it or free some"),
        ("found a; lower r, for this one with rank_pattern if need be", "found a; lower --rank"),
        ("found a; b; pass into='same' or allow_pickle=True", "found a; b; pass --into same"),
        ("found allow_pickle=3; save it", "found allow_pickle=3; save it"),
        ("found a; save it (save_embedding_layers=False)", "found a; save it (save_embedding_layers=False)"),
        ("one; pass allow_pickle=True\ntwo; pass force=True", "one\ntwo; pass --force"),
    ],
)
def test_what_it_has_no_option_for_is_not_advised(text: str, expected: str) -> None:
    assert WORDS(text) == expected


def test_a_folder_may_be_called_as_an_argument_is() -> None:
    words = Wording({"base": Option("--base"), "out": Option("--out")}, set(), {"base"})
    assert words("base: expected a folder") == "base: expected a folder"
    assert words("out: expected a folder, found base=3") == "--out: expected a folder, found --base 3"


@dataclass
class Settings:
    kind: str
    secret: int = 0


def work(sources: list[str], *, kind: str, check: bool, rank: int, hidden: bool = False) -> None: ...


def test_the_words_are_read_from_the_command_and_its_functions() -> None:
    app, found = typer.Typer(), []

    @app.command()
    def command(
        context: typer.Context,
        folders: Annotated[list[str], typer.Argument(metavar="DIR...")],
        way: Annotated[str, typer.Option("--type")] = "svd",
        sizes: Annotated[list[int], typer.Option("--rank")] = [],  # noqa: B006 - typer's way
        any_base: Annotated[bool, typer.Option("--any-base")] = False,
        fast: Annotated[bool, typer.Option("--fast/--slow")] = True,
    ) -> None:
        renamed = {"sources": "folders", "kind": "way", "check": "not any_base", "rank": "sizes"}
        found.append(wording_of(context, (work, Settings), renamed))

    outcome = CliRunner().invoke(app, ["kind", "--type", "exact"])
    assert outcome.exit_code == 0, outcome.output
    (words,) = found
    assert words("sources: none; kind='svd', check=False, rank=[1, 2]") == (
        "DIR: none; --type svd, --any-base, --rank 1 --rank 2"
    )
    assert words("fast=True fast=False") == "--fast --slow"
    assert words("found a; pass hidden=True, secret=1 or kind='x'") == "found a; --type x"
