"""What the ranks do in the tests of ``loftq init`` on several processes."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from calibrated_runs import calibrated
from disk_models import config
from small_models import gpt2, mixtral, targets, tiny_llama, tokens

import loftq.disk.replacements as replacements
from loftq.bits.budget import Budget
from loftq.disk.stream import stream
from loftq.disk.task import Task
from loftq.inputs.groups import stages
from loftq.inputs.moments import counted_statistics
from loftq.starts.report import Report
from qlora_kit.distributed.joining import joined
from qlora_kit.distributed.team import ALONE, Processes, Team

SHARD = 20_000
# Tasks whose first layers wait for no others: both processes are seen to have a share.
AT_ONCE = ("loftq", "budget")
MODELS = {"llama": tiny_llama, "gpt2": gpt2, "mixtral": mixtral}


def tasks(source: Path, out: Path) -> dict[str, Task]:
    """A task of each kind, by its name, with its output in ``out``."""
    kinds: dict[str, dict[str, Any]] = {
        "loftq": {"lora": config(2)},
        "qera": {"lora": calibrated("qera")},
        "aligned": {"lora": calibrated("aligned", targets=["embed_tokens", "q_proj", "v_proj", "down_proj"])},
        "aligned, activations in files": {"lora": calibrated("aligned", bits=3), "activation_bytes": 1},
        "budget": {"lora": config(4), "budget": Budget(2.5)},
        "budget on text": {"lora": calibrated("aligned", bits=4), "budget": Budget(3)},
    }
    return {name: Task(source, out / name, shard_bytes=SHARD, **kind) for name, kind in kinds.items()}


def by_all(source: Path, out: Path) -> dict[str, Any]:
    """Each task by all ranks; the reports' rows, and which layers this rank has started."""
    found: dict[str, Any] = {}
    Report.plot = lambda *_: None  # type: ignore[method-assign, assignment]
    start_of, own, at_work = replacements.start_of, list[str](), Path()

    def noting(request: Any, *others: Any) -> Any:
        if not own and name in AT_ONCE:  # or one has done all before the other, on a busy machine, comes for its share
            (at_work / str(team.rank)).touch()
            while len(list(at_work.iterdir())) < team.size:
                time.sleep(0.001)
        own.append(request.path)
        return start_of(request, *others)

    replacements.start_of = noting
    with joined() as team:
        for name, task in tasks(source, out).items():
            own.clear()
            at_work = out / f"at work on {name}"
            at_work.mkdir(parents=True, exist_ok=True)
            report = stream(task, team=team)
            found[name] = {"rows": rows_of(report), "started": list(own)}
        again = stream(replace(tasks(source, out)["qera"]), team=team)
        found["again"] = rows_of(again)
    return found


def rows_of(report: Report) -> list[dict[str, Any]]:
    return [{**vars(row), "seconds": 0} for row in report.layers]


def seen_of(make: Any, team: Team = ALONE, *, count: int = 3, **options: Any) -> dict[str, Any]:
    """Statistics of a small model's modules, stage by stage, each with a change for those after it to see."""
    model, found = make(), dict[str, Any]()
    for stage in stages(model, tokens(count, padded=True), targets(model), team=team, **options):
        for path, seen in stage.seen().items():
            half = None if seen.half is None else (seen.half.statistics, seen.half.cross, seen.half.shortfall)
            found[path] = (seen.statistics, seen.cross, half, seen.tokens, seen.shortfall)
            if options.get("sequential"):
                weight: Any = model.get_submodule(path).weight
                change = (0.1 * weight).detach().float()
                rotated = type(model.get_submodule(path)).__name__ in ("Conv1D", "Embedding")
                stage.replaced[path] = change.T if rotated else change
    return found


def seen_at_once(make: Any, team: Team = ALONE) -> dict[str, Any]:
    """Statistics and counts of all of a small model's modules in one pass."""
    model = make()
    return counted_statistics(model, tokens(5, padded=True), targets(model), team=team)


def seen_by_all() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with joined() as team:
        assert isinstance(team, Processes)
        for name, make in MODELS.items():
            for sequential in (False, True):
                before = team.sent
                found[name, sequential] = seen_of(make, team, sequential=sequential)
                found[name, sequential, "sent"] = team.sent - before
            found[name, "at once"] = seen_at_once(make, team)
        found["one batch"] = seen_of(tiny_llama, team, count=1, sequential=True)
    return found
