"""Every command on folders of unknown origin: whatever they hold, a command ends with a message of its own.

Mutations of a good model, adapter and half-finished runs are made from a seed: files cut, bytes flipped, JSON of any
kind, values of other types in every field of a configuration, an index or a journal. What a command may do with them is
succeed or say what is wrong, in a few lines, with nothing executed and no traceback.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import ADAPTER, BASE, JOURNALS
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import loftq.cli
import qlora_kit.cli

VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 10**400, 1e308, float("nan"), float("inf"), "", "x", "\x1b[31m", "(a+)+$", "../..", "NaN"),
    *([], {}, [[]], [None], {"x": None}, {"": {}}, ["q_proj", 5], {"q_proj": -1}, {"(": 1}, [1] * 50),
)
TEXTS = (
    *(b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"a": NaN}', b"{}"),
    *(b'{"model_type": "\\ud800"}', b'{"peft_type": "LORA"}', b'{"weight_map": {"a": "../b"}}', b'{"r": 1e999}'),
)


def other_value(chance: random.Random, file: Path) -> None:
    """One field, anywhere in a file of JSON, gets another value, goes, or comes."""
    data = json.loads(file.read_text())
    places = [(data, key) for key in data]
    places += [(value, key) for value in data.values() if isinstance(value, dict) for key in value]
    holder, key = chance.choice(places)
    if chance.random() < 0.2:
        del holder[key]
    else:
        holder[key] = chance.choice(VALUES)
    file.write_text(json.dumps(data))


def other_line(chance: random.Random, file: Path) -> None:
    """One field of one line of a journal."""
    lines = file.read_text().splitlines()
    number = chance.randrange(len(lines))
    held = file.with_suffix(".line")
    held.write_text(lines[number])
    other_value(chance, held)
    lines[number] = held.read_text()
    held.unlink()
    file.write_text("\n".join(lines) + "\n")


def other_text(chance: random.Random, file: Path) -> None:
    file.write_bytes(chance.choice(TEXTS))


def cut_short(chance: random.Random, file: Path) -> None:
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def flipped(chance: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice((1, 8))):
        data[chance.randrange(min(len(data), chance.choice((64, 1 << 20))))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def other_tensor(chance: random.Random, file: Path) -> None:
    """One tensor has another name, type, shape or value, or goes."""
    try:
        state = load_file(file)
    except SafetensorError:  # a part, whose header comes last
        return flipped(chance, file)
    name = chance.choice(sorted(state))
    tensor = state.pop(name)
    kinds: list[Callable[[], Any]] = [
        lambda: {},
        lambda: {f"{name}.more": tensor},
        lambda: {name: tensor.to(chance.choice((torch.int64, torch.bool, torch.uint16, torch.complex64)))},
        lambda: {name: tensor.to(torch.float8_e4m3fn)},
        lambda: {name: tensor.reshape(-1)},
        lambda: {name: tensor[:0].clone()},
        lambda: {name: tensor.reshape(1, *tensor.shape)},
        lambda: {name: tensor * float("nan")},
    ]
    save_file({**state, **chance.choice(kinds)()}, file)


def gone(chance: random.Random, file: Path) -> None:
    file.unlink()


def a_folder(chance: random.Random, file: Path) -> None:
    file.unlink()
    file.mkdir()


ANY = (cut_short, flipped, gone, a_folder)
MUTATIONS: dict[str, tuple[Callable[[random.Random, Path], None], ...]] = {
    ".json": (other_value, other_value, other_text, *ANY),
    ".jsonl": (other_line, other_line, other_text, *ANY),
    ".safetensors": (other_tensor, other_tensor, other_text, *ANY),
}
# What each is run on: the folder to spoil, and the command's arguments, in which "{}" is that folder.
ADAPTERS = (
    "compress {spoiled} --rank 1 --out {out}",
    "combine {spoiled}=0.5 {adapter}=1 --out {out}",
    "merge --base {base} --adapter {spoiled} --out {out}",
)
MODELS = (
    "merge --base {spoiled} --adapter {adapter} --out {out}",
    "extract --base {spoiled} --tuned {base} --rank 2 --out {out}",
    "extract --base {base} --tuned {spoiled} --energy 0.5 --out {out}",
)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    (tmp_path / "spoiled").mkdir()
    return tmp_path


def spoiled(chance: random.Random, source: Path, folder: Path) -> str:
    """A copy of ``source`` in ``folder`` with one thing changed in it; what."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    files = sorted(file for file in folder.rglob("*") if file.suffix in MUTATIONS and file.stat().st_size)
    file = chance.choice(files)
    mutation = chance.choice(MUTATIONS[file.suffix])
    mutation(chance, file)
    return f"{mutation.__name__} {file.name}"


def assert_ends_well(app: Any, command: str, what: str, **folders: Path) -> None:
    arguments = command.format(base=BASE, adapter=ADAPTER, **folders).split()
    outcome = CliRunner().invoke(app, arguments, input="y\n")
    shown = f"{what}, {arguments[0]}: {outcome.output[-2000:]}"
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), f"{outcome.exception!r} at {shown}"
    assert outcome.exit_code in (0, 1), shown
    assert "Traceback" not in outcome.output, shown
    if outcome.exit_code:
        message = outcome.stderr[outcome.stderr.index(f"{arguments[0]}: ") :]
        assert "; " in message or ": " in message, shown
        assert len(message) < 4000, shown
        assert all(c.isprintable() or c in "\n\r" for c in message.replace("\x1b[31m", "").replace("\x1b[0m", "")), (
            shown
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_adapters(seed: int, room: Path) -> None:
    _run(seed, 15, ADAPTER, ADAPTERS, room)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_models(seed: int, room: Path) -> None:
    _run(seed, 10, BASE, MODELS, room)


def _run(seed: int, count: int, source: Path, commands: tuple[str, ...], room: Path) -> None:
    chance = random.Random(seed)
    for number in range(count):
        what = spoiled(chance, source, room / "spoiled")
        for command in commands:
            out = room / f"out-{number}-{command.split()[0]}"
            shutil.rmtree(out, ignore_errors=True)
            assert_ends_well(
                qlora_kit.cli.app, command, f"seed {seed}.{number}, {what}", spoiled=room / "spoiled", out=out
            )


# Of kept runs: the command that goes on with them, and what a command would have given otherwise than they were made.
_INIT = "init --model {base} --out {spoiled} --rank 2 --targets q_proj,down_proj --steps 2 --device cpu"
_SHARDS = {'"shard_bytes": 8000': '"shard_bytes": 1000000'}  # a command's aren't as small
_TEXT = {'"aligned"': '"loftq"', '"Tensor, 90c3ad6ad6405e7f"': "null", '"budget": {"bits": 3': '"budget": {"bits": 2.5'}
GONE_ON_WITH: dict[str, tuple[Any, str, dict[str, str]]] = {
    **dict.fromkeys(
        ("merge-cut", "merge-finished"),
        (qlora_kit.cli.app, "merge --base {base} --adapter {adapter} --out {spoiled} --into nf4 --force", {}),
    ),
    "init-cut": (loftq.cli.app, f"{_INIT} --bits 4", {}),
    **dict.fromkeys(
        ("init-on-text-cut", "init-on-text-finished"), (loftq.cli.app, f"{_INIT} --bits 2.5 --method loftq", _TEXT)
    ),
}


@pytest.fixture
def begun(request: pytest.FixtureRequest, room: Path) -> tuple[Path, Any, str]:
    """A kept run in a folder of its own, and what goes on with it: the command line and the command."""
    app, command, changes = GONE_ON_WITH[request.param]
    shutil.copytree(JOURNALS / request.param, room / "source")
    (journal,) = room.glob("source/.*/journal.jsonl")
    head, rest = journal.read_text().split("\n", 1)
    for before, after in {**_SHARDS, **changes}.items():
        assert before in head
        head = head.replace(before, after)
    journal.write_text(f"{head}\n{rest}")
    return room / "source", app, f"{command} --shard-size 0.001"


@pytest.mark.slow
@pytest.mark.parametrize("begun", [*GONE_ON_WITH], indirect=True)
def test_runs_are_gone_on_with(begun: tuple[Path, Any, str]) -> None:
    source, app, command = begun
    arguments = command.format(base=BASE, adapter=ADAPTER, spoiled=source).split()
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("begun", [*GONE_ON_WITH], indirect=True)
def test_runs_that_are_gone_on_with(begun: tuple[Path, Any, str], seed: int, room: Path) -> None:
    chance = random.Random(seed)
    source, app, command = begun
    for number in range(10):
        what = spoiled(chance, source, room / "spoiled")
        assert_ends_well(app, command, f"seed {seed}.{number}, {what}", spoiled=room / "spoiled")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["report {spoiled}", "verify {spoiled}"])
def test_what_loftq_init_wrote(which: str, room: Path) -> None:
    chance = random.Random(0)
    for number in range(10):
        what = spoiled(chance, JOURNALS / "init-on-text-finished", room / "spoiled")
        assert_ends_well(loftq.cli.app, which, f"{number}, {what}", spoiled=room / "spoiled")


@pytest.fixture
def remote_code(room: Path) -> Iterator[Path]:
    """A model whose config names code that lies beside it; running it would leave a file."""
    folder = room / "spoiled"
    shutil.copytree(BASE, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    config |= {"model_type": "evil", "auto_map": names, "architectures": ["Model"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(room / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    yield folder
    assert not (room / "ran").exists()


@pytest.mark.parametrize("known", [False, True])
def test_code_beside_a_model_is_never_run_or_asked_about(known: bool, remote_code: Path, room: Path) -> None:
    if known:  # an architecture that transformers has, with code beside it all the same
        config = json.loads((remote_code / "config.json").read_text())
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (remote_code / "config.json").write_text(json.dumps(config))
    for number, command in enumerate((*MODELS, "demo --model {spoiled} --out {out}")):
        arguments = command.format(base=BASE, adapter=ADAPTER, spoiled=remote_code, out=room / f"out-{number}").split()
        if known and arguments[0] != "merge":
            continue
        outcome = CliRunner().invoke(qlora_kit.cli.app, arguments, input="y\n")
        assert "[y/N]" not in outcome.output
        assert outcome.exit_code == (0 if known else 1), outcome.output
        if not known and arguments[0] != "demo":
            assert "whose code lies beside it (auto_map), which is never run here" in " ".join(outcome.output.split())
