"""The repository keeps its promises: a line per file in its folder, short files, pins within the ranges."""

from __future__ import annotations

import ast
import importlib
import re
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 350


def python_files(*folders: str) -> list[str]:
    return sorted(file.relative_to(ROOT).as_posix() for folder in folders for file in (ROOT / folder).rglob("*.py"))


def rooms() -> list[str]:
    return [path for path in python_files("qlora_kit", "loftq") if path.endswith("/__init__.py") and "/" in path[:-12]]


@pytest.mark.parametrize("room", rooms())
def test_a_room_opens_with_its_table_of_contents(room: str) -> None:
    folder = (ROOT / room).parent
    entries = {f.stem for f in folder.glob("*.py") if f.stem[0] != "_"}
    entries |= {f"{f.parent.name}/" for f in folder.glob("*/__init__.py")}
    listed = re.findall(
        r"^- ``([\w/]+)``:", ast.get_docstring(ast.parse((ROOT / room).read_text())) or "", re.MULTILINE
    )
    assert sorted(listed) == sorted(entries), f"{room}: list each module as '- ``name``: what it is', and no others"


def test_readme_names_only_files_that_exist() -> None:
    named = set(re.findall(r"`((?:qlora_kit|loftq)/[\w/.]*)`", (ROOT / "README.md").read_text()))
    gone = sorted(path for path in named if not (ROOT / path).exists())
    assert not gone, f"README.md names files that don't exist: {gone}"


def resolves(dotted: str) -> bool:
    """Whether there is a module, function, class or attribute of that name."""
    first, *names = dotted.split(".")
    found = importlib.import_module(first)
    for depth, name in enumerate(names, 2):
        if not hasattr(found, name):
            try:
                importlib.import_module(".".join(dotted.split(".")[:depth]))
            except ImportError:
                return name in getattr(found, "__annotations__", {})
        found = getattr(found, name)
    return True


@pytest.mark.parametrize("file", ["CONTRIBUTING.md", *python_files("qlora_kit", "loftq")])
def test_what_a_text_refers_to_exists(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    names = set(re.findall(r"``?((?:qlora_kit|loftq)(?:\.\w+)+)", text))
    gone = [name for name in sorted(names) if not resolves(name)]
    gone += [
        path
        for path in re.findall(r"``?((?:qlora_kit|loftq|tests|benchmarks)/[\w/.]+)", text)
        if not (ROOT / path).exists()
    ]
    assert not gone, f"{file} speaks of {gone}, which aren't there"


@pytest.mark.parametrize("folder", ["qlora_kit", "loftq", "tests", "benchmarks"])
def test_files_stay_short(folder: str) -> None:
    lengths = {path: (ROOT / path).read_text().count("\n") for path in python_files(folder)}
    long = {path: lines for path, lines in lengths.items() if lines > LONGEST}
    assert not long, f"over {LONGEST} lines; split by concept: {long}"


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in parsed}


def test_every_pin_is_exact_and_public() -> None:
    for pin in pins().values():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{pin} is not exact"
        assert "+" not in specifier.version, f"{pin} names a local build that other machines can't find"


def test_the_tested_set_lies_in_the_ranges_that_users_may_have() -> None:
    pinned = pins()
    for requirement in map(Requirement, requires("qlora-kit") or []):
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt has no line for {requirement.name}"
        (specifier,) = pin.specifier
        assert requirement.specifier.contains(specifier.version), f"{pin} is outside of {requirement}"
