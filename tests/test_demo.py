"""The demo: its text, its measures, and the whole of it on a tiny random model and on the reference model."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_lm import write_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import qlora_kit
from qlora_kit import ConfigError, StorageError
from qlora_kit.cli.commands import app
from qlora_kit.demo import Result, Settings, make_windows, perplexity, run_demo, show
from qlora_kit.demo.models import REFERENCE_FOLDERS, Source, reference_model_path
from qlora_kit.demo.run import MERGES
from qlora_kit.demo.text import is_held_out, read_sources

STEPS = 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_lm(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def outcome(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """What the command measures, and the folder it leaves."""
    out = tmp_path_factory.mktemp("demo") / "out"
    results: list[Result] = []

    def kept(settings: Settings) -> Result:
        results.append(run_demo(settings))
        return results[-1]

    options = ["--steps", str(STEPS), "--rank", "4", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qlora_kit.demo, "run_demo", kept)
        command = CliRunner().invoke(app, ["demo", "--model", str(tiny), "--out", str(out), *options])
    assert command.exit_code == 0, command.output
    return results[0], out


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qlora_kit.demo.text, "FOLDERS", ("optim",))


# -- text ----------------------------------------------------------------------------------------------------


def test_no_file_is_on_both_sides() -> None:
    assert is_held_out("nn/modules/linear.py") == is_held_out("nn/modules/linear.py")
    train, held_out = set(read_sources(held_out=False)), set(read_sources(held_out=True))
    nonempty = {text for text in train & held_out if text.strip()}
    assert not nonempty
    assert len(train) > len(held_out) > 10


@pytest.mark.slow
@pytest.mark.usefixtures("little_text")
def test_windows_depend_on_the_seed_alone(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    first, again, other = (
        make_windows(tokenizer, window=64, train_rows=8, held_out_rows=4, seed=seed) for seed in (0, 0, 1)
    )
    assert first.train.shape == (8, 64)
    assert first.held_out.shape == (4, 64)
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.held_out, again.held_out)
    assert not torch.equal(first.train, other.train)


@pytest.mark.usefixtures("little_text")
@pytest.mark.slow
def test_more_steps_than_text(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    with pytest.raises(ConfigError, match=r"expected at most \d+ rows of 64 tokens.*ask for fewer steps"):
        make_windows(tokenizer, window=64, train_rows=10**7, held_out_rows=4, seed=0)


# -- measures ------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_float64_log_probabilities(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    rows = torch.randint(0, 257, (5, 32))
    with torch.no_grad():
        logits = model(input_ids=rows).logits.double()
    log_probabilities = logits - logits.exp().sum(-1, keepdim=True).log()
    taken = [log_probabilities[i, t, rows[i, t + 1]] for i in range(5) for t in range(31)]
    expected = math.exp(-sum(p.item() for p in taken) / len(taken))
    # float32 losses: a few parts in 1e7 each
    assert perplexity(model, rows, batch=2) == pytest.approx(expected, rel=1e-5)


# -- the whole -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_start_is_measured_at_every_width(outcome: tuple[Result, Path]) -> None:
    result, _ = outcome
    assert [(run.bits, run.start) for run in result.fine_tunes] == [
        (16, "zero start"),
        (4, "zero start"),
        (4, "LoftQ start"),
        (2, "zero start"),
        (2, "LoftQ start"),
        (2, "calibrated start"),
    ]
    assert all(len(run.losses) == STEPS for run in result.fine_tunes)
    unquantized = result.fine_tunes[0]
    assert unquantized.perplexity_before == pytest.approx(result.perplexity, rel=1e-6)
    assert "packed" in result.fine_tunes[-1].storage
    sizes = [run.base_bytes for run in result.fine_tunes]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3] == sizes[4] == sizes[5]


@pytest.mark.slow
def test_the_adapter_fits_the_base_it_was_saved_with(outcome: tuple[Result, Path]) -> None:
    result, out = outcome
    assert [(reload.bits, reload.largest_difference) for reload in result.reloads] == [(2, 0.0), (4, 0.0)]
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((out / "quantized_base").resolve())
    assert result.reloads[-1].adapter_bytes == (out / "adapter" / "adapter_model.safetensors").stat().st_size


@pytest.mark.slow
def test_merges_and_what_they_kept(outcome: tuple[Result, Path]) -> None:
    result, _ = outcome
    by_name = {way.into: way for way in result.merges}
    nearest, feedback, branch = "NF4, nearest codes", "NF4, error feedback", "the same, rank 8 beside"
    assert list(by_name) == ["float32", "bfloat16", nearest, feedback, branch]
    kept = next(run for run in result.fine_tunes if run.bits == 4 and run.start == "LoftQ start")
    # merged in float32 it is the same function, up to the order of float32 sums
    assert by_name["float32"].perplexity == pytest.approx(kept.perplexity_after, rel=1e-5)
    assert by_name["float32"].retained == pytest.approx(1, abs=1e-5)
    errors = {name: way.error for name, way in by_name.items()}
    assert errors["float32"] < errors["bfloat16"] < errors[nearest]
    assert errors[branch] < errors[nearest]
    sizes = {name: way.weight_bytes for name, way in by_name.items()}
    assert sizes[nearest] == sizes[feedback] < sizes[branch] < sizes["bfloat16"] < sizes["float32"]


@pytest.mark.slow
def test_reports_hold_the_numbers_that_were_measured(outcome: tuple[Result, Path]) -> None:
    result, out = outcome
    folders = ["adapter", "adapter_2_bits", "quantized_base", "quantized_base_2_bits"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*folders, "demo.json", "demo.png"])
    numbers, picture = out / "demo.json", out / "demo.png"
    assert json.loads(numbers.read_text()) == json.loads(json.dumps(result.to_dict()))
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = io.StringIO()
    show(result, Console(file=text, width=200))
    for run in result.fine_tunes:
        assert f"{run.perplexity_after:,.2f}" in text.getvalue()
    for way in result.merges:
        assert f"{way.retained:.1%}" in text.getvalue()
    assert "packed" in text.getvalue()


@pytest.mark.slow
def test_loftq_starts_closer_to_the_reference_model_than_zero_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qlora_kit.demo.settings, "LOFTQ_STEPS", 1)  # more of them bring the starts nearer still
    ways = dict(MERGES)
    del ways["NF4, error feedback"]  # which "rank 8 beside" is too, and more
    monkeypatch.setattr(qlora_kit.demo.run, "MERGES", ways)
    sizes = {"steps": 1, "rank": 16, "batch": 2, "window": 64, "held_out_rows": 16}
    settings = Settings.make(model=None, out=tmp_path, device="cpu", **sizes)
    result = run_demo(settings, say=lambda _: None)
    before = {(run.bits, run.start): run.perplexity_before for run in result.fine_tunes}
    assert before[4, "zero start"] > result.perplexity
    starts = [before[2, start] for start in ("calibrated start", "LoftQ start", "zero start")]
    assert result.perplexity < starts[0] < starts[1] < starts[2]
    assert [(reload.bits, reload.largest_difference) for reload in result.reloads] == [(2, 0.0), (4, 0.0)]


# -- finding the model, the command line -----------------------------------------------------------------------


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="expected a folder or a name on the hub, found no such folder"):
        Source(str(tmp_path / "nothing"), "cpu", torch.float32)


def test_an_installation_without_the_reference_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert REFERENCE_FOLDERS[1].name == "reference_lm"
    monkeypatch.setattr("qlora_kit.demo.models.REFERENCE_FOLDERS", (tmp_path,))
    with pytest.raises(StorageError, match=r"expected model.safetensors in one of.*or name another with --model"):
        reference_model_path()


def test_command_line(tmp_path: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).output.strip() == qlora_kit.__version__
    assert "--model" in runner.invoke(app, ["demo", "--help"], env={"COLUMNS": "200"}).output
    outcome = runner.invoke(app, ["demo", "--model", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
    assert outcome.exit_code == 1
    assert "found no such folder" in outcome.output
