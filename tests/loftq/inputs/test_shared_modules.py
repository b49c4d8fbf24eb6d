"""Modules that several blocks hold."""

from __future__ import annotations

import pytest
from small_models import WIDTH, captured, moments, seeded, targets, vectors
from test_groups import assert_near, random_change
from torch import Tensor, nn

from loftq.inputs.groups import stages


class Sharing(nn.Module):
    """Two blocks with layers of their own, and one that both hold, as Zamba's do."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), shared, nn.Tanh()) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("sequential", [False, True])
def test_a_module_that_blocks_share_comes_last_with_the_inputs_of_all_of_them(sequential: bool) -> None:
    model, batches = seeded(Sharing), vectors()
    found = []
    for stage in stages(model, batches, targets(model), sequential=sequential):
        found.append(stage.paths)
        seen = stage.seen()[stage.paths[0]]
        stage.replaced[stage.paths[0]] = random_change(model.get_submodule(stage.paths[0]), 5)
    assert found == [["blocks.0.0"], ["blocks.1.0"], ["blocks.0.2"]]
    assert_near(seen.statistics, moments(captured(model, batches, ["blocks.0.2"])["blocks.0.2"], batches))
    assert (seen.tokens, seen.cross, seen.shortfall) == (3 * 5 * 2, None, None)
