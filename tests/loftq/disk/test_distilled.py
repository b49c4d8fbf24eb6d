"""``loftq distill``: one more adapter beside the start, from the command line and from Python."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

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
from loftq.distillation.steps import Steps
from loftq.starts.report import Report
from qlora_kit import LoraModel, StorageError
from qlora_kit.adapter_files import folder
from qlora_kit.cli import app as kit

OPTIONS = ("--calibration-rows", 32, "--calibration-tokens", 12, "--device", "cpu", "--learning-rate", 3e-3)


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Report, "plot", lambda *_: None)


def run(*arguments: object, of: Any = app) -> tuple[int, str]:
    outcome = CliRunner().invoke(of, [str(argument) for argument in arguments])
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def learned(source: Path, text: Path, started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = Path(shutil.copytree(started, tmp_path_factory.mktemp("learned") / "out"))
    code, said = run("distill", out, "--against", source, "--calibration", text, *OPTIONS)
    assert code == 0, said
    return out


def test_the_readme_says_how_it_came_about(learned: Path) -> None:
    of_start = (learned / "loftq_init" / "README.md").read_text()
    said = (learned / DISTILLED_FOLDER / "README.md").read_text()
    assert "| start | LoftQ |" in said
    assert all(row in said for row in of_start.splitlines() if row.startswith("| "))
    assert "| learned end to end | distance from the original on held-out rows: 0." in said
    assert " after 8 steps on 30 rows |" in said


def test_the_folder_is_whole_with_one_more_adapter(source: Path, learned: Path, tmp_path: Path) -> None:
    code, said = run("verify", learned, "--against", source)
    assert code == 0, said
    place = learned / DISTILLED_FOLDER
    code, said = run("merge", "--base", learned, "--adapter", place, "--out", tmp_path / "merged", of=kit)
    assert code == 0, said
    code, said = run("merge", "--base", source, "--adapter", place, "--out", tmp_path / "wrong", of=kit)
    assert code == 1
    assert "expected the quantized base model that this adapter was started on" in said


def test_what_is_saved_again_keeps_saying_that_it_started_with_its_base(learned: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(learned, dtype="auto")
    lora = LoraModel.from_pretrained(base, learned / "loftq_init", is_trainable=True)
    lora.save_pretrained(tmp_path)
    assert "| start | together with its quantized base |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["learning", "saving"])
def test_stopped_it_leaves_nothing_and_can_be_given_again(
    source: Path, text: Path, out: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    command = ("distill", out, "--against", source, "--calibration", text, *OPTIONS)
    with monkeypatch.context() as patch:
        if when == "learning":
            patch.setattr(Steps, "take", stop)
        else:
            patch.setattr(folder, "publish", stop)
        code, said = run(*command)
    assert code == 130
    assert "loftq distill: stopped; nothing was written; give the same command again" in said
    assert not list(out.glob(f"{DISTILLED_FOLDER}/*"))
    assert run(*command)[0] == 0


@pytest.mark.slow
def test_weights_without_a_configuration_are_no_adapter_yet(source: Path, text: Path, out: Path) -> None:
    """What a kill between the two leaves: the configuration comes last."""
    (out / DISTILLED_FOLDER).mkdir()
    (out / DISTILLED_FOLDER / "adapter_model.safetensors").write_text("")
    code, said = run("distill", out, "--against", source, "--calibration", text, *OPTIONS)
    assert code == 0, said
    LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out, dtype="auto"), out / DISTILLED_FOLDER)


def test_what_is_there_isn_t_written_over(source: Path, text: Path, learned: Path, out: Path) -> None:
    before = (learned / DISTILLED_FOLDER / "adapter_model.safetensors").read_bytes()
    code, said = run("distill", learned, "--against", source, "--calibration", text, *OPTIONS)
    assert code == 1
    assert f"{learned / DISTILLED_FOLDER}: expected no adapter yet, found one; use it, or remove it" in said
    assert (learned / DISTILLED_FOLDER / "adapter_model.safetensors").read_bytes() == before
    (out / DISTILLED_FOLDER).write_text("")
    code, said = run("distill", out, "--against", source, "--calibration", text, *OPTIONS)
    assert code == 1
    assert f"{out / DISTILLED_FOLDER}: expected no adapter yet, found a file" in said
    assert " steps " not in said, "it is said before anything is learned"


@pytest.mark.slow
def test_no_gain_writes_nothing_and_says_so(source: Path, text: Path, out: Path) -> None:
    code, said = run("distill", out, "--against", source, "--calibration", text, *OPTIONS[:-1], 30)
    assert code == 0, said
    assert "that is no gain, and the adapter is what it was" in said
    assert "nothing was written" in said
    assert not (out / DISTILLED_FOLDER).exists()


@pytest.mark.slow
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
    code, said = run("distill", out, "--against", source, "--calibration", text, "--device", "gpu")
    assert code == 1
    assert "--device: expected a device of this machine, found 'gpu'; pass --device cpu" in said
    short = write_text(tmp_path / "short.txt", words=13)
    code, said = run("distill", out, "--against", source, "--calibration", short, "--calibration-tokens", 12)
    assert code == 1
    assert "--calibration: expected two rows or more of 12 tokens, one to hold out, found 1; pass a longer one" in said
    other = add_tokenizer(write(llama(num_hidden_layers=1, vocab_size=256), tmp_path / "other"), 256)
    code, said = run("distill", out, "--against", other, "--calibration", text, *OPTIONS)
    assert code == 1
    assert "--against: expected outputs of the same shape as this model's, found 12 tokens of 256 words" in said
    (out / "model.safetensors").unlink()
    code, said = run("distill", out, "--against", source, "--calibration", text, *OPTIONS)
    assert code == 1
    assert f"{out}: expected a model that transformers loads on cpu, found" in said
    assert "; remove the folder and run loftq init again" in said
    assert not (out / DISTILLED_FOLDER).exists()


def test_a_folder_that_isn_t_finished_is_refused(source: Path, out: Path) -> None:
    (out / "loftq_report.json").unlink()
    with pytest.raises(StorageError, match=r"loftq_report\.json: expected the report of a finished run"):
        distill_folder(out, source)
