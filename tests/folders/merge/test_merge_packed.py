"""A base of several widths, each packed by us whatever its type, merged on disk into a type that some of it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import qlora_kit.cli
from loftq.disk.stream import stream
from loftq.disk.task import Task
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, merge

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
TOKENS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    LlamaForCausalLM(LlamaConfig(**SIZES, **heads)).bfloat16().save_pretrained(folder / "base")
    options = LoftQConfig(
        loftq_iter=1, bits_pattern={"q_proj": 4, "up_proj": 8, "v_proj": 4}, loftq_bits=3, method="loftq"
    )
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights="loftq", loftq_config=options)
    stream(Task(folder / "base", folder / "started", lora))
    return folder / "started"


@pytest.mark.slow
@pytest.mark.parametrize("into", ["nf4", "int8", "lloyd3", "same", "bfloat16"])
def test_it_loads_and_is_the_merge_in_memory(into: str, started: Path, tmp_path: Path) -> None:
    out, adapter = tmp_path / "out", started / "loftq_init"
    command = f"merge --base {started} --adapter {adapter} --out {out} --into {into} --force"
    outcome = CliRunner().invoke(qlora_kit.cli.app, command.split())
    assert outcome.exit_code == 0, outcome.output
    found, report = LlamaForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    lora = LoraModel.from_pretrained(LlamaForCausalLM.from_pretrained(started, dtype="auto"), adapter)
    expected = merge(lora, into=into, force=True).model
    ours, theirs = expected.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    with torch.no_grad():
        assert found.eval()(TOKENS).logits.isfinite().all()
