"""Every test of layers on both forms of the branch; the plain one, which is the reference, in the long run only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import qlora_kit


@pytest.fixture(autouse=True, params=[pytest.param("plain", marks=pytest.mark.slow), "fused"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    with qlora_kit.set_branch(request.param):
        yield request.param
