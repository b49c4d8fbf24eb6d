"""``loftq init`` from the command line: calibration and budgets, what it says, and how it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibrated_runs import METHODS, add_tokenizer, calibrated, write_text
from disk_models import ADAPTER_FOLDER, assert_same, contents, logits, streamed, tensors, write
from tiny_llama import llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from loftq import allocate
from loftq.bits.budget import Budget
from loftq.cli import app
from loftq.starts.report import Report
from qlora_kit import LoraConfig, LoraModel


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of a tiny run's time, and are looked at elsewhere."""
    monkeypatch.setattr(Report, "plot", lambda *_: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(write(llama(num_hidden_layers=1), tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def run(*arguments: object) -> tuple[int, str]:
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return outcome.exit_code, " ".join(outcome.output.split())


def init(source: Path, out: Path, *options: object) -> tuple[int, str]:
    common = ("--rank", 4, "--steps", 2, "--device", "cpu", "--calibration-tokens", 20, "--calibration-rows", 10)
    return run("init", "--model", source, "--out", out, *common, *options)


def assert_verified(out: Path, source: Path, layers: int = 7) -> None:
    code, said = run("verify", out, "--against", source)
    assert code == 0, said
    assert said.count("as reported") == layers
    code, said = run("report", out)
    assert code == 0
    assert f"{layers} layers: " in said


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_every_method_is_that_of_the_library(method: str, source: Path, text: Path, tmp_path: Path) -> None:
    code, said = init(source, tmp_path / "out", "--bits", 2, "--method", method, "--calibration", text)
    assert code == 0, said
    assert "7 layers: output error 0." in said
    assert f"with {method} (root mean square)" in said
    options = {"calibration": str(text), "calibration_rows": 10, "calibration_tokens": 20}
    streamed(source, tmp_path / "library", calibrated(method, **options), outputs=True)
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "library"))
    assert_same(tensors(tmp_path / "out" / ADAPTER_FOLDER), tensors(tmp_path / "library" / ADAPTER_FOLDER))
    assert_verified(tmp_path / "out", source)


def test_a_text_makes_a_plain_start_report_its_outputs(source: Path, text: Path, tmp_path: Path) -> None:
    code, said = init(source, tmp_path / "plain", "--bits", 2, "--method", "loftq")
    assert code == 0
    assert "output" not in said
    code, said = init(source, tmp_path / "out", "--bits", 2, "--method", "loftq", "--calibration", text)
    assert code == 0
    assert "7 layers: output error" in said
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "plain"))


@pytest.mark.slow
def test_the_builtin_text_is_the_default_where_one_is_needed(source: Path, tmp_path: Path) -> None:
    for name, options in (("default", ()), ("builtin", ("--calibration", "builtin"))):
        code, said = init(source, tmp_path / name, "--method", "qera", *options)
        assert code == 0, said
    assert_same(tensors(tmp_path / "default"), tensors(tmp_path / "builtin"))


def test_few_tokens_are_said_on_the_command_line(source: Path, tmp_path: Path) -> None:
    short = write_text(tmp_path / "short.txt", words=45)
    code, said = init(source, tmp_path / "out", "--method", "qera", "--calibration", short)
    assert code == 0
    message = "found 40 for the 96 of model.layers.0.mlp.down_proj (7 of 7 layers)"
    assert message in said
    assert message in run("report", tmp_path / "out")[1]


@pytest.mark.slow
def test_a_tiny_room_for_activations_changes_nothing(source: Path, text: Path, tmp_path: Path) -> None:
    for name, size in (("tight", "1KB"), ("wide", "2GiB")):
        options = ("--method", "aligned", "--calibration", text, "--activations", size)
        assert init(source, tmp_path / name, *options)[0] == 0
    assert contents(tmp_path / "tight") == contents(tmp_path / "wide")


# -- budgets ---------------------------------------------------------------------------------------------------


def stored_bits(report: Report) -> float:
    model = llama(num_hidden_layers=1)
    counts = {row.path: model.get_parameter(f"{row.path}.weight").numel() for row in report.layers}
    return sum(int(row.quant_type[-1]) * counts[row.path] for row in report.layers) / sum(counts.values())


@pytest.mark.parametrize("method", ["loftq", "qera-diag"])
@pytest.mark.slow
def test_mean_bits_choose_as_in_memory(method: str, source: Path, text: Path, tmp_path: Path) -> None:
    """Each layer's bits and ranks are those of ``loftq.allocate``, and the model loads with them."""
    options = ("--bits", 2.5, "--ranks", "2,4,8", "--method", method, "--calibration", text)
    code, said = init(source, tmp_path / "out", *options)
    assert code == 0, said
    report = Report.load(tmp_path / "out")
    assert len({row.quant_type for row in report.layers}) > 1
    assert 2 < stored_bits(report) <= 2.5
    config = calibrated(method, calibration=str(text), calibration_rows=10, calibration_tokens=20)
    found = allocate(AutoModelForCausalLM.from_pretrained(source), config, bits=2.5, ranks=(2, 4, 8))
    chosen = {path: (choice.bits, choice.rank) for path, choice in found.choices.items()}
    assert {row.path: (int(row.quant_type[-1]), row.rank) for row in report.layers} == chosen
    stored = LoraConfig.from_pretrained(tmp_path / "out" / ADAPTER_FOLDER)
    assert stored.rank_pattern == {path: rank for path, (_, rank) in chosen.items()}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    lora = LoraModel.from_pretrained(base, tmp_path / "out" / ADAPTER_FOLDER)
    assert {layer.scaling["default"] for layer in lora.adapter_layers().values()} == {1.0}
    assert torch.isfinite(logits(lora.eval())).all()
    assert_verified(tmp_path / "out", source)


@pytest.mark.slow
def test_memory_is_kept_by_the_model_that_loads(source: Path, tmp_path: Path) -> None:
    code, said = init(source, tmp_path / "out", "--memory", "105KB", "--method", "loftq")
    assert code == 0, said
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    lora = LoraModel.from_pretrained(base, tmp_path / "out" / ADAPTER_FOLDER)
    held = sum(tensor.nbytes for tensor in (*lora.parameters(), *lora.buffers()))
    assert 104_000 < held <= 105_000
    assert_verified(tmp_path / "out", source)


def test_impossible_memory_says_what_is_possible_and_that_is_kept_exactly(source: Path, tmp_path: Path) -> None:
    code, said = init(source, tmp_path / "out", "--memory", "30KB", "--method", "loftq")
    assert code == 1
    assert "memory: expected at least" in said
    assert "found 30000; raise it" in said
    least = said.split("at least ")[1].split()[0]
    code, said = init(source, tmp_path / "out", "--memory", least, "--method", "loftq")
    assert code == 0, said
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    lora = LoraModel.from_pretrained(base, tmp_path / "out" / ADAPTER_FOLDER)
    assert sum(tensor.nbytes for tensor in (*lora.parameters(), *lora.buffers())) == int(least)


def test_the_first_layers_get_4_bits(source: Path, tmp_path: Path) -> None:
    code, said = init(source, tmp_path / "out", "--bits", 3, "--allocation", "first-layers", "--method", "loftq")
    assert code == 0, said
    model = AutoModelForCausalLM.from_pretrained(source)
    types = {row.path: row.quant_type for row in Report.load(tmp_path / "out").layers}
    in_order = [types[path] for path, _ in model.named_modules() if path in types]
    count = in_order.count("nf4")
    assert 0 < count < 7
    assert in_order == ["nf4"] * count + ["signed2"] * (7 - count)
    assert_verified(tmp_path / "out", source)


@pytest.mark.slow
def test_the_same_command_goes_on_and_another_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    first = ("--bits", 2.5, "--method", "qera", "--calibration", text)
    assert init(source, tmp_path / "out", *first)[0] == 0
    assert init(source, tmp_path / "out", *first)[0] == 0
    assert Report.load(tmp_path / "out").options["budget"] == Budget(bits=2.5).to_dict()
    code, said = init(source, tmp_path / "out", "--bits", 3, "--method", "cloq", "--calibration", text)
    assert code == 1
    assert "--method qera then, --method cloq now" in said
    assert "--bits 2.5 then, --bits 3 now" in said
    assert "--ranks" not in said


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "4 TB"], "--memory: expected a number with B, KB, MB, GB, KiB, MiB or GiB, found '4 TB'; pass"),
        (["--activations", "lots"], "--activations: expected a number with B, KB, MB, GB, KiB, MiB or GiB, found"),
        (["--allocation", "best"], "--allocation: expected milp or first-layers, found 'best'; leave it out for milp"),
        (["--ranks", "8,x"], "--ranks: expected whole numbers with commas between, found '8,x'; pass --ranks 8,16,32"),
        (["--ranks", ","], "--ranks: expected whole numbers with commas between, found ','; pass --ranks 8,16,32"),
        (["--ranks", "0,8"], "--ranks: expected integers of at least 1, found (0, 8); pass --ranks 8,16,32"),
        (["--ranks", "16,32", "--method", "loftq"], "--ranks: expected some that add up to no more than the"),
        (
            ["--bits", "2.5", "--memory", "300KB"],
            "expected either bits or memory, found --bits 2.5 and --memory 300000",
        ),
        (["--bits", "4", "--memory", "300KB"], "expected either bits or memory, found --bits 4.0 and --memory 300000"),
        (
            ["--memory", "9MB", "--allocation", "first-layers"],
            "--allocation: expected bits of at most 4 and nothing else",
        ),
        (["--bits", "9"], "--bits: expected a mean from 2 to 8, found 9; pass --bits 2.5"),
        (["--method", "qera", "--calibration", "none.txt"], "calibration none.txt: expected a text file or 'builtin'"),
        (["--method", "qera", "--calibration", ""], "expected a text file or 'builtin', found a folder"),
        (["--method", "quera"], "--method: expected one of"),
    ],
)
def test_mistakes_are_named_without_a_traceback_and_write_nothing(
    options: list[str], message: str, source: Path, tmp_path: Path
) -> None:
    code, said = init(source, tmp_path / "out", *options)
    assert code == 1
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    bare = write(llama(num_hidden_layers=1), tmp_path / "bare")
    code, said = init(bare, tmp_path / "out", "--method", "qera")
    assert code == 1
    assert f"expected a tokenizer in '{bare}', found none" in said
    assert "put the tokenizer's files beside the model" in said
    assert "Traceback" not in said
