"""Holds the arrows between rooms: a room may import rooms of the lines above its own in ``FLOORS``, and no others.

The imports are read from the source, so those inside functions and under ``TYPE_CHECKING`` count as much as those at
the top. A module named in a string, as the registries do for what they import on demand, counts too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("qlora_kit", "loftq")

# A room is a folder or a single module. Rooms of one line don't know each other.
FLOORS = """
errors compat.neighbours kernels
codecs naming
checkpoints lowrank
config layers
injection hf_quantizer
initializers lowrank.algebra training.preparation training
adapter_files
merging
model
folders compat training.planner distributed
qlora_kit
loftq.methods
loftq.inputs
loftq.starts
loftq.bits loftq.distillation
loftq.disk
loftq
demo
cli
loftq.cli
__main__ loftq.__main__
"""
MOST_FILES = 20

# Starts and roundings that are LoftQ's are known by name, and it is imported only when one of them is asked for.
LATE = {("qlora_kit.initializers", "loftq"), ("qlora_kit.merging.requantize", "loftq")}

# A library with one home: the modules that may import it. peft is a peer for tests and benchmarks only; types of
# Megatron's and TransformerEngine's are known by their names.
HOMES = {
    "bitsandbytes": {"qlora_kit.codecs.bnb", "qlora_kit.training.optimizers.named"},
    "megatron": set(),
    "peft": set(),
    "transformer_engine": set(),
    "triton": {"qlora_kit.kernels.triton_code"},
}


def full(room: str) -> str:
    return room if room.partition(".")[0] in PACKAGES else f"qlora_kit.{room}"


FLOOR = {full(room): floor for floor, line in enumerate(FLOORS.strip().splitlines()) for room in line.split()}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))}


def room_of(module: str) -> str:
    """The room that ``module`` is or lies in. ``qlora_kit``'s own list of names is a room of itself."""
    name = module
    while name not in FLOOR or (name == "qlora_kit" and name != module):
        assert "." in name, f"{module} lies in no room of FLOORS; give it one"
        name = name.rpartition(".")[0]
    return name


def imports(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[str]:
    """Every module that ``source`` imports, wherever in it that stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:  # `from package import module` imports the module
                full_name = f"{base}.{alias.name}"
                yield full_name if full_name in known else base
        elif isinstance(node, ast.Constant) and "." in str(node.value) and node.value in known:
            yield node.value


@cache
def imports_of(module: str) -> list[str]:
    """Every module that ``module`` imports, but for those in ``LATE``."""
    file = FILES[module]
    found = imports(file.read_text(), module, file.name == "__init__.py", set(FILES))
    return [n for n in found if not any(module == user and f"{n}.".startswith(f"{late}.") for user, late in LATE)]


@pytest.mark.parametrize("module", FILES)
def test_a_room_knows_only_rooms_above_it(module: str) -> None:
    own = room_of(module)
    others = {room_of(name) for name in imports_of(module) if name.partition(".")[0] in PACKAGES} - {own}
    wrong = sorted(room for room in others if FLOOR[room] >= FLOOR[own])
    assert not wrong, f"{module}, of {own}, imports from {wrong}, which aren't above it in FLOORS"


def test_no_circles() -> None:
    graph = {module: {name for name in imports_of(module) if name in FILES} - {module} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_holds_what_one_can_overlook(package: str) -> None:
    folders = [ROOT / package, *(path for path in (ROOT / package).rglob("*") if path.is_dir())]
    entries = {f: [*f.glob("*.py"), *f.glob("*/__init__.py")] for f in folders}
    sizes = {str(f.relative_to(ROOT)): sum(e.parent != f or e.name[0] != "_" for e in entries[f]) for f in folders}
    crowded = {folder: size for folder, size in sizes.items() if size > MOST_FILES}
    assert not crowded, f"more than {MOST_FILES} modules and rooms in a folder: {crowded}"


@pytest.mark.parametrize("library", HOMES)
def test_a_library_with_one_home_is_imported_nowhere_else(library: str) -> None:
    users = {m for m in FILES if any(name.partition(".")[0] == library for name in imports_of(m))}
    strangers = {user for user in users if not any(f"{user}.".startswith(f"{home}.") for home in HOMES[library])}
    assert not strangers, f"{sorted(strangers)}: {library} may be imported only by {sorted(HOMES[library])}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import bitsandbytes as bnb", "bitsandbytes"),
        ("def f():\n    from peft import LoraConfig", "peft"),
        ("if TYPE_CHECKING:\n    from ..errors import ConfigError", "qlora_kit.errors"),
        ("from .. import errors", "qlora_kit.errors"),
        ("from . import base", "qlora_kit.codecs.base"),
        ("ON_DEMAND = {'library': 'qlora_kit.codecs.base'}", "qlora_kit.codecs.base"),
    ],
)
def test_every_way_to_import_is_seen(source: str, expected: str) -> None:
    known = {"qlora_kit", "qlora_kit.errors", "qlora_kit.codecs", "qlora_kit.codecs.base"}
    assert expected in set(imports(source, "qlora_kit.codecs.bnb", False, known))
