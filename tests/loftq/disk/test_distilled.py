"""``loftq distill``: one more adapter beside the start, from the command line and from Python."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from calibrated_runs import add_tokenizer, write_text
from disk_models import write
from tiny_llama import llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from loftq import distill, soft_labels
from loftq.cli import app
from loftq.disk.distilled import DISTILLED_FOLDER, distill_folder
from loftq.starts.report import Report
from qlora_kit import LoraModel, StorageError

OPTIONS = ("--calibration-rows", 32, "--calibration-tokens", 12, "--device", "cpu", "--learning-rate", 3e-3)


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Report, "plot", lambda *_: None)


def run(*arguments: object) -> tuple[int, str]:
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return outcome.exit_code, " ".join(outcome.output.split())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = llama(num_hidden_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return add_tokenizer(write(model, tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", words=32 * 12)


@pytest.fixture(scope="module")
def started(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("started") / "out"
    options = ("--bits", 2, "--rank", 4, "--method", "loftq", "--device", "cpu")
    code, said = run("init", "--model", source, "--out", out, *options)
    assert code == 0, said
    return out


@pytest.fixture
def out(started: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(started, tmp_path / "out"))


def test_the_command_writes_what_the_library_learns(source: Path, text: Path, out: Path) -> None:
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    code, said = run("distill", out, "--against", source, "--calibration", text, *OPTIONS)
    assert code == 0, said
    assert "distance from the original on held-out rows: " in said
    assert f"wrote {out / DISTILLED_FOLDER}, an adapter of {out}" in said
    assert all(file.read_bytes() == content for file, content in before.items()), "the start stays"

    ids = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    quantized = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    mine = LoraModel.from_pretrained(quantized, out / "loftq_init", is_trainable=True)
    labels = soft_labels(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), text, rows=32, tokens=12)
    assert distill(mine, labels, learning_rate=3e-3).kept
    theirs = LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out, dtype="auto"), out / DISTILLED_FOLDER)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(input_ids=ids).logits, mine.eval()(input_ids=ids).logits)


def test_what_is_there_isn_t_written_over(source: Path, text: Path, out: Path) -> None:
    arguments = ("distill", out, "--against", source, "--calibration", text, *OPTIONS)
    assert run(*arguments)[0] == 0
    before = (out / DISTILLED_FOLDER / "adapter_model.safetensors").read_bytes()
    code, said = run(*arguments)
    assert code == 1
    assert f"{out / DISTILLED_FOLDER}: expected no adapter yet, found one" in said
    assert (out / DISTILLED_FOLDER / "adapter_model.safetensors").read_bytes() == before


def test_no_gain_writes_nothing_and_says_so(source: Path, text: Path, out: Path) -> None:
    code, said = run("distill", out, "--against", source, "--calibration", text, *OPTIONS[:-1], 30)
    assert code == 0, said
    assert "that is no gain, and the adapter is what it was" in said
    assert "nothing was written" in said
    assert not (out / DISTILLED_FOLDER).exists()


def test_mistakes_are_said_in_the_command_s_words(source: Path, text: Path, out: Path, tmp_path: Path) -> None:
    code, said = run("distill", source, "--against", source, "--calibration", text)
    assert code == 1
    assert "loftq distill: " in said
    code, said = run("distill", out, "--against", tmp_path / "nowhere", "--calibration", text)
    assert code == 1
    assert str(tmp_path / "nowhere") in said
    code, said = run("distill", out, "--against", out, "--calibration", text)
    assert code == 1
    assert "expected a model in 16 or 32 bits, found one that is quantized already" in said
    code, said = run("distill", out, "--against", source, "--calibration", tmp_path / "no.txt")
    assert code == 1
    assert "no.txt" in said
    code, said = run("distill", out, "--against", source, "--calibration", text, "--passes", 0)
    assert code == 1
    assert "--passes: expected a finite number above 0" in said
    assert not (out / DISTILLED_FOLDER).exists()


def test_a_folder_that_isn_t_finished_is_refused(source: Path, out: Path) -> None:
    (out / "loftq_report.json").unlink()
    with pytest.raises(StorageError, match=r"loftq_report\.json"):
        distill_folder(out, source)
