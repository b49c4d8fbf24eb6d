"""``import qlora_kit`` is light: heavy and optional libraries come in with the feature that needs them."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "loftq",
    "matplotlib",
    "peft",
    "scipy",
    "transformers",
    "trl",
}

# What torch itself brings in is not this toolkit's doing.
PROBE = """
import importlib, sys
import torch
before = set(sys.modules)
importlib.import_module(sys.argv[1])
print(*sorted(set(sys.argv[2:]) & (set(sys.modules) - before)))
"""


@pytest.mark.parametrize("package", ["qlora_kit", "qlora_kit.codecs", "qlora_kit.layers"])
def test_import_is_lean(package: str) -> None:
    result = subprocess.run([sys.executable, "-c", PROBE, package, *HEAVY], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert not result.stdout.split(), f"import {package} also imports {result.stdout.split()}"
