"""On GPUs float32 products of convolutions are rounded to 10 bits unless that is switched off; here they aren't."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import qlora_kit


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=["plain", "fused"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of the branches."""
    with qlora_kit.set_branch(request.param):
        yield request.param
