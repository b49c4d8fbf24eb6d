"""Rows of results as tables that a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HIDDEN = {"checked"}


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10 else f"{value:,.1f}"
    return "" if value is None else str(value)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; a column for each key that some row has, in the order in which they come up."""
    heads = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in HIDDEN]
    cells = [heads, ["---"] * len(heads), *([shown(row.get(key)) for key in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def report(results: Mapping[str, Any]) -> str:
    lines = ["# On a GPU", "", ", ".join(f"{key} {value}" for key, value in results["about"].items()), ""]
    for name, part in results["parts"].items():
        why = f": {part['why']}" if part.get("why") else ""
        lines += [f"## {name}", "", f"{part['status']}{why} ({part['seconds']:.0f} s)", ""]
        if part["rows"]:
            lines += [table(part["rows"]), ""]
    return "\n".join(lines)
