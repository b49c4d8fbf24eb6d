"""Errors of every command, provoked: they speak of its options, and advise nothing that it has none for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from tiny_llama import llama
from typer.testing import CliRunner

import loftq.cli
import qlora_kit.cli
from qlora_kit import LoraConfig, apply_lora, quantize_
from qlora_kit.hf_quantizer import record_quantization_

# Names of arguments that have an underscore, or are followed by their value: what a command's user can't type.
PYTHONS = re.compile(
    r"\b(?:into|rounding|blocksize|weights?|rank|energy|density|whole|bits|memory|ranks|device|force|tokenizer|r)=|"
    r"\b(?:check_backbone|allow_pickle|shard_bytes|target_modules|modules_to_save|combination_type|svd_rank|lora_alpha|"
    r"majority_sign_method|loftq_bits|loftq_iter|quant_type|double_quant|rank_pattern|init_lora_weights)\b|\bNone\b"
)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters, well and ill, by the names that the tests have for them."""
    room = tmp_path_factory.mktemp("room")
    llama().save_pretrained(room / "model")
    lora = apply_lora(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(room / "adapter")
    shutil.copytree(room / "adapter", room / "pickled")
    torch.save(load_file(room / "adapter" / "adapter_model.safetensors"), room / "pickled" / "adapter_model.bin")
    (room / "pickled" / "adapter_model.safetensors").unlink()
    small = apply_lora(llama(), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for layer in small.adapter_layers().values():
            for factor in layer.adapter_tensors("default").values():
                factor.fill_(1e-3)
    small.save_pretrained(room / "small")
    packed = quantize_(llama(), 2)
    start = apply_lora(packed, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    start.backbones["default"] = "0" * 64
    start.save_pretrained(room / "started")
    record_quantization_(base := start.unload())
    base.save_pretrained(room / "packed")
    wide = llama()
    with torch.no_grad():
        wide.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    wide.resize_token_embeddings(140, mean_resizing=False)
    wide.save_pretrained(room / "resized")
    (room / "empty").mkdir()
    (room / "notes").mkdir()
    (room / "notes" / "mine.txt").write_text("mine")
    return room


def said(app: typer.Typer, arguments: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The error that a command ends with, in one line."""
    monkeypatch.chdir(room)
    outcome = CliRunner().invoke(app, arguments.split())
    assert outcome.exit_code == 1, outcome.output
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert "Traceback" not in outcome.output
    assert not (room / "out" / "config.json").exists()
    shutil.rmtree(room / "out", ignore_errors=True)
    text = " ".join(outcome.output.split())
    text = text[text.index(f"{arguments.split()[0]}: ") :]
    assert not PYTHONS.search(text), text
    return text


MERGE = "merge --base model --adapter adapter --out out"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("merge --base gone --adapter adapter --out out", "merge: --base gone: expected a folder or a repository"),
        ("merge --base model --adapter gone --out out", "merge: --adapter gone: expected a folder or a repository"),
        ("merge --base empty --adapter adapter --out out", "empty: expected config.json beside the weights"),
        (f"{MERGE} --into nf9", "merge: --into nf9: expected 'same' or one of"),
        (f"{MERGE} --rounding scale-search", "--into bfloat16: expected --rounding nearest, since nothing is rounded"),
        (f"{MERGE} --into nf4 --rounding best", "--rounding best: expected 'nearest' or 'scale-search'"),
        (
            f"{MERGE} --into nf4 --blocksize many",
            "--blocksize many: expected a positive number or 'row'; pass --blocksize 64",
        ),
        (f"{MERGE} --weight 1 --weight 2", "--weight: expected one for each of the 1 adapters"),
        (f"{MERGE} --weight nan", "weight of adapter: expected a finite number other than 0"),
        (f"{MERGE} --device gpu9", "--device: expected a device of this machine, found 'gpu9'; pass --device cpu"),
        (f"{MERGE} --tokenizer gone", "--tokenizer gone: expected a folder with a tokenizer"),
        (
            "merge --base model --adapter adapter --out model",
            "model: expected a folder of its own for the merged model",
        ),
        ("merge --base model --adapter adapter --out notes", "choose another folder or remove this one"),
        ("merge --base model --adapter pickled --out out", "which can run code; save it again as safetensors"),
        (
            "merge --base packed --adapter started --out out",
            "pass the base that was saved with it, or --any-base to merge it",
        ),
        (
            "merge --base packed --adapter small --into same --out out",
            "merge into 'bfloat16', try --rounding scale-search, or ask for the same again with --force",
        ),
    ],
)
@pytest.mark.slow
def test_merge(arguments: str, message: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message in said(qlora_kit.cli.app, arguments, room, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("combine adapter --out out", "adapter: expected a folder and its weight"),
        ("combine gone=1 --out out", "gone: expected a local folder with adapter_config.json"),
        ("combine adapter=nan --out out", "DIR=WEIGHT: expected finite numbers as weights"),
        ("combine adapter=1 --type best --out out", "combine: --type: expected one of ['cat',"),
        (
            "combine adapter=1 --type ties --out out",
            "--density: expected a share of entries to keep, since 'ties' prunes, found none; pass --density 0.5",
        ),
        ("combine adapter=1 --type linear --rank 3 --out out", "--rank: expected none with --type linear"),
        ("combine adapter=1 --rank 0 --out out", "--rank: expected an integer of at least 1, found 0"),
        (
            "combine adapter=1 --energy 2 --out out",
            "--energy: expected a share in (0, 1], found 2.0; pass one such as --energy 0.5",
        ),
        ("combine adapter=1 --energy 0.5 --rank 2 --out out", "--energy: expected none beside --rank 2"),
        (
            "combine adapter=1 --type ties --density 0.5 --majority-sign loud --out out",
            "--majority-sign: expected one of",
        ),
        ("combine started=1 adapter=1 --out out", "combine them on the model, or pass --any-base if they do share it"),
        ("combine pickled=1 --out out", "which can run code; save it again as safetensors"),
        (
            "compress adapter --out out",
            "compress: --rank, --energy: expected one of the two, found none and none; pass --rank 8",
        ),
        ("compress adapter --rank 0 --out out", "integer of at least 1, found 0; pass a rank such as 8"),
        ("compress adapter --rank 8 --energy 0.5 --out out", "found 8 and 0.5; leave one of them out"),
        (
            "compress adapter --rank 1 --out adapter",
            "adapter: expected a new or empty folder, found ['README.md', 'adapter",
        ),
        ("compress adapter --energy 3 --out out", "compress: --energy: expected a share in (0, 1]"),
        ("compress gone --rank 2 --out out", "gone: expected a local folder"),
        ("compress model --rank 2 --out out", "model: expected adapter_config.json, found none"),
    ],
)
def test_combine_and_compress(arguments: str, message: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message in said(qlora_kit.cli.app, arguments, room, monkeypatch)


EXTRACT = "extract --base model --tuned resized --out out"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (EXTRACT, "extract: --rank, --energy: expected one of the two, found none and none; pass --rank 32"),
        (f"{EXTRACT} --rank 0", "--rank: expected an integer of at least 1"),
        (f"{EXTRACT} --energy 7", "--energy: expected a share in (0, 1], found 7.0; pass one such as --energy 0.9"),
        (f"{EXTRACT} --rank 2 --dtype int8", "--dtype: expected one of float32, bfloat16, float16"),
        (f"{EXTRACT} --rank 2 --device gpu9", "--device: expected a device of this machine"),
        (f"{EXTRACT} --rank 2 --whole nrm", "extract: --whole: 'nrm' matches no module of the model"),
        (f"{EXTRACT} --rank 2 --targets q_prj", "extract: --targets: 'q_prj' matches no module of the model"),
        (f"{EXTRACT} --rank 2 --targets .*x", "extract: --targets '.*x': the regular expression matches no whole"),
        (f"{EXTRACT} --rank 2", "store it whole (--whole lm_head, and resize the base before"),
        ("extract --base model --tuned gone --rank 2 --out out", "extract: --tuned gone: expected a folder or"),
        ("extract --base model --tuned packed --rank 2 --out out", "expected a tuned model in 16 or 32 bits"),
        ("extract --base model --tuned model --rank 2 --out out", "model: expected two checkpoints, found one folder"),
    ],
)
def test_extract(arguments: str, message: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message in said(qlora_kit.cli.app, arguments, room, monkeypatch)


def test_what_a_report_advises(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(room)
    options = [
        "--rank",
        "2",
        "--targets",
        "q_proj",
        "--whole",
        "embed_tokens,lm_head",
        "--out",
        str(room / "extracted"),
    ]
    outcome = CliRunner().invoke(qlora_kit.cli.app, ["extract", "--base", "model", "--tuned", "resized", *options])
    assert outcome.exit_code == 0, outcome.output
    assert "whole='" not in outcome.output


INIT = "init --model model --out out --device cpu"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"{INIT} --bits 9", "init: --bits: expected a mean from 2 to 8, found 9; pass --bits 2.5"),
        (f"{INIT} --bits 2.5 --memory 9MB", "found --bits 2.5 and --memory 9000000; pass one"),
        (
            f"{INIT} --bits 2 --quant-type nf4",
            "--quant-type: expected a type of 2 bits, found 'nf4'; pass --bits 4 or leave --quant-type out",
        ),
        (f"{INIT} --quant-type nf9", "init: --quant-type: expected one of"),
        (
            f"{INIT} --blocksize many",
            "init: --blocksize: expected an integer of at least 1, found 'many'; pass --blocksize 64",
        ),
        (f"{INIT} --targets nothing", "init: --targets: 'nothing' matches no module of the model"),
        (
            f"{INIT} --rank 4000",
            "--rank: expected a rank of at most 64, which is the largest that a module of this model has, found 4000",
        ),
        (
            f"{INIT} --alpha -1",
            "init: --alpha: expected a finite number above 0, found -1.0; pass an alpha such as --alpha 16",
        ),
        (f"{INIT} --method magic", "init: --method: expected one of"),
        (
            f"{INIT} --memory 1KB --method loftq",
            "raise it, lower the rank, target more modules, or pass --double-quant",
        ),
        (f"{INIT} --ranks 0,8", "init: --ranks: expected integers of at least 1, found (0, 8); pass --ranks 8,16,32"),
        (f"{INIT} --bits 5 --allocation first-layers", "found --bits 5.0, no --memory, no --ranks; use 'milp'"),
        (f"{INIT} --device gpu9", "init: --device: expected a device of this machine"),
        (f"{INIT} --calibration builtin", "init: --calibration: expected a tokenizer in 'model', found none"),
        ("init --model gone --out out", "init: --model gone: expected a folder or a repository"),
        ("init --model packed --out out", "found one that is quantized already; pass the original"),
        ("init --model model --out notes", "choose another folder or remove this one"),
        ("report gone", "gone/loftq_report.json: expected the report of a finished run, found none"),
        ("verify empty", "empty/loftq_report.json: expected the report of a finished run, found none"),
    ],
)
def test_loftq(arguments: str, message: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(loftq.cli.app, arguments, room, monkeypatch)
    assert message in text
    assert "LoftQConfig" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo --out out --device gpu9", "demo: --device: expected a device of this machine, found 'gpu9'"),
        ("demo --out out --model ./gone", "demo: --model ./gone: expected a folder or a name on the hub"),
        ("demo --out out --model gone", "demo: --model gone: expected a folder, or a name on the hub, of a model"),
        ("demo --out out --model model", "demo: --model model: expected a folder, or a name on the hub, of a model"),
    ],
)
def test_demo(arguments: str, message: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message in said(qlora_kit.cli.app, arguments, room, monkeypatch)
