"""Everything that only a GPU can tell, in one call of a few minutes: tests, times, memory.

Run: bash benchmarks/gpu.sh [--minutes 8] [--parts numerics step-nf4] [--out DIR]
     python benchmarks/gpu.py --dry     # all of it on a CPU with next to no sizes, so that the script can't rot

Parts run in the order of their importance, each in a process of its own that may fail or hang without harm to the
others; what no time is left for is skipped and said so. Into the folder go results.json, table.md and log.txt, written
anew after each part. The exit status is 1 where something failed; a missed aim is a result, not a failure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from on_gpu.report import report

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        module: of ``on_gpu``; its ``measured(sizes, what)`` yields rows.
        what: of it: a storage, or the tests of a folder.
        least, most: seconds without which it isn't begun, and after which it is stopped.
    """

    name: str
    module: str
    what: str
    least: int
    most: int


# In the order of importance.
PARTS = [
    Part("numerics", "numerics", "", 20, 90),
    Part("tests", "checks", "tests/cuda", 45, 150),
    Part("step-nf4", "steps", "nf4", 30, 100),
    Part("decode-nf4", "decoding", "nf4", 25, 60),
    Part("step-2bit", "steps", "2 bits", 30, 100),
    Part("decode-2bit", "decoding", "2 bits", 25, 60),
    Part("other-tests", "checks", "", 45, 120),  # most of them of kernels, which are compiled for minutes
    Part("loftq", "starts", "nf4", 30, 120),
    Part("merge", "merges", "", 20, 60),
]


def run_part(part: Part, dry: bool, rows: Path) -> None:
    """In the part's own process: what it is measured on, then its rows, a line of JSON each as soon as it is there."""
    from on_gpu.sizes import DRY, FULL

    module = importlib.import_module(f"on_gpu.{part.module}")
    with rows.open("a") as file:
        print(json.dumps(about(dry)), file=file, flush=True)
        for row in module.measured(DRY if dry else FULL, part.what):
            print(row, flush=True)
            print(json.dumps(row), file=file, flush=True)


def about(dry: bool) -> dict[str, str]:
    import torch

    found = {"device": "CPU, dry" if dry else torch.cuda.get_device_name(), "python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "pytest"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def outcome(part: Part, seconds: float, dry: bool, log: IO[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The part's status, why, seconds and rows; and what it was measured on."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        command = [sys.executable, __file__, "--only", part.name, "--rows", str(rows), *(["--dry"] if dry else [])]
        status = watched(command, seconds, log)
        lines = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    found, *rest = lines or [{}]
    result = {"status": "done", "why": "", "seconds": time.monotonic() - began, "rows": rest}
    if wrong := [row for row in rest if row.get("checked") and not row["met"]]:
        result |= {"status": "failed", "why": f"{len(wrong)} of {len(rest)} checks"}
    if status is None:
        result |= {"status": "failed", "why": f"stopped after {seconds:.0f} s"}
    elif status:
        result |= {"status": "failed", "why": f"exit status {status}, see log.txt"}
    elif rest and all("skipped" in row for row in rest):
        result |= {"status": "skipped", "why": rest[0]["skipped"]}
    return result, found


def watched(command: list[str], seconds: float, log: IO[str]) -> int | None:
    """The exit status of ``command``, whose output goes into ``log``; None where it and its children were stopped."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_all(parts: list[Part], options: argparse.Namespace) -> int:
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    results: dict[str, Any] = {"about": {}, "parts": {}}
    with (out / "log.txt").open("w") as log:
        for part in parts:
            left = max(ends - time.monotonic(), 0.0)
            print(f"{part.name}: {left:.0f} s left ...", end=" ", flush=True)
            print(f"\n==== {part.name}", file=log, flush=True)
            if left < part.least:
                result = {"status": "skipped", "why": f"{left:.0f} s were left", "seconds": 0.0, "rows": []}
            else:
                result, found = outcome(part, min(left, part.most), options.dry, log)
                results["about"] = found or results["about"]
            results["parts"][part.name] = result
            print(f"{result['status']} {result['why']} ({result['seconds']:.0f} s)", flush=True)
            (out / "results.json").write_text(json.dumps(results, indent=1))
            (out / "table.md").write_text(report(results))
    print(f"\n{report(results)}\nin {out}: results.json, table.md, log.txt")
    return int(any(part["status"] == "failed" for part in results["parts"].values()))


def main() -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_out")))
    parser.add_argument("--dry", action="store_true", help="on the CPU, with next to no sizes")
    parser.add_argument("--only", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = {part.name: part for part in PARTS if part.name in options.parts}
    if options.only:
        run_part(chosen[options.only], options.dry, options.rows)
        return 0
    if not options.dry:
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device is to be seen; --dry runs all of it on the CPU", file=sys.stderr)
            return 2
    return run_all(list(chosen.values()), options)


if __name__ == "__main__":
    sys.exit(main())
