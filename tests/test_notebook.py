"""The notebook runs from top to bottom without a GPU or a network, and is stored without outputs."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM

import qlora_kit  # noqa: F401  (transformers then knows packed models)

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "quickstart.ipynb"


def test_stored_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], f"strip the outputs of: {cell.source[:60]!r}"
            assert cell.execution_count is None


def test_badge_opens_this_notebook() -> None:
    first = nbformat.read(NOTEBOOK, as_version=4).cells[0].source
    assert "colab.research.google.com/github/qlora-kit/qlora-kit/blob/main/notebooks/quickstart.ipynb" in first


def shorten(notebook: nbformat.NotebookNode, size: str, smaller: str) -> None:
    """As it stands, but for a size, which is in one place."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and size in cell.source)
    cell.source = cell.source.replace(size, smaller)


@pytest.mark.slow
def test_runs_on_the_reference_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shorten(notebook, "torch.float32, 20", "torch.float32, 8")  # steps
    shorten(notebook, '"", 256', '"", 64')  # window
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()

    printed = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    perplexities = [
        float(line.rpartition(" ")[2])
        for text in printed
        for line in text.splitlines()
        if line.startswith("perplexity on held-out text")
    ]
    before, after = perplexities
    assert after < before
    difference = next(text for text in printed if "difference of a logit" in text)
    assert float(difference.split()[-1]) == 0.0
    assert "merged into bfloat16" in printed[-2]
    assert "merged into each module's own storage" in printed[-2]
    at_two_bits = re.search(r"perplexity at 2 bits.*: ([\d.]+)", printed[-1])
    assert at_two_bits is not None
    assert float(at_two_bits[1]) < 1.5 * before
    for folder in ("merged", "base-2bit"):
        AutoModelForCausalLM.from_pretrained(tmp_path / folder)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
