"""The life of an adapter from folder to folder."""

from __future__ import annotations

from pathlib import Path

import torch
from lives import RANK, Life, has_folder, merged, off, stage, tensors_of
from torch import Tensor

from loftq.disk.stream import stream
from loftq.disk.task import Task
from loftq.disk.writers import ADAPTER_FOLDER
from qlora_kit import LoftQConfig, LoraConfig, LoraModel
from qlora_kit.folders import merge_folders

FLOAT32 = 1e-3
# What quantizing all layers, and an adapter of rank 4 on them, leave of a random model: seen are 0.33 and 1.23. That a
# module computes something else than its weights say shows in the merge.
QUANTIZED = {4: 0.5, 2: 1.5}


def _merged(life: Life) -> tuple[Path, Path]:
    """Folders of the same merge, from folder to folder and in memory; made once."""
    disk, memory = life.room / "merged-on-disk", life.room / "merged-in-memory"
    if not memory.exists():
        merge_folders(life.base_folder, [life.adapter_folder], disk, into="float32")
        lora = LoraModel.from_pretrained(life.member.load(life.base_folder), life.adapter_folder)
        merged(lora).save_pretrained(memory)
    return disk, memory


@stage("merge on disk", of=has_folder)
def merge_on_disk(life: Life) -> None:
    """The model that is loaded from it is, bit for bit, that of a merge in memory."""
    found, right = (life.member.load(folder) for folder in _merged(life))
    assert _differences(found.state_dict(), right.state_dict()) == set()
    assert torch.equal(life.output(found), life.output(right))


@stage("files on disk", of=has_folder)
def files_on_disk(life: Life) -> None:
    """Its tensors have the names that transformers gives them."""
    found, right = (tensors_of(folder) for folder in _merged(life))
    assert _differences(found, right) == set()


def _differences(found: dict[str, Tensor], right: dict[str, Tensor]) -> set[str]:
    """Names that only one has, and those of tensors that aren't the same bit for bit."""
    common = found.keys() & right.keys()
    return (found.keys() ^ right.keys()) | {name for name in common if not torch.equal(found[name], right[name])}


def _loftq_init(life: Life, bits: int) -> None:
    """Quantized model and adapter load, run, compute what their weights say, and are near the original."""
    out = life.fresh_folder(f"loftq-{bits}")
    lora = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=life.member.targets,
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=bits, method="loftq"),
    )
    report = stream(Task(life.base_folder, out, lora))
    assert all(row.error < row.quantization_error for row in report.layers)
    started = LoraModel.from_pretrained(life.member.load(out), out / ADAPTER_FOLDER)
    found = life.output(started)
    assert off(found, life.output(life.member.make())) < QUANTIZED[bits]
    assert off(life.output(merged(started)), found) < FLOAT32


@stage("loftq init, 4 bits", of=has_folder)
def loftq_init_4(life: Life) -> None:
    _loftq_init(life, 4)


@stage("loftq init, 2 bits", of=has_folder)
def loftq_init_2(life: Life) -> None:
    _loftq_init(life, 2)
