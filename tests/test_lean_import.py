"""``import qlora_kit`` is light: heavy and optional libraries come in with the feature that needs them."""

from __future__ import annotations

import pytest
from fresh import printed_by

HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "loftq",
    "matplotlib",
    "peft",
    "scipy",
    "transformers",
    "triton",
    "trl",
}
PACKAGES = ["qlora_kit", "qlora_kit.codecs", "qlora_kit.layers", "qlora_kit.compat.peft", "qlora_kit.training"]


def probe(package: str) -> str:
    # What torch itself brings in is not this toolkit's doing.
    return f"""
import sys
before = set(sys.modules)
import {package}
print(*set({sorted(HEAVY)}) & (set(sys.modules) - before))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, str]:
    return printed_by(map(probe, PACKAGES))


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_lean(package: str, imported: dict[str, str]) -> None:
    found = sorted(imported[probe(package)].split())
    assert not found, f"import {package} also imports {found}"
