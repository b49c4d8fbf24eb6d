"""The life of an adapter from folder to folder."""

from __future__ import annotations

import torch
from lives import RANK, Life, has_folder, off, stage, tensors_of
from torch import Tensor

from loftq.disk.stream import stream
from loftq.disk.task import Task
from loftq.disk.writers import ADAPTER_FOLDER
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, merge
from qlora_kit.folders import merge_folders

FLOAT32 = 1e-3
QUANTIZED = {4: 0.5, 2: 1.0}


@stage("merge on disk", of=has_folder)
def merge_on_disk(life: Life) -> None:
    """The same tensors as by a merge in memory, and a model that computes as that one."""
    disk, memory = life.fresh_folder("merged-on-disk"), life.fresh_folder("merged-in-memory")
    merge_folders(life.base_folder, [life.adapter_folder], disk, into="float32")
    lora = LoraModel.from_pretrained(life.member.load(life.base_folder), life.adapter_folder)
    merged = merge(lora, into="float32").model
    merged.save_pretrained(memory)
    assert _differences(tensors_of(disk), tensors_of(memory)) == set()
    assert torch.equal(life.output(life.member.load(disk)), life.output(merged))


def _differences(found: dict[str, Tensor], right: dict[str, Tensor]) -> set[str]:
    """Names that only one has, and of tensors that aren't the same bit for bit."""
    return {
        n
        for n in found.keys() | right.keys()
        if n not in found or n not in right or not torch.equal(found[n], right[n])
    }


def _loftq_init(life: Life, bits: int) -> None:
    """Quantized model and adapter load, run, compute what their weights say, and are near the original."""
    out = life.fresh_folder(f"loftq-{bits}")
    lora = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=life.member.targets,
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=bits),
    )
    report = stream(Task(life.base_folder, out, lora))
    assert all(row.error < row.quantization_error for row in report.layers)
    started = LoraModel.from_pretrained(life.member.load(out), out / ADAPTER_FOLDER)
    found = life.output(started)
    assert off(found, life.output(life.member.make())) < QUANTIZED[bits]
    assert off(life.output(merge(started, into="float32").model), found) < FLOAT32


@stage("loftq init, 4 bits", of=has_folder)
def loftq_init_4(life: Life) -> None:
    _loftq_init(life, 4)


@stage("loftq init, 2 bits", of=has_folder)
def loftq_init_2(life: Life) -> None:
    _loftq_init(life, 2)
