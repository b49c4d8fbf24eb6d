"""Every example of docs/HOWTO.md runs as it stands, in a folder where others ran; only the numbers of steps, and of
rows to calibrate on, are cut."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "HOWTO.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
OPENING, *SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)
EXAMPLES = [
    pytest.param(code, id=f"{section.partition('.')[0]}{'abc'[part]}")
    for section in SECTIONS
    for part, code in enumerate(BLOCK.findall(section))
]
#: Stock arguments ask for pinned memory, with a GPU or without; TRL and peft know checkpointing by its old name.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]


def test_contents_name_every_task() -> None:
    headings = [section.partition("\n")[0] for section in SECTIONS]
    listed = re.findall(r"^\d+\. \[(.*?)\]\(#(.*?)\)$", OPENING, re.MULTILINE)
    assert [f"{number}. {title}" for number, (title, _) in enumerate(listed, start=1)] == headings
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert [anchor for _, anchor in listed] == anchors
    assert all(BLOCK.search(section) for section in SECTIONS), "a task without an example"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: what a task leaves behind must not be in another's way."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("benchmarks", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (opening,) = BLOCK.findall(OPENING)
    monkeypatch.chdir(checkout)
    program = re.sub(r"max_steps=\d+", "max_steps=2", opening + code)
    program = re.sub(r"calibration_rows=\d+", "calibration_rows=4", program)
    exec(compile(program, "docs/HOWTO.md", "exec"), {"__name__": "howto"})
