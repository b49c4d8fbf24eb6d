"""Lines of a journal that no run of ours writes are refused when they are read."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import JOURNALS

from qlora_kit.checkpoints.journal import Journal
from qlora_kit.checkpoints.records import check_line, read_record
from qlora_kit.errors import StorageError
from qlora_kit.merging.fidelity import LayerFidelity

PLACE = {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32], "crc32": "00000000"}
LINE = {"unit": "a", "shard": 0, "base": {"a": PLACE}, "row": None}
BAD: tuple[tuple[list[str], Any], ...] = (
    (["unit"], 5),
    (["shard"], -1),
    (["shard"], "0"),
    (["shard"], True),
    (["base"], []),
    (["base"], None),
    (["row"], []),
    (["row"], {}),
    (["base", "a"], None),
    (["base", "a", "dtype"], "F31"),
    (["base", "a", "dtype"], ["F32"]),
    (["base", "a", "shape"], [2, -3]),
    (["base", "a", "shape"], [2, 3.0]),
    (["base", "a", "data_offsets"], [8, 31]),
    (["base", "a", "data_offsets"], [8]),
)


def test_what_runs_have_written_passes() -> None:
    check_line(LINE)
    for journal in JOURNALS.glob("*/.*/journal.jsonl"):
        for line in journal.read_text().splitlines()[1:]:
            check_line(json.loads(line))


@pytest.mark.parametrize(("place", "value"), BAD)
def test_other_lines_are_refused(place: list[str], value: Any, tmp_path: Path) -> None:
    line: Any = deepcopy(LINE)
    holder = line
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(ValueError, match="a line without"):
        check_line(line)
    (tmp_path / ".work").mkdir()
    head = {"version": 1, "options": {}}
    (tmp_path / ".work" / "journal.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps(line)}\n")
    with pytest.raises(StorageError, match=r"expected a journal of JSON lines, found a damaged one \(a line without"):
        Journal(tmp_path, {"options": {}}, ".work")


def test_units_that_are_others_or_stand_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"options": {}}, ".work")
    journal.add(LINE)
    assert journal.finished(["a", "b"]) == {"a"}
    with pytest.raises(StorageError, match="'a' is no tensor of this run"):
        journal.finished(["b"])
    journal.add(LINE)
    with pytest.raises(StorageError, match="a tensor stands twice"):
        journal.finished(["a"])
    journal.close()


@pytest.mark.parametrize("data", [None, [], {}, {"path": "a"}, {"path": 5}, {"path": "a", "more": 1}])
def test_a_row_of_other_fields(data: object) -> None:
    with pytest.raises(StorageError, match=r"here: expected what a run notes of a layer .*; remove the output folder"):
        read_record(LayerFidelity, data, "here")
