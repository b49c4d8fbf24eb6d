"""Make ``journals/`` anew: a model and an adapter, and the folders of runs on them, finished and cut off.

They stand for what users have on their disks, so make them with the code of a release, and only when another release's
are to be added: the tests of today's code are about the folders that yesterday's wrote.

    python tests/data/make_journals.py
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from interrupted_runs import JOURNALS, RUNS, cut, save_sources  # noqa: E402

from loftq.starts.report import Report  # noqa: E402


def main() -> None:
    Report.plot = lambda *_: None  # type: ignore[method-assign]
    save_sources()
    for name, (run, count) in RUNS.items():
        cut(run, count, JOURNALS / f"{name}-cut")
        if name != "init":  # another of these is kept
            run(JOURNALS / f"{name}-finished")
    for file in JOURNALS.rglob("*.json"):  # where this checkout lies is nobody's business
        file.write_text(file.read_text().replace(f"{JOURNALS}/", ""))


if __name__ == "__main__":
    main()
