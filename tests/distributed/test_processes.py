"""Tests of several processes are worth what starts them: results of every rank, errors of any."""

from __future__ import annotations

import jobs_of_processes as jobs
import pytest
import torch
from processes import ProcessesError, in_processes

pytestmark = pytest.mark.slow


def test_every_rank_returns_its_own() -> None:
    results = in_processes(jobs.total, size=2, value=2.0)
    assert [float(r) for r in results] == [6.0, 6.0]
    assert all(isinstance(r, torch.Tensor) for r in results)


def test_what_a_rank_raises_is_shown() -> None:
    with pytest.raises(ProcessesError, match="rank one's own words"):
        in_processes(jobs.one_raises)


def test_a_rank_that_dies_ends_the_run() -> None:
    with pytest.raises(ProcessesError, match=r"(?s)rank 0: .*barrier"):
        in_processes(jobs.one_dies)


def test_a_rank_that_hangs_ends_the_run() -> None:
    with pytest.raises(ProcessesError, match="nothing after 15 s"):
        in_processes(jobs.one_hangs, timeout=15)
