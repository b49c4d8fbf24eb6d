"""The life of an adapter on every model of the zoo, stage by stage: what works, what is refused, what fails yet."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import stages_in_memory  # each fills STAGES
import stages_low_bits  # noqa: F401
import stages_on_disk  # noqa: F401
from lives import STAGES, Life, stages_of
from zoo import FAULTS, QUICK, ZOO

FAULT_OF = {(member, stage): fault for fault in FAULTS for member in fault.members for stage in fault.stages}


def _lives() -> Iterator[object]:
    for member in ZOO.values():
        for stage in stages_of(member):
            marks = [] if member.name in QUICK else [pytest.mark.zoo]
            if member.name in QUICK and STAGES[stage].__module__ != stages_in_memory.__name__:
                marks.append(pytest.mark.slow)
            if (fault := FAULT_OF.get((member.name, stage))) is not None:
                reason = f"{fault.what}; right: {fault.right}"
                marks.append(pytest.mark.xfail(strict=True, raises=fault.error, reason=reason))
            yield pytest.param(member.name, stage, marks=marks, id=f"{member.name}: {stage}")


@pytest.fixture(scope="module")
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    room = tmp_path_factory.mktemp(request.param)
    yield Life(ZOO[request.param], room)
    shutil.rmtree(room)


@pytest.mark.parametrize(("life", "stage"), list(_lives()), indirect=["life"])
def test_life(life: Life, stage: str) -> None:
    if (refusal := life.member.refuses.get(stage)) is None:
        STAGES[stage](life)
        return
    with pytest.raises(refusal.error, match=refusal.text) as caught:
        STAGES[stage](life)
    assert caught.type is refusal.error


def test_the_tables_are_about_stages_of_members() -> None:
    refusals = [(member.name, stage) for member in ZOO.values() for stage in member.refuses]
    skipped = [(member.name, stage) for member in ZOO.values() for stage in member.impossible]
    entries = [(member, stage) for fault in FAULTS for member in fault.members for stage in fault.stages] + refusals
    assert len(entries) == len(set(entries)), "a stage is in two tables"
    assert [(member, stage) for member, stage in entries if stage not in stages_of(ZOO[member])] == []
    assert [stage for _, stage in skipped if stage not in STAGES] == []


def test_the_zoo_is_large_and_the_quick_ones_are_of_all_kinds() -> None:
    assert len(ZOO) >= 45
    assert len({ZOO[name].kind for name in QUICK}) == len(QUICK)
