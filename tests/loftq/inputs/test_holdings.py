"""Who holds which memory: sums that are those of counting all of it, and work that grows with the batches alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import seeded, stack, targets, vectors
from test_groups import random_change

from loftq.inputs import walk as walks
from loftq.inputs.groups import stages
from loftq.inputs.holdings import Holdings


def test_sums_follow_what_each_says_it_has_now() -> None:
    held, one, two = Holdings(), torch.zeros(10), torch.zeros(100)
    held.note(0, [one, one.view(2, 5)])
    held.note(1, [one, two])
    assert (held.nbytes, held.of(0), held.of(1), held.of(2)) == (480, 40, 440, 0)
    held.note(1, [two], counts=False)
    assert (held.nbytes, held.of(1)) == (40, 0)
    held.note(1, [two])
    held.note(0, [])
    assert held.nbytes == 400


def test_a_storage_is_shared_while_another_has_it_too() -> None:
    held, one = Holdings(), torch.zeros(10)
    address = one.untyped_storage().data_ptr()
    held.note(0, [one])
    assert not held.shared(0, address)
    assert held.shared(1, address)
    held.note(1, [one[2:]], counts=False)
    assert held.shared(0, address)
    held.note(1, [])
    assert not held.shared(0, address)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_what_is_held_is_looked_at_so_often_for_each_batch_however_many_there_are(
    sequential: bool, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    counted = walks.floats
    monkeypatch.setattr(walks, "floats", lambda tree: looks.append(1) or counted(tree))

    def of(count: int) -> int:
        looks.clear()
        model = seeded(stack)
        options = {"sequential": sequential, "limit": limit, "folder": tmp_path}
        for stage in stages(model, vectors(count), targets(model), **options):
            for path in stage.seen():
                stage.replaced[path] = random_change(model.get_submodule(path), 0)
        return len(looks)

    few, some, many = of(6), of(12), of(24)
    assert many - some == 2 * (some - few) > 0
