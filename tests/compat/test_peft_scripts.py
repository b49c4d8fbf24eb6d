"""Scripts written for PEFT, run twice: against the installed peft, and with only the import line changed.

Each script prints and leaves its findings in ``result``; both runs must print the same lines and find the same
values. The scripts fill the adapters from a seed, so that differences in how a start is drawn don't matter, and
what is compared is what the libraries compute: float32 sums in another order, hence the tolerances.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft_scripts import SCRIPTS

pytest.importorskip("peft", reason="the peer that these scripts were written for isn't installed")

# Two orders of summation of a few dozen float32 products of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

HELPERS = '''
import torch
from torch import nn
import transformers
from transformers import (
    AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

ids = torch.arange(3, 27).reshape(2, 12)

def fill(model, seed=0):
    """Give every trainable parameter a value that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)

def train(model, loss_of, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses

class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.seq = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x):
        return self.seq(x)
'''


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny Llama and a tiny BERT, as ``from_pretrained`` reads them."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = transformers.LlamaConfig(**shape, intermediate_size=48, max_position_embeddings=64)
    bert = transformers.BertConfig(
        **shape, intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    models = {
        "llama": transformers.LlamaForCausalLM(llama),
        "bert": transformers.BertForSequenceClassification(bert),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
    return folders


def run(source: str, folders: dict[str, str], folder: Path) -> dict[str, Any]:
    """Execute a script from the same seed; its ``result``."""
    torch.manual_seed(0)
    scope: dict[str, Any] = {**folders, "folder": str(folder)}
    exec(compile(HELPERS + source, "script", "exec"), scope)
    return scope["result"]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.slow
def test_a_script_finds_the_same_after_changing_its_import(
    name: str, checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SCRIPTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        theirs = run(source, checkpoints, tmp_path / "peft")
    their_lines = printed(capsys)
    ours = run(source.replace("from peft import", "from qlora_kit.compat.peft import"), checkpoints, tmp_path / "ours")
    assert printed(capsys) == their_lines
    compare(ours, theirs, name)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("trainable params")]


def compare(ours: Any, theirs: Any, where: str) -> None:
    """Tensors and floats closely, all else exactly, through dicts and lists; the message says where."""
    if isinstance(theirs, dict):
        assert isinstance(ours, dict), where
        assert set(ours) == set(theirs), where
        for key in theirs:
            compare(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(theirs, (list, tuple)) and not isinstance(theirs, torch.Size):
        assert len(ours) == len(theirs), where
        for i, (our_item, their_item) in enumerate(zip(ours, theirs, strict=True)):
            compare(our_item, their_item, f"{where}[{i}]")
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text: f"{where}: {text}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-5), where
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("writer", ["peft", "qlora_kit.compat.peft"])
def test_either_library_reads_the_others_folder(writer: str, checkpoints: dict[str, str], tmp_path: Path) -> None:
    reader = {"peft": "qlora_kit.compat.peft", "qlora_kit.compat.peft": "peft"}[writer]
    write = """
from peft import LoraConfig, get_peft_model
model = get_peft_model(
    AutoModelForSequenceClassification.from_pretrained(bert), LoraConfig(task_type="SEQ_CLS", r=2)
)
fill(model)
model.eval()
model.save_pretrained(folder)
result = model(input_ids=ids).logits
"""
    read = """
from peft import PeftModel
model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(bert), folder)
result = model(input_ids=ids).logits
"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = run(write.replace("from peft", f"from {writer}"), checkpoints, tmp_path)
        found = run(read.replace("from peft", f"from {reader}"), checkpoints, tmp_path)
    torch.testing.assert_close(found, written, **CLOSE)
