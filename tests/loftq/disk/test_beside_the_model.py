"""What lies beside a model, or what its config names, has no part in it: an adapter, code, a kernel; and a checkpoint
that lacks weights is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import ADAPTER, BASE, TOKENS
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import loftq.cli
import qlora_kit.cli
from loftq.disk.stream import stream
from loftq.disk.task import Task
from loftq.disk.verify import verify
from qlora_kit import LoftQConfig, LoraConfig
from qlora_kit.errors import StorageError
from qlora_kit.folders.stored_adapter import read_stored_adapter

NAMES = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}


def calibrated(source: Path, out: Path) -> dict[str, torch.Tensor]:
    loftq_config = LoftQConfig(loftq_iter=1, loftq_bits=2, method="aligned", calibration=TOKENS)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="loftq", loftq_config=loftq_config)
    stream(Task(source, out, lora))
    return {**load_file(out / "model.safetensors"), **load_file(out / "loftq_init" / "adapter_model.safetensors")}


def config_with(**fields: Any) -> Any:
    def changed(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return changed


def with_adapter(folder: Path) -> None:
    shutil.copytree(ADAPTER, folder, dirs_exist_ok=True)


def with_code(folder: Path) -> None:
    config_with(auto_map=NAMES)(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        with_adapter,
        with_code,
        config_with(_attn_implementation="someone/kernel"),
        config_with(attn_implementation="someone/kernel"),
    ],
    ids=["adapter", "code", "kernel", "kernel-by-argument"],
)
def test_the_output_is_that_of_the_model_alone(change: Any, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    change(folder)
    expected, found = calibrated(BASE, tmp_path / "expected"), calibrated(folder, tmp_path / "found")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (folder / "ran").exists()
    change(tmp_path / "found")
    if change is with_adapter:  # what is loaded to be tried is the model, whatever else came to lie there
        assert any("a finite output" in line for line in verify(tmp_path / "found"))
    assert not (tmp_path / "found" / "ran").exists()


@pytest.mark.parametrize("gone", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
def test_a_model_without_some_of_its_weights_is_refused(gone: str, tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    state = load_file(BASE / "model.safetensors")
    del state[gone]
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    command = f"init --model {tmp_path / 'base'} --out {tmp_path / 'out'} --rank 2 --targets q_proj --device cpu"
    outcome = CliRunner().invoke(loftq.cli.app, command.split())
    assert outcome.exit_code == 1
    said = " ".join(outcome.stderr.split())
    assert f"expected all weights of a LlamaForCausalLM, found 1 missing ({gone}); finish the download" in said
    assert not (tmp_path / "out").exists()


def test_a_tied_table_is_no_missing_weight(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    config_with(tie_word_embeddings=True)(tmp_path / "base")
    state = load_file(BASE / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    assert calibrated(tmp_path / "base", tmp_path / "out")


def test_a_class_whose_head_is_not_stored_is_refused_as_a_merge_refuses_it(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    config_with(architectures=["LlamaForSequenceClassification"])(tmp_path / "base")
    with pytest.raises(StorageError, match=r"all weights of a LlamaForSequenceClassification.*score\.weight"):
        calibrated(tmp_path / "base", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--rank 4", ""),
        ("--rank 4 --rslora", "rslora's scale"),
        ("--rank 3 --ranks 1,4 --bits 3 --method loftq", "ranks from 1 to 4"),
    ],
)
def test_what_servers_would_scale_otherwise_is_said_with_the_way_out(options: str, said: str, tmp_path: Path) -> None:
    out, served = tmp_path / "out", tmp_path / "served"
    command = f"init --model {BASE} --out {out} {options} --steps 1 --device cpu --targets q_proj,up_proj,down_proj"
    outcome = CliRunner().invoke(loftq.cli.app, command.split())
    assert outcome.exit_code == 0
    words = " ".join(outcome.output.split())
    assert ("servers: they know one rank and the scale alpha / rank" in words) == bool(said)
    assert said in words
    compressed = f"compress {out / 'loftq_init'} --rank 4 --out {served}"
    assert not said or compressed.replace(str(out / "loftq_init"), "ADAPTER").replace(str(served), "SERVED") in words
    assert CliRunner().invoke(qlora_kit.cli.app, compressed.split()).exit_code == 0
    started, flat = read_stored_adapter(out / "loftq_init"), read_stored_adapter(served)
    assert flat.backbone == started.backbone is not None
    assert (flat.config.rank_pattern, flat.config.alpha_pattern, flat.config.use_rslora) == ({}, {}, False)
    for path, branch in started.branches.items():
        found = flat.branches[path]
        assert found.scaling == flat.config.lora_alpha / flat.config.r == flat.config.lora_alpha / len(found.A)
        torch.testing.assert_close(found.B @ found.A * found.scaling, branch.B @ branch.A * branch.scaling)
