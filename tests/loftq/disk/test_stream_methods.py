"""Methods that look at the inputs give on disk, bit for bit, what they give in memory; and the report is true."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibrated_runs import METHODS, add_tokenizer, calibrated, rows, write_text
from disk_models import ADAPTER_FOLDER, assert_same, contents, in_memory, logits, streamed, tensors, write
from tiny_llama import llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from loftq import start_report
from loftq.disk.verify import verify
from loftq.starts.report import Report
from qlora_kit import LoraModel, apply_lora
from qlora_kit.checkpoints.quantized_tensors import read_weight
from qlora_kit.checkpoints.shards import ShardReader
from qlora_kit.errors import ConfigError, StorageError
from qlora_kit.hf_quantizer import record_quantization_

EMBEDDING = ["embed_tokens", "q_proj", "down_proj"]
SMALL = {"num_hidden_layers": 1}
# Reported sums are float32 over some thousand products.
RELATIVE = 1e-4


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of a tiny run's time, and are looked at elsewhere."""
    monkeypatch.setattr(Report, "plot", lambda *_: None)


def gpt2() -> GPT2LMHeadModel:
    """Conv1D layers whose biases aren't 0, dropout that has to be off, and a tied head."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def t5() -> transformers.T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8, "vocab_size": 128}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def mixtral() -> transformers.MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 32}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))


def assert_same_folders(found: Path, expected: Path) -> None:
    assert_same(tensors(found), tensors(expected))
    assert_same(tensors(found / ADAPTER_FOLDER), tensors(expected / ADAPTER_FOLDER))


CASES = {
    **{f"llama, {method}": (lambda: llama(**SMALL), method, {}) for method in METHODS},
    "two blocks, aligned": (llama, "aligned", {}),
    "tied, aligned": (lambda: llama(tied=True, **SMALL), "aligned", {}),
    "bfloat16, aligned": (lambda: llama(**SMALL).bfloat16(), "aligned", {}),
    "GPT-2, cloq": (gpt2, "cloq", {"blocksize": 48}),
    "GPT-2, aligned": (gpt2, "aligned", {}),
    "Mixtral, qera": (mixtral, "qera", {}),
    "searched scales, qera": (lambda: llama(**SMALL), "qera", {"scale_search": True}),
    "4 bits, cloq": (lambda: llama(**SMALL), "cloq", {"bits": 4}),
    "trellis2, cloq": (lambda: llama(**SMALL), "cloq", {"quant_type": "trellis2", "double_quant": True}),
    "trellis3, aligned": (lambda: llama(**SMALL), "aligned", {"bits": 3, "quant_type": "trellis3"}),
    "8 bits, aligned": (lambda: llama(**SMALL), "aligned", {"bits": 8}),
    "mixed bits, aligned": (lambda: llama(**SMALL), "aligned", {"bits_pattern": {"q_proj": 3, "down_proj": 8}}),
}


@pytest.mark.parametrize(("make", "method", "options"), CASES.values(), ids=CASES)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qlora_kit.errors.LeftOutWarning")  # of the experts, which both leave as they are
def test_base_and_adapter_are_those_made_in_memory_and_load_back(
    make: Any, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source, lora = write(make(), tmp_path / "source"), calibrated(method, **options)
    report = streamed(source, tmp_path / "out", lora)
    expected = in_memory(source, tmp_path / "memory", lora)
    assert_same_folders(tmp_path / "out", tmp_path / "memory")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(LoraModel.from_pretrained(base, tmp_path / "out" / ADAPTER_FOLDER).eval()), expected)
    if method != "pissa":  # which doesn't look at the inputs by itself
        assert all(row.tokens and row.output_error is not None for row in report.layers)
    assert len(list(verify(tmp_path / "out", source, layers=100))) == 4 + len(report.layers)


def test_an_embedding_calibrated_in_memory_computes_with_its_quantized_weight(tmp_path: Path) -> None:
    source, lora = write(llama(**SMALL), tmp_path / "source"), calibrated("cloq", targets=EMBEDDING)
    model = apply_lora(AutoModelForCausalLM.from_pretrained(source), lora)
    embedding = model.adapter_layers()["model.embed_tokens"].base_layer
    ids = torch.arange(9)
    assert torch.equal(embedding(ids), embedding.weight[ids])


def test_an_embedding_is_stored_as_in_memory(tmp_path: Path) -> None:
    source, lora = write(llama(**SMALL), tmp_path / "source"), calibrated("cloq", targets=EMBEDDING)
    streamed(source, tmp_path / "out", lora)
    in_memory(source, tmp_path / "memory", lora)
    assert_same_folders(tmp_path / "out", tmp_path / "memory")


@pytest.mark.slow
def test_an_encoder_decoder_is_as_in_memory(tmp_path: Path) -> None:
    source, lora = write(t5(), tmp_path / "source"), calibrated("qera")
    report = streamed(source, tmp_path / "out", lora)
    model = apply_lora(transformers.T5ForConditionalGeneration.from_pretrained(source, dtype="auto"), lora)
    rows_in_memory = {row.path: row.output_error for row in start_report(model).layers}
    assert {row.path: row.output_error for row in report.layers} == rows_in_memory
    model.save_pretrained(tmp_path / "memory" / ADAPTER_FOLDER)
    base = model.unload()
    record_quantization_(base)
    base.save_pretrained(tmp_path / "memory")
    assert_same_folders(tmp_path / "out", tmp_path / "memory")


@pytest.mark.slow
def test_inputs_make_another_start_than_the_weight_alone(tmp_path: Path) -> None:
    """Otherwise the comparison with memory says little."""
    source = write(llama(**SMALL), tmp_path / "source")
    found = {}
    for method in ("loftq", "qera-diag", "qera", "cloq", "aligned"):
        streamed(source, tmp_path / method, calibrated(method))
        found[method] = contents(tmp_path / method)[f"{ADAPTER_FOLDER}/adapter_model.safetensors"]
    assert len(set(found.values())) == 5


@pytest.mark.parametrize("method", ["qera-diag", "cloq", "aligned"])
@pytest.mark.slow
def test_neither_the_run_nor_memory_nor_workers_change_a_byte(method: str, tmp_path: Path) -> None:
    source = write(llama(), tmp_path / "source")
    streamed(source, tmp_path / "first", calibrated(method))
    streamed(source, tmp_path / "again", calibrated(method))
    streamed(source, tmp_path / "tight", calibrated(method), activation_bytes=1)
    streamed(source, tmp_path / "many", calibrated(method), workers=3)
    first = contents(tmp_path / "first")
    for other in ("again", "tight", "many"):
        assert contents(tmp_path / other) == first, other
        assert not any(entry.is_dir() for entry in (tmp_path / other / ".loftq").iterdir()), "activations are gone"


# -- the report ------------------------------------------------------------------------------------------------


def second_moments(source: Path, ids: Tensor) -> dict[str, Tensor]:
    """float64 E[x x^T] by path, from every linear's own inputs in one plain forward."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(_: nn.Module, args: tuple[Tensor], path: str = path) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).double()
                found[path] = x.T @ x / len(x)

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=ids)
    return found


@pytest.mark.parametrize("method", ["qera-diag", "qera", "pissa", "srr", "cloq"])
@pytest.mark.slow
def test_reported_output_errors_are_those_of_what_is_stored(method: str, tmp_path: Path) -> None:
    source, out = write(llama(**SMALL), tmp_path / "source"), tmp_path / "out"
    report = streamed(source, out, calibrated(method), outputs=True)
    moments, original = second_moments(source, rows()), ShardReader(source)
    base, adapter = ShardReader(out), tensors(out / ADAPTER_FOLDER)
    assert len(report.layers) == 7
    for row in report.layers:
        full = original.tensor(f"{row.path}.weight").double()
        shape = (full.shape[0], full.shape[1])
        stored = read_weight(out, base, f"{row.path}.", shape, row.quant_type, report.options).double()
        A, B = (adapter[f"base_model.model.{row.path}.lora_{side}.weight"].double() for side in "AB")
        left, R = full - stored - B @ A, moments[row.path]
        if method == "qera-diag":
            R = R.diagonal().diag()  # all that it collects
        expected = float(torch.trace(left @ R @ left.T).sqrt() / torch.trace(full @ R @ full.T).sqrt())
        assert row.output_error == pytest.approx(expected, rel=RELATIVE)
        assert row.tokens == rows().numel()
        assert row.in_features == (None if method == "qera-diag" else shape[1])
    assert report.total("output_error") == pytest.approx(
        (sum(row.output_error**2 for row in report.layers) / 7) ** 0.5  # type: ignore[operator]
    )
    assert report.total("output_error") < report.total("zero_output_error")


def test_layers_without_inputs_do_not_dilute_the_output_error() -> None:
    """A layer that no token reached has no output error, which isn't an error of 0."""
    from loftq import LayerReport

    reached = LayerReport("reached", "signed2", 2.5, 4, 0.3, 0.4, 0.2, 2, 0.2, 0.3, tokens=99, in_features=8)
    missed = LayerReport("missed", "signed2", 2.5, 4, 0.3, 0.4, 0.2, 2)
    report = Report("source", {"method": "qera"}, [reached, missed])
    assert report.total("output_error") == pytest.approx(0.2)
    assert "2 layers: output error 0.3000 quantized plainly, 0.2000 with qera" in str(report)
    assert str(report).splitlines()[2].split()[-3:] == ["-", "-", "0.00"]
    assert "found none of it at missed (1 of 2)" in str(report)


# -- calibration text ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_text_is_read_with_the_tokenizer_beside_the_model(tmp_path: Path) -> None:
    source = add_tokenizer(write(llama(**SMALL), tmp_path / "source"))
    text = write_text(tmp_path / "text.txt", words=240)
    ids = torch.tensor([[int(word[1:]) for word in text.read_text().split()]]).view(12, 20)
    options = {"calibration_rows": 12, "calibration_tokens": 20}
    streamed(source, tmp_path / "text", calibrated("qera", calibration=str(text), **options))
    streamed(source, tmp_path / "ids", calibrated("qera", calibration=ids))
    assert_same_folders(tmp_path / "text", tmp_path / "ids")
    assert (tmp_path / "text" / "tokenizer.json").exists(), "it comes along"


def test_without_a_tokenizer_tokens_will_do_and_text_is_refused(tmp_path: Path) -> None:
    source = write(llama(**SMALL), tmp_path / "source")
    text = write_text(tmp_path / "text.txt")
    with pytest.raises(StorageError, match=r"calibration: expected a tokenizer in .*source.*found none"):
        streamed(source, tmp_path / "out", calibrated("qera", calibration=str(text)))
    assert not (tmp_path / "out").exists(), "nothing is written"
    assert streamed(source, tmp_path / "out", calibrated("qera")).layers[0].tokens == rows().numel()


@pytest.mark.parametrize("outputs", [False, True])
def test_a_missing_or_short_text_is_seen_before_anything_is_written(outputs: bool, tmp_path: Path) -> None:
    source = add_tokenizer(write(llama(**SMALL), tmp_path / "source"))
    method = "loftq" if outputs else "qera"
    with pytest.raises(StorageError, match=r"none\.txt: expected a text file or 'builtin'"):
        streamed(source, tmp_path / "out", calibrated(method, calibration=str(tmp_path / "none.txt")), outputs=outputs)
    short = write_text(tmp_path / "short.txt", words=3)
    with pytest.raises(StorageError, match=r"expected at least one row of [0-9]+ tokens, found 3 tokens in all"):
        streamed(source, tmp_path / "out", calibrated(method, calibration=str(short)), outputs=outputs)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_too_few_tokens_are_said_in_the_report(tmp_path: Path) -> None:
    source = write(llama(**SMALL), tmp_path / "source")
    few = streamed(source, tmp_path / "few", calibrated("qera", calibration=rows(4, 20)))
    assert "found 80 for the 96 of model.layers.0.mlp.down_proj (1 of 7 layers)" in str(few)
    assert "rank-deficient" in str(Report.load(tmp_path / "few"))
    assert "rank-deficient" not in str(streamed(source, tmp_path / "enough", calibrated("qera")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_lora(AutoModelForCausalLM.from_pretrained(source), calibrated("qera", calibration=rows(4, 20)))
    assert any("found 80 for the 96" in str(warning.message) for warning in caught), "in memory it is a warning"


# -- peculiarities ---------------------------------------------------------------------------------------------


def test_an_embedding_as_wide_as_its_vocabulary_is_read_the_right_way_round(tmp_path: Path) -> None:
    source = write(llama(vocab_size=64, **SMALL), tmp_path / "source")
    lora = calibrated("cloq", targets=["embed_tokens", "q_proj"], calibration=rows(vocabulary=64))
    report = streamed(source, tmp_path / "out", lora)
    lines = list(verify(tmp_path / "out", source))
    assert sum("as reported" in line for line in lines) == len(report.layers) == 2


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = llama(**SMALL)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = float("nan")
    source = write(model, tmp_path / "source")
    for method in ("loftq", "qera"):
        with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.down_proj: weight: expected finite"):
            streamed(source, tmp_path / method, calibrated(method, targets=["down_proj"]))


def test_a_changed_tokenizer_is_another_source(tmp_path: Path) -> None:
    """It reads another text out of the same file."""
    source = add_tokenizer(write(llama(**SMALL), tmp_path / "source"))
    lora = calibrated("qera", calibration=str(write_text(tmp_path / "text.txt")), calibration_tokens=20)
    streamed(source, tmp_path / "out", lora)
    shutil.copyfile(add_tokenizer(tmp_path / "other", vocabulary=64) / "tokenizer.json", source / "tokenizer.json")
    with pytest.raises(StorageError, match=r"source tokenizer\.json: '.*' then, '.*' now"):
        streamed(source, tmp_path / "out", lora)
