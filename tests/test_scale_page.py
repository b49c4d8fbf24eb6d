"""The tables of docs/SCALE.md are what the planner says now."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
STALE = "docs/SCALE.md says something else; run python benchmarks/scale_tables.py"


@pytest.fixture(scope="module")
def written() -> dict[str, list[str]]:
    """The page's tables, by their names."""
    text, found = (ROOT / "docs" / "SCALE.md").read_text(encoding="utf-8"), {}
    while "<!-- begin " in text:
        name, _, text = text.partition("<!-- begin ")[2].partition(" -->\n")
        rows, _, text = text.partition(f"<!-- end {name} -->")
        found[name] = rows.splitlines()
    return found


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scale_tables")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["8B", *(pytest.param(name, marks=pytest.mark.engines) for name in ("70B", "405B"))])
def test_the_rows_of_a_model(name: str, tables: Any, written: dict[str, list[str]]) -> None:
    for table, rows in tables.tables([name]).items():
        assert [row for row in written[table] if row.startswith(f"| {name} |")] == rows, STALE


def test_there_is_nothing_else_in_them(tables: Any, written: dict[str, list[str]]) -> None:
    for table, head in tables.heads().items():
        assert written[table][:2] == head, STALE
        rows = len(tables.MODELS) * (1 if table == "init" else len(tables.TYPES))
        assert len(written[table]) == 2 + rows, STALE
