"""Holds the arrows: a module may import what is left of it in ``ORDER``, never what is right of it.

The imports are read from the source, so those inside functions count as much as those at the top. A module
named in a string, as the registries do for what they import on demand, counts too: a late import is still a
dependency.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("qlora_kit", "loftq")

# Left to right; a name stands for the module or the whole package. Within a group imports are free of cycles.
ORDER = [
    ["qlora_kit.errors"],
    [
        "qlora_kit.files",
        "qlora_kit.checks",
        "qlora_kit.peft_json",
        "qlora_kit.architectures",
        "qlora_kit.on_import",
        "qlora_kit.pipeline",
        "qlora_kit.finite",
        "qlora_kit.journal",
        "qlora_kit.spill",
    ],
    ["qlora_kit.loftq_config"],
    ["qlora_kit.config"],
    ["qlora_kit.lowrank", "qlora_kit.codecs", "qlora_kit.shards", "qlora_kit.shard_writer"],
    ["qlora_kit.layers"],
    ["qlora_kit.targets", "qlora_kit.inject", "qlora_kit.proxy", "qlora_kit.biases"],
    ["qlora_kit.initializers"],
    ["qlora_kit.algebra"],
    [
        "qlora_kit.model",
        "qlora_kit.combining",
        "qlora_kit.combined_config",
        "qlora_kit.backbone",
        "qlora_kit.hf_quantizer",
        "qlora_kit.quantize",
        "qlora_kit.merging",
        "qlora_kit.merge_task",
        "qlora_kit.merge_layer",
        "qlora_kit.merged_model",
        "qlora_kit.merge_advice",
        "qlora_kit.requantize",
        "qlora_kit.residual",
        "qlora_kit.base_choice",
        "qlora_kit.agreement",
        "qlora_kit.fidelity",
        "qlora_kit.fidelity_plot",
        "qlora_kit.originals",
        "qlora_kit.persistence",
        "qlora_kit.adapter_folder",
        "qlora_kit.storage",
        "qlora_kit.kbit",
        "qlora_kit.training",
    ],
    [
        "qlora_kit.model_folder",
        "qlora_kit.sharded_output",
        "qlora_kit.stored",
        "qlora_kit.combine_files",
        "qlora_kit.renamings",
        "qlora_kit.trained_config",
        "qlora_kit.merge_settings",
        "qlora_kit.merge_ties",
        "qlora_kit.merge_files",
        "qlora_kit.merge_verify",
        "qlora_kit.merge_unit",
        "qlora_kit.merge_plan",
        "qlora_kit.merge_changes",
        "qlora_kit.merge_base",
        "qlora_kit.stored_model",
        "qlora_kit.checkpoint_pair",
        "qlora_kit.extract_report",
        "qlora_kit.extract_contents",
        "qlora_kit.extract_files",
        "qlora_kit.compat",
    ],
    ["qlora_kit"],  # the public list: the modules above don't go through it
    ["loftq"],
    ["qlora_kit.command_group", "loftq.cli", "qlora_kit.cli", "qlora_kit.demo", "qlora_kit.__main__"],
]
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}

# Starts and roundings that are LoftQ's are known by name, and it is imported only when one of them is asked for.
LATE = {("qlora_kit.initializers", "loftq"), ("qlora_kit.requantize", "loftq")}

# A library with one home: the modules that may import it. peft is a peer for tests and benchmarks only.
HOMES = {"bitsandbytes": {"qlora_kit.codecs.bnb"}, "peft": set()}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))}


def rank_of(module: str) -> int:
    """The place of ``module`` in ORDER: of the longest listed name that it is or lies under."""
    name = module
    while name not in RANK or (name in PACKAGES[:1] and name != module):
        assert "." in name, f"{module} has no place in ORDER; give it one"
        name = name.rpartition(".")[0]
    return RANK[name]


def type_checking_lines(tree: ast.AST) -> set[int]:
    """Lines under ``if TYPE_CHECKING:``."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for line in range(statement.lineno, statement.end_lineno + 1)
    }


def imports(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[tuple[str, bool]]:
    """Every (imported module, imported by statement at run time) of ``source``, wherever it stands."""
    tree = ast.parse(source)
    typing_only = type_checking_lines(tree)
    for node in ast.walk(tree):
        runtime = getattr(node, "lineno", 0) not in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, runtime
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:  # `from package import module` imports the module
                full = f"{base}.{alias.name}"
                yield (full if full in known else base), runtime
        elif isinstance(node, ast.Constant) and "." in str(node.value) and node.value in known:
            yield node.value, False


def imports_of(module: str) -> list[tuple[str, bool]]:
    file = FILES[module]
    return list(imports(file.read_text(), module, file.name == "__init__.py", set(FILES)))


def internal(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES


@pytest.mark.parametrize("module", FILES)
def test_imports_only_what_is_left_of_it(module: str) -> None:
    wrong = [
        name
        for name, _ in imports_of(module)
        if internal(name)
        and rank_of(name) > rank_of(module)
        and not any(module == user and (name + ".").startswith(late + ".") for user, late in LATE)
    ]
    assert not wrong, f"{module} imports {wrong}, which come after it in ORDER"


@pytest.mark.parametrize("library", HOMES)
def test_a_library_with_one_home_is_imported_nowhere_else(library: str) -> None:
    users = {m for m in FILES if any(name.partition(".")[0] == library for name, _ in imports_of(m))}
    strangers = {user for user in users if not any(f"{user}.".startswith(f"{home}.") for home in HOMES[library])}
    assert not strangers, f"{sorted(strangers)}: {library} may be imported only by {sorted(HOMES[library])}"


def test_no_cycles_at_run_time() -> None:
    graph: dict[str, set[str]] = {}
    for module in FILES:
        needed = {name for name, runtime in imports_of(module) if runtime and name in FILES}
        # A package's own modules reach each other past its __init__, whose list of names imports them.
        graph[module] = {n for n in needed if n != module and not module.startswith(n + ".")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import bitsandbytes as bnb", "bitsandbytes"),
        ("def f():\n    from peft import LoraConfig", "peft"),
        ("from ..errors import ConfigError", "qlora_kit.errors"),
        ("from .. import errors", "qlora_kit.errors"),
        ("from . import base", "qlora_kit.codecs.base"),
        ("ON_DEMAND = {'library': 'qlora_kit.codecs.base'}", "qlora_kit.codecs.base"),
    ],
)
def test_every_way_to_import_is_seen(source: str, expected: str) -> None:
    known = {"qlora_kit", "qlora_kit.errors", "qlora_kit.codecs", "qlora_kit.codecs.base"}
    found = imports(source, "qlora_kit.codecs.bnb", False, known)
    assert expected in {name for name, _ in found}


def test_typing_imports_are_told_apart() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .model import LoraModel\n"
    assert ("qlora_kit.model", False) in set(imports(source, "qlora_kit.storage", False, {"qlora_kit.model"}))
