"""What the README tells a newcomer to run, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[1]


# The stock arguments ask for pinned memory, with a GPU or without.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.slow
def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As they stand, in a folder laid out like a checkout; only the number of steps is cut."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for name in ("benchmarks", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)

    class ShortTrainer(transformers.Trainer):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            self.args.max_steps = 2

    monkeypatch.setattr(transformers, "Trainer", ShortTrainer)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "bfloat16" in capsys.readouterr().out
