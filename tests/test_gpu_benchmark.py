"""``benchmarks/gpu.py``, seldom run in earnest, on next to no sizes: every part, the budget, and the script."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


#: How many rows each part gives, and columns that hold a positive number where a model adapted by us is measured.
EXPECTED: dict[str, tuple[int, set[str]]] = {
    "numerics": (24, {"logits", "input's gradient", "adapters' gradients"}),
    "step-nf4": (16, {"step ms", "time / base", "time / peft", "memory / base"}),
    "decode-nf4": (3, {"ms / token", "time / base", "time / peft"}),
    "step-2bit": (16, {"step ms", "time / base", "time / peft", "memory / base"}),
    "decode-2bit": (3, {"ms / token", "time / base", "time / peft"}),
    "loftq": (2, {"full-SVD loop s", "ours s", "faster", "our error"}),
    "merge": (5, {"merge ms", "unmerge ms"}),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module:UserWarning")  # and says so
@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_every_part_gives_its_rows(name: str, gpu: Any, tmp_path: Path) -> None:
    (part,) = (part for part in gpu.PARTS if part.name == name)
    gpu.run_part(part, True, tmp_path / "rows")
    about, *rows = (json.loads(line) for line in (tmp_path / "rows").read_text().splitlines())
    count, columns = EXPECTED[name]
    assert about["device"] == "CPU, dry"
    assert len(rows) == count
    for row in rows:
        assert "skipped" not in row
        assert row.get("met") or not row.get("checked"), row
        if row.get("variant", "ours").startswith("ours"):
            assert all(row[column] > 0 for column in columns), row
        assert row.get("unmerged bit for bit", True) or row["variant"] == "peft", row


def test_every_part_is_expected_here(gpu: Any) -> None:
    assert {part.name for part in gpu.PARTS} == {*EXPECTED, "tests", "other-tests"}


def test_the_tests_are_the_files_that_are_marked(gpu: Any) -> None:
    checks = importlib.import_module("on_gpu.checks")
    own, others = checks.files(checks.OWN), checks.files("")
    assert set(own) == {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/cuda").glob("test_*.py")}
    assert {"tests/codecs/test_bnb_four_bit.py", "tests/kernels/test_cuda.py"} <= set(others)


def test_what_no_time_is_left_for_is_skipped_and_said_so(
    gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.run_all(gpu.PARTS, Namespace(out=tmp_path, minutes=0.0, dry=True)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {part["status"] for part in results["parts"].values()} == {"skipped"}
    assert "## merge\n\nskipped: 0 s were left" in (tmp_path / "table.md").read_text()
    assert "numerics: 0 s left" in capsys.readouterr().out


def test_a_part_that_hangs_or_fails_is_a_failure(gpu: Any, tmp_path: Path) -> None:
    part = gpu.PARTS[0]
    with (tmp_path / "log").open("w") as log:
        result, about = gpu.outcome(part, 0.05, True, log)
    assert (result["status"], result["why"], result["rows"], about) == ("failed", "stopped after 0 s", [], {})
    with (tmp_path / "log").open("w") as log:
        assert gpu.watched([sys.executable, "-c", "raise SystemExit(3)"], 60, log) == 3


@pytest.mark.slow
def test_the_script(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "WHEELS": str(tmp_path / "none")}
    command = ["bash", "benchmarks/gpu.sh", "--dry", "--parts", "decode-2bit", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no wheels in" in done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["about"]["device"] == "CPU, dry"
    assert results["parts"]["decode-2bit"]["status"] == "done"
    assert "| ours, fused |" in (tmp_path / "out/table.md").read_text()
    assert "==== decode-2bit" in (tmp_path / "out/log.txt").read_text()
