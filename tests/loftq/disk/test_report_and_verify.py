"""The report, the check that what was written belongs together, and the command line around both."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from disk_models import ADAPTER_FOLDER, config, streamed, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llama import llama
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from loftq import LayerReport, Report, start_report
from loftq.cli import app
from loftq.disk.verify import verify
from qlora_kit import LoraConfig, apply_lora
from qlora_kit.errors import AdapterError, StorageError

LAYER = LayerReport("layers.0.q_proj", "signed2", 2.5, 4, 0.34, 0.40, 0.26, 5, seconds=0.1)


@pytest.fixture(scope="module", params=[2, 4, 8])
def finished(request: pytest.FixtureRequest, llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    streamed(llama_dir, out, config(request.param, double_quant=request.param == 2))
    return out


# -- the report ------------------------------------------------------------------------------------------------


def test_captured_is_the_share_of_squared_error() -> None:
    assert LAYER.captured == pytest.approx(1 - (0.26 / 0.40) ** 2)
    assert LAYER.note == ""


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"error": 0.35}, "worse than no start: 0.3500 against 0.3400; storing rounded"),
        (
            {"output_error": 0.5, "zero_output_error": 0.4},
            "worse than no start on its own inputs: output error 0.5000 against 0.4000",
        ),
        ({"quantization_error": 0.34, "error": 0.3399}, "hardly better than no start: rank 4 holds 0.1%"),
        ({"zero_error": 0.0, "quantization_error": 0.0, "error": 0.0}, "the weight is exact without a start"),
    ],
)
def test_says_where_a_start_is_no_better_than_none(changes: dict[str, float], note: str) -> None:
    layer = replace(LAYER, **changes)
    assert layer.note.startswith(note)
    assert f"note: {layer.path}: {note}" in str(Report("source", {}, [layer]))


@pytest.mark.slow
def test_comes_back_from_its_file(finished: Path) -> None:
    report = Report.load(finished)
    assert report.to_dict() == Report.load(finished).to_dict()
    assert len(report.layers) == 14
    assert all(row.error < row.zero_error and row.seconds > 0 for row in report.layers)
    assert (finished / "loftq_report.png").stat().st_size > 10_000
    assert f"{len(report.layers)} layers" in str(report)


def test_a_missing_or_foreign_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="found none; run loftq init to its end"):
        Report.load(tmp_path)
    (tmp_path / "loftq_report.json").write_text("[]")
    with pytest.raises(StorageError, match="expected a report, found something else"):
        Report.load(tmp_path)


@pytest.mark.slow
def test_a_start_in_memory_has_the_same_report(llama_dir: Path, tmp_path: Path) -> None:
    lora = apply_lora(AutoModelForCausalLM.from_pretrained(llama_dir, dtype="auto"), config(2))
    streamed(llama_dir, tmp_path / "out", config(2))
    there = {row.path: replace(row, seconds=0) for row in Report.load(tmp_path / "out").layers}
    assert {row.path: replace(row, seconds=0) for row in start_report(lora).layers} == there
    zero = apply_lora(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="expected one that LoftQ started in this process"):
        start_report(zero)


# -- verify ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_written_is_verified(finished: Path, llama_dir: Path) -> None:
    lines = list(verify(finished, llama_dir, layers=3))
    assert "belong together" in lines[0]
    assert lines[2].endswith("as they were written")
    assert lines[3].endswith("a few tokens give a finite output")
    assert len(lines) == 4 + 3
    assert all("as reported" in line for line in lines[4:])


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.mark.slow
def test_a_changed_base_is_found(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    stored = load_file(out / "model.safetensors")
    name = next(n for n in stored if n.endswith("q_proj.weight"))
    stored[name].view(torch.uint8).view(-1)[0] ^= 1
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(StorageError, match="expected the adapter of the quantized model beside it"):
        list(verify(out))


@pytest.mark.slow
def test_an_exchanged_adapter_is_found(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    other = write(llama(initializer_range=0.5), tmp_path / "source")
    streamed(other, tmp_path / "other", config(2))
    shutil.copyfile(*(f / ADAPTER_FOLDER / "adapter_model.safetensors" for f in (tmp_path / "other", out)))
    with pytest.raises(StorageError, match="found that of another"):
        list(verify(out))


CHANGES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "scales": ("model.safetensors", lambda t: t * 10, r"(scales|absmax|SCB)"),
    "norms": ("model.safetensors", torch.zeros_like, r"norm\.weight"),
    "B": (f"{ADAPTER_FOLDER}/adapter_model.safetensors", torch.zeros_like, r"lora_B\.weight"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.slow
def test_a_changed_tensor_is_found(finished: Path, tmp_path: Path, what: str) -> None:
    out = copied(finished, tmp_path)
    file, change, pattern = CHANGES[what]
    with safe_open(out / file, "pt") as shard:
        metadata = shard.metadata()
    stored = load_file(out / file)
    name = next(n for n in stored if re.search(pattern, n) and (stored[n].is_floating_point() or "absmax" in n))
    stored[name] = change(stored[name])
    save_file(stored, out / file, metadata)
    with pytest.raises(StorageError, match=f"found 1 of .* tensors changed since .{re.escape(name)}"):
        list(verify(out, load=False))


OF_ADAPTER = f"{ADAPTER_FOLDER}/adapter_config.json"


@pytest.mark.parametrize(
    ("file", "key", "place"),
    [(OF_ADAPTER, "lora_alpha", "base_model_name_or_path"), ("config.json", "rms_norm_eps", "_name_or_path")],
)
@pytest.mark.slow
def test_a_changed_configuration_is_found(finished: Path, tmp_path: Path, file: str, key: str, place: str) -> None:
    out = copied(finished, tmp_path)
    settings = json.loads((out / file).read_text())
    (out / file).write_text(json.dumps({**settings, place: "moved", key: settings[key] * 2}))
    with pytest.raises(StorageError, match=f"{file}: expected what was written, found it changed"):
        list(verify(out, load=False))
    (out / file).write_text(json.dumps({**settings, place: "moved"}))
    assert "as they were written" in "".join(verify(out, load=False))


@pytest.mark.slow
def test_a_finished_run_that_was_damaged_since_is_no_success(llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    streamed(llama_dir, out, config(2), shard_bytes=10_000)
    assert len(streamed(llama_dir, out, config(2), shard_bytes=10_000).layers) == 14
    shard = sorted(out.glob("model-*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        StorageError, match=r"1 of .* tensors changed since .*remove the folder and run loftq init again"
    ):
        streamed(llama_dir, out, config(2), shard_bytes=10_000)
    shard.unlink()
    with pytest.raises(StorageError, match=f"expected the shard {shard.name}"):
        streamed(llama_dir, out, config(2), shard_bytes=10_000)


@pytest.mark.slow
def test_what_transformers_can_not_load_is_found(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    settings = json.loads((out / "config.json").read_text())
    settings.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(settings))
    report = json.loads((out / "loftq_report.json").read_text())
    (out / "loftq_report.json").write_text(json.dumps({**report, "checksums": {}}))
    lines = verify(out)
    assert [next(lines) for _ in range(3)][-1].endswith("no checksums noted")
    with pytest.raises(StorageError, match="expected a model that transformers loads and runs, found"):
        next(lines)


@pytest.mark.slow
def test_another_source_is_found(finished: Path, tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    with pytest.raises(StorageError, match="this isn't the model that it was made from"):
        list(verify(finished, write(model, tmp_path / "source")))


@pytest.mark.slow
def test_a_source_of_another_size_is_found(finished: Path, tmp_path: Path) -> None:
    source = write(llama(intermediate_size=112), tmp_path / "source")
    message = (
        rf"^{re.escape(str(source))}: model.layers.0.mlp.down_proj: expected a weight of .*found one of .*pass that"
    )
    with pytest.raises(StorageError, match=message):
        list(verify(finished, source, layers=100))


# -- the command line ------------------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    outcome = CliRunner().invoke(app, [str(a) for a in arguments])
    return outcome.exit_code, outcome.output


@pytest.mark.slow
def test_the_three_commands(llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    init = ("init", "--model", llama_dir, "--out", out, "--bits", 3, "--method", "loftq", "--rank", 4, "--steps", 2)
    code, text = run(*init)
    assert code == 0, text
    assert "14 layers: error" in text
    code, text = run("report", out)
    assert code == 0
    assert "lloyd3" in text
    code, text = run("verify", out, "--against", llama_dir)
    assert code == 0
    assert text.count("as reported") == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--bits", "9"], "--bits: expected a mean from 2 to 8, found 9"),
        (["--bits", "1.5"], "--bits: expected a mean from 2 to 8, found 1.5"),
        (["--quant-type", "nf9"], "--quant-type: expected one of"),
        (["--quant-type", "nf4", "--bits", "2"], "--quant-type: expected a type of 2 bits"),
        (["--blocksize", "many"], "--blocksize: expected an integer"),
        (["--targets", "nothing"], "nothing"),
        (["--rank", "4000"], "rank"),
        (["--method", "magic"], "--method: expected one of"),
    ],
)
def test_mistakes_are_named_without_a_traceback(
    changes: list[str], message: str, llama_dir: Path, tmp_path: Path
) -> None:
    code, text = run("init", "--model", llama_dir, "--out", tmp_path / "out", "--device", "cpu", *changes)
    assert code == 1
    assert message in text.replace("\n", " ")
    assert "Traceback" not in text


def test_a_model_that_isn_t_there(tmp_path: Path) -> None:
    code, text = run("init", "--model", tmp_path / "none", "--out", tmp_path / "out")
    assert code == 1
    assert "expected a folder or a repository on the Hub" in text.replace("\n", " ")
