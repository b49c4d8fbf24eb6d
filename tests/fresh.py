"""Short scripts, each in a Python of its own that has loaded torch and nothing above it.

Most of a fresh Python's time goes into loading torch, so one process loads it and forks for every script.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

FORKS = """
import importlib, json, os, sys, traceback
scripts, modules = json.load(sys.stdin)
for name in modules:
    importlib.import_module(name)
for script in scripts:
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        status = 1
        try:
            exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writer)
    printed = open(reader).read()
    print(json.dumps([os.waitpid(child, 0)[1], printed]))
"""


def printed_by(scripts: Iterable[str], loaded: Iterable[str] = ("torch",)) -> dict[str, str]:
    """What each script prints, by the script; an error in one of them is an AssertionError with its traceback."""
    scripts = list(scripts)
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps([scripts, list(loaded)]),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for script, (status, printed) in zip(scripts, results, strict=True):
        assert status == 0, f"{script}\n{printed}"
    return {script: printed for script, (_, printed) in zip(scripts, results, strict=True)}
