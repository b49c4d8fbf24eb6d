"""Every test of layers on both forms of the branch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import qlora_kit


@pytest.fixture(autouse=True, params=["plain", "fused"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    with qlora_kit.set_branch(request.param):
        yield request.param
