"""Linears that haven't the rank that is asked for: the gate of a shared expert has one output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from typer.testing import CliRunner

from loftq import allocate, start_report
from loftq.bits.budget import Budget
from loftq.cli import app
from loftq.disk.stream import stream
from loftq.disk.task import Task
from loftq.disk.verify import verify
from loftq.disk.writers import ADAPTER_FOLDER
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora
from qlora_kit.errors import ConfigError, StorageError

GATE = "model.layers.0.mlp.shared_expert_gate"
RANK, ALPHA = 8, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen2MoeConfig(**sizes, **heads, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    folder = tmp_path_factory.mktemp("moe") / "model"
    Qwen2MoeForCausalLM(config).save_pretrained(folder)
    return folder


def lora_config(method: str = "loftq", bits: int = 2, **options: Any) -> LoraConfig:
    calibration = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    loftq = LoftQConfig(loftq_bits=bits, loftq_iter=2, method=method, calibration=calibration)
    lora = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "exclude_modules": ["experts"], **options}
    return LoraConfig(**lora, init_lora_weights="loftq", loftq_config=loftq)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=torch.arange(1, 25).reshape(2, 12)).logits


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", ["loftq", "srr"])
@pytest.mark.slow
def test_the_rank_is_that_of_the_weight_on_disk_as_in_memory(
    folder: Path, tmp_path: Path, method: str, rslora: bool
) -> None:
    report = stream(Task(folder, tmp_path / "out", lora_config(method, use_rslora=rslora)))
    assert {row.path: row.rank for row in report.layers if row.rank != RANK} == {GATE: 1}
    assert report.lowered == {GATE: RANK}
    assert f"rank lowered: model.layers.*.mlp.shared_expert_gate: 1 instead of {RANK}" in str(report)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded = LoraModel.from_pretrained(base, tmp_path / "out" / ADAPTER_FOLDER)
    memory = apply_lora(AutoModelForCausalLM.from_pretrained(folder), lora_config(method, use_rslora=rslora))
    assert torch.equal(logits(loaded), logits(memory))
    assert start_report(memory).lowered == {GATE: RANK}
    scalings = {layer.scaling["default"] for layer in memory.adapter_layers().values()}
    assert max(scalings) == pytest.approx(min(scalings)) == ALPHA / (RANK**0.5 if rslora else RANK)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_builds_the_same_from_what_is_recorded(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    stream(Task(folder, tmp_path / "out", lora_config()))
    adapter = tmp_path / "out" / ADAPTER_FOLDER
    stored = json.loads((adapter / "adapter_config.json").read_text())
    assert (stored["rank_pattern"], stored["alpha_pattern"]) == (
        {"shared_expert_gate": 1},
        {"shared_expert_gate": ALPHA / RANK},
    )
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / "out") for _ in range(2))
    expected = logits(LoraModel.from_pretrained(ours, adapter))
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(theirs, str(adapter))), expected)


def test_a_name_that_ends_another_path_is_told_apart() -> None:
    model = torch.nn.ModuleDict(
        {"gate": torch.nn.Linear(16, 1), "block": torch.nn.ModuleDict({"gate": torch.nn.Linear(16, 16)})}
    )
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["gate"], init_lora_weights="loftq")
    lora = apply_lora(model, config)
    assert {path: layer.r["default"] for path, layer in lora.adapter_layers().items()} == {"gate": 1, "block.gate": 4}
    assert lora.peft_config["default"].rank_pattern == {"^gate": 1}


@pytest.mark.parametrize(("budget", "lowered"), [({"bits": 2.5}, {GATE: RANK}), ({"bits": 3, "ranks": (4, 8)}, {})])
@pytest.mark.slow
def test_a_budget_counts_the_rank_that_there_is(
    folder: Path, tmp_path: Path, budget: dict[str, Any], lowered: dict[str, int]
) -> None:
    report = stream(Task(folder, tmp_path / "out", lora_config(bits=4), budget=Budget(**budget)))
    assert report.lowered == lowered
    assert {row.path: row.rank for row in report.layers}[GATE] == 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert allocate(model, lora_config(bits=4), bits=3).config.rank_pattern == {"shared_expert_gate": 1}


@pytest.mark.slow
def test_a_rank_that_no_module_has_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"r: expected a rank of at most 64, .* found 4000; lower r"):
        stream(Task(folder, tmp_path / "out", lora_config(r=4000)))
    assert not (tmp_path / "out").exists()
    init = ["init", "--model", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu", "--bits", "2"]
    init += ["--method", "loftq"]
    refused = CliRunner().invoke(app, [*init, "--rank", "4000"])
    assert refused.exit_code == 1
    assert "--rank: expected a rank of at most 64" in refused.output
    done = CliRunner().invoke(app, [*init, "--rank", "8"])
    assert done.exit_code == 0, done.output
    assert "1 layers have a smaller rank, see above" in done.output.replace("\n", " ")


def test_a_run_that_finished_nothing_binds_its_folder_to_nothing(folder: Path, tmp_path: Path) -> None:
    task = Task(folder, tmp_path / "out", lora_config())

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loftq.disk.stream.together", stop)
        with pytest.raises(KeyboardInterrupt):
            stream(task)
    assert not task.out.exists()


def test_a_checkpoint_in_eight_bit_floats_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_submodule(GATE).to(torch.float8_e4m3fn)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(StorageError, match=r"expected a weight in 16 or 32 bits, found torch.float8_e4m3fn"):
        stream(Task(tmp_path / "model", tmp_path / "out", lora_config()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2])
@pytest.mark.slow
def test_a_tensor_of_any_type_that_no_module_has_is_copied(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    extra = torch.arange(6).to(dtype)
    save_file({**load_file(file), "extra.table": extra}, file, {"format": "pt"})
    stream(Task(tmp_path / "model", tmp_path / "out", lora_config()))
    found = load_file(tmp_path / "out" / "model.safetensors")["extra.table"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), extra.view(torch.uint8))
    assert "as they were written" in "".join(verify(tmp_path / "out", load=False))
