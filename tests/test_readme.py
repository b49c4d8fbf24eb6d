"""What the README tells a newcomer to run, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_llama
import torch
import torch.distributed as dist
import transformers
from typer.testing import CliRunner

from loftq.cli import app
from qlora_kit import LoraConfig, LoraModel, apply_lora

ROOT = Path(__file__).resolve().parents[1]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


# The stock arguments ask for pinned memory, with a GPU or without.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.slow
def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As they stand, in a folder laid out like a checkout; only the number of steps is cut."""
    block = blocks()[0]
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


@pytest.mark.slow
def test_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, by one process alone."""
    monkeypatch.chdir(tmp_path)
    lora = apply_lora(tiny_llama.llama(), LoraConfig(r=2, target_modules="all-linear"))
    names = {"torch": torch, "lora": lora, "batch": tiny_llama.batch()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exec(compile(next(b for b in blocks() if "prepare(lora" in b), "README.md", "exec"), names)
    finally:
        dist.destroy_process_group()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_loftq_from_folder_to_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with the reference model as its source, and the lines that load what it wrote."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^ {4}loftq (init .*)$", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    arguments = command.replace("DIR_OR_NAME", str(ROOT / "benchmarks" / "reference_lm")).split()
    outcome = CliRunner().invoke(app, [*arguments, "--steps", "1"])
    assert outcome.exit_code == 0, outcome.output
    names: dict[str, object] = {}
    exec(compile(next(b for b in blocks() if "loftq_init" in b), "README.md", "exec"), names)
    assert isinstance(names["lora"], LoraModel)
    for option in ("report OUT", "verify OUT --against " + str(ROOT / "benchmarks" / "reference_lm")):
        assert CliRunner().invoke(app, option.split()).exit_code == 0
