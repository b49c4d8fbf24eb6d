"""The tests marked ``cuda``, in a process of pytest's; only the files that have some are imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .sizes import Sizes

ROOT = Path(__file__).resolve().parents[2]
OWN = "tests/cuda"
PROCESSES = min(12, os.cpu_count() or 1)


def files(folder: str) -> list[str]:
    """Test files under ``OWN``, or all others that say ``mark.cuda``; without bitsandbytes none that can't be imported
    then."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        importable = find_spec("bitsandbytes") or not re.search(r"^(from|import) bitsandbytes", text, re.MULTILINE)
        if "mark.cuda" in text and importable:
            found.append(path.relative_to(ROOT).as_posix())
    return [name for name in found if name.startswith(f"{OWN}/") == (folder == OWN)]


def measured(sizes: Sizes, folder: str) -> Iterator[dict[str, Any]]:
    if find_spec("pytest") is None:
        yield {"skipped": "pytest isn't installed; the numerics above are what was checked"}
        return
    options = ["-m", "cuda", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-W", "default"]
    if sizes.device != "cuda":
        options += ["--collect-only"]
    else:
        options += ["-v", *(["-n", str(PROCESSES)] if find_spec("xdist") else [])]
    command = [sys.executable, "-m", "pytest", *options, *files(folder)]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # a pool a process takes longer to start
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last, failed = "", []
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip("= \n") if re.search(r"\d (passed|failed|error|skipped|tests? collected)", line) else last
        failed += re.findall(r"^(?:FAILED|ERROR) (tests\S+)", line)
    status = process.wait()
    yield {"tests": last, "failed": ", ".join(failed), "met": status == 0, "checked": True}
