"""How a command ends that its user or the machine stops, and how its options are asked for."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from held import Held
from interrupted_runs import ADAPTER, BASE
from typer.testing import CliRunner

import loftq.cli
import qlora_kit.cli
from qlora_kit.checkpoints.journal import Journal

MERGE = f"merge --base {BASE} --adapter {ADAPTER} --into nf4 --force"
COMPRESS = f"compress {ADAPTER} --rank 1"
INIT = f"init --model {BASE} --rank 2 --device cpu"


def ended(command: str, out: Path, app: Any = qlora_kit.cli.app) -> tuple[int, str]:
    """Exit status of a command, and what it said."""
    outcome = CliRunner().invoke(app, [*command.split(), "--out", str(out)])
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
    assert "Traceback" not in outcome.output
    return outcome.exit_code, " ".join(outcome.stderr.split())


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("app", [qlora_kit.cli.app, loftq.cli.app])
def test_help_is_short_too(app: Any) -> None:
    for command in ([], ["merge"] if app is qlora_kit.cli.app else ["init"]):
        short, long = (CliRunner().invoke(app, [*command, option]) for option in ("-h", "--help"))
        assert short.exit_code == long.exit_code == 0
        assert short.output == long.output != ""


@pytest.mark.parametrize("app", [qlora_kit.cli.app, loftq.cli.app])
def test_help_names_every_option_in_full(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        shown = CliRunner().invoke(app, [command.name, "-h"]).output
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown
        for option in command.params:
            assert all(name in shown for name in [*option.opts, *option.secondary_opts] if name.startswith("--"))


@pytest.mark.slow
@pytest.mark.parametrize("package", ["qlora_kit", "loftq"])
def test_a_package_is_its_command(package: str) -> None:
    run = subprocess.run([sys.executable, "-m", package, "--version"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "0.1.0", "")


@pytest.mark.parametrize(
    ("app", "command", "said"),
    [
        (qlora_kit.cli.app, MERGE, "qlora-kit merge: stopped; what is finished is kept: the same command goes on from"),
        (loftq.cli.app, INIT, "loftq init: stopped; what is finished is kept: the same command goes on from there"),
    ],
)
@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(app: Any, command: str, said: str, tmp_path: Path, monkeypatch: Any) -> None:
    add = Journal.add

    def added(journal: Journal, line: Any, *, done: bool = True) -> None:
        add(journal, line, done=done)
        if len(journal.done) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", added)
        code, message = ended(command, tmp_path / "out", app)
    assert code == 130
    assert said in message
    assert not (tmp_path / "out" / "config.json").exists()
    assert ended(command, tmp_path / "out", app)[0] == 0


@pytest.mark.parametrize(
    ("function", "command"),
    [
        ("qlora_kit.folders.combine.compress_folder", COMPRESS),
        ("qlora_kit.folders.combine.combine_folders", f"combine {ADAPTER}=1"),
        ("qlora_kit.folders.extract.run.extract_folders", f"extract --base {BASE} --tuned {BASE} --rank 1"),
        ("qlora_kit.demo.run_demo", "demo"),
    ],
)
def test_ctrl_c_where_nothing_is_kept(function: str, command: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(function, stop)
    code, message = ended(command, tmp_path / "out")
    assert code == 130
    again = "which begins anew" if command == "demo" else "nothing was written; give the same command again"
    assert f"{command.split()[0]}: stopped; " in message
    assert again in message


@pytest.mark.slow
def test_a_real_ctrl_c(tmp_path: Path) -> None:
    held = Held(tmp_path / "out", 1, "qlora_kit", *MERGE.split(), "--out", tmp_path / "out")
    held.process.send_signal(signal.SIGINT)
    assert held.ended() == 130
    said = held.text()
    assert "the same command goes on from there" in " ".join(said.split())
    assert "Traceback" not in said


@pytest.mark.parametrize(("app", "command"), [(qlora_kit.cli.app, MERGE), (loftq.cli.app, INIT)])
@pytest.mark.slow
def test_a_full_disk_is_said_and_gone_on_with(app: Any, command: str, tmp_path: Path, monkeypatch: Any) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync, calls = os.fsync, iter(range(1000))

    def synced(descriptor: int) -> None:
        if next(calls) > 12:
            raise full
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        code, message = ended(command, tmp_path / "out", app)
    assert code == 1
    assert f"{tmp_path}/out/" in message
    assert "expected room for what is written, found none (No space left on device); free some: what is" in message
    assert ended(command, tmp_path / "out", app)[0] == 0


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried")])
def test_no_memory_is_said(error: BaseException, tmp_path: Path, monkeypatch: Any) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("qlora_kit.folders.combine.compress_folder", fails)
    code, message = ended(COMPRESS, tmp_path / "out")
    assert code == 1
    assert "compress: expected enough memory, found none left" in message
    assert "nothing was written; give the same command again" in message


@pytest.mark.parametrize(("app", "command"), [(qlora_kit.cli.app, MERGE), (qlora_kit.cli.app, COMPRESS)])
@pytest.mark.parametrize("place", ["/proc/nowhere/out", "/dev/null/out", "a" * 300, "file/out"])
def test_where_no_folder_can_be(app: Any, command: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, message = ended(command, tmp_path / place, app)
    assert code == 1
    assert "expected a folder that can be written to, found" in message
    assert "choose another" in message


def test_sizes_that_are_none(tmp_path: Path) -> None:
    for app, command in ((qlora_kit.cli.app, MERGE), (loftq.cli.app, INIT)):
        code, message = ended(f"{command} --shard-size inf", tmp_path / "out", app)
        assert code == 1
        assert "--shard-size: expected a number of GB, found inf; pass --shard-size 5" in message
        code, message = ended(f"{command} --shard-size nan", tmp_path / "out", app)
        assert code in (1, 2)  # an older typer lets it through
        assert "--shard-size" in message
        assert not (tmp_path / "out").exists()


def test_other_options_in_a_finished_folder(tmp_path: Path) -> None:
    assert ended(MERGE, tmp_path / "out")[0] == 0
    code, message = ended(f"{MERGE} --double-quant --shard-size 3", tmp_path / "out")
    assert code == 1
    assert "no --double-quant then, --double-quant now, --shard-size 5 then, --shard-size 3 now" in message, message
    assert f"remove {tmp_path / 'out'} to begin anew, or choose another folder" in message


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["a byte", "a shard"])
def test_a_finished_folder_that_was_spoiled(spoil: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = f"merge --base {BASE} --adapter {ADAPTER} --into float32 --shard-size 0.001"
    assert ended(command, out)[0] == 0
    assert ended(command, out)[0] == 0
    shard = sorted(out.glob("*.safetensors"))[-1]
    if spoil == "a byte":
        data = bytearray(shard.read_bytes())
        data[-7] ^= 1
        shard.write_bytes(data)
    elif spoil == "a shard":
        shard.unlink()
    code, message = ended(command, out)
    assert code == 1
    assert f"remove {out} and give the same command again" in message
    assert ("found 1 of" in message) == (spoil == "a byte")
