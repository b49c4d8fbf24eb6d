"""Here the form is what the test is about; the others of this folder's parent run on each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import qlora_kit


@pytest.fixture(autouse=True)
def form() -> Iterator[str]:
    with qlora_kit.set_branch("fused"):
        yield "fused"
