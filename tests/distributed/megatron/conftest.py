"""What the tests of Megatron's models look at, computed once: starting processes and libraries takes most of the time.

Each start of one or of two processes does several jobs. What they give is kept in a file, for all of pytest's own
processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs_of_megatron as jobs
import pytest
import torch
from filelock import FileLock
from processes import in_processes

#: By world size, what every rank found: job -> its results.
Runs = dict[int, list[dict[str, Any]]]


def computed(factory: pytest.TempPathFactory, worker: str, name: str, ones: Any, twos: Any) -> Runs:
    """The jobs that ``ones`` and ``twos`` make of a folder, by one process and by two."""
    pytest.importorskip("megatron.core", reason="megatron-core isn't installed: pip install 'qlora-kit[megatron]'")
    base = factory.getbasetemp()
    folder = (base if worker == "master" else base.parent) / f"megatron-{name}"
    with FileLock(f"{folder}.lock"):
        kept = folder / "runs"
        if not kept.exists():
            folder.mkdir(exist_ok=True)
            found = {1: in_processes(jobs.several, size=1, tasks=ones(folder))}
            found[2] = in_processes(jobs.several, size=2, tasks=twos(folder))
            torch.save(found, kept)
    return torch.load(kept, weights_only=False)  # type: ignore[no-any-return]


def _ones(folder: Path) -> dict[str, Any]:
    return {
        "life": ("life", {"folder": folder / "one"}),
        "linears": ("linears", {}),
        "parts": ("parts", {"folder": folder / "parts of one"}),
        "nf4": ("few_bits", {"quant_type": "nf4", "folder": folder / "nf4 of one"}),
    }


def _twos(folder: Path) -> dict[str, Any]:
    return {
        "life": ("life", {"folder": folder / "two", "loads": folder / "one"}),
        "life by sequence": ("life", {"folder": folder / "by sequence", "sequence_parallel": True}),
        "linears": ("linears", {}),
        "quantized linears": ("quantized_linears", {}),
        "dropout": ("dropout", {}),
        "parts": ("parts", {"folder": folder / "parts of two"}),
        "nf4": ("few_bits", {"quant_type": "nf4", "folder": folder / "nf4 of two"}),
        "refusals": ("refusals", {}),
        "exported": ("exported", {"folder": folder / "exported", "targets": jobs.WHOLE}),
        "exported parts": ("exported", {"folder": folder / "exported parts", "targets": jobs.SPLIT}),
        "alone": ("alone", {"loads": folder / "two", "folder": folder / "again"}),
    }


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Runs:
    return computed(tmp_path_factory, worker_id, "quick", _ones, _twos)


@pytest.fixture(scope="session")
def folder(runs: Runs, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where the jobs of ``runs`` wrote."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "megatron-quick"


def _more(folder: Path, size: int) -> dict[str, Any]:
    sequence = {"quant_type": "nf4", "folder": folder / f"by sequence of {size}", "sequence_parallel": size > 1}
    return {
        "others": ("others", {}),
        "signed2": ("few_bits", {"quant_type": "signed2", "folder": folder / f"signed2 of {size}"}),
        "nf4 by sequence": ("few_bits", sequence),
    }


@pytest.fixture(scope="session")
def more_runs(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Runs:
    """What takes longer."""
    return computed(tmp_path_factory, worker_id, "more", lambda f: _more(f, 1), lambda f: _more(f, 2))
