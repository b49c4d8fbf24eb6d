"""The memory bill counts every byte once."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_llama import HIDDEN, INTERMEDIATE, STORAGES, VOCABULARY, adapted, llama, load
from torch import nn

from qlora_kit import prepare_model_for_kbit_training, quantize_
from qlora_kit.training.preparation.kbit import memory_bill


def test_bill_counts_every_byte_once(llama_dir: Path) -> None:
    linear = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INTERMEDIATE)
    outputs = 2 * (2 * HIDDEN + 2 * HIDDEN // 2 + 2 * INTERMEDIATE + HIDDEN)
    table = VOCABULARY * HIDDEN * 2
    bills = {s: prepare_model_for_kbit_training(load(llama_dir, s, torch.bfloat16)).memory_bill for s in STORAGES}
    norms = 5 * HIDDEN
    for storage, bill in bills.items():
        assert bill.bytes["embeddings, bfloat16"] == table
        assert bill.bytes["norms, float32"] == norms * 4
        assert bill.before["norms, bfloat16"] == norms * 2
        assert "norms, bfloat16" not in bill.bytes
        assert bill.total - sum(bill.before.values()) == norms * 2
        assert bill.bytes["dense weights, bfloat16"] == table + (linear * 2 if storage == "dense" else 0)
    assert bills["4-bit"].bytes["k-bit weights"] == linear // 2
    assert bills["8-bit"].bytes["k-bit weights"] == linear
    assert bills["8-bit"].bytes["k-bit scales"] == outputs * 4  # one float32 a row
    # Doubly quantized: a byte for every 64 values, a float32 for every 256 of those or part of them, and a mean.
    assert linear // 64 <= bills["4-bit"].bytes["k-bit scales"] <= linear // 64 + 14 * 8
    tied = memory_bill(llama(tied=True))
    assert tied.total == memory_bill(llama()).total - VOCABULARY * HIDDEN * 4


def test_bill_is_printable_plain_data_and_knows_adapters(llama_dir: Path) -> None:
    lora = adapted(prepare_model_for_kbit_training(load(llama_dir, "4-bit", torch.bfloat16)))
    assert lora.memory_bill.to_dict() == json.loads(json.dumps(lora.memory_bill.to_dict()))
    text = str(lora.memory_bill)
    assert "k-bit weights" in text
    assert f"{lora.memory_bill.total:,}" in text
    assert "activation checkpointing: non-reentrant" in text
    trainable = sum(p.nbytes for p in lora.parameters() if p.requires_grad)
    now = memory_bill(lora)
    assert now.bytes["adapters, float32"] == trainable
    assert now.total == lora.memory_bill.total + trainable


def test_packed_linears_count_every_byte_once() -> None:
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    quantize_(net, 2, double_quant=True, target_modules=["0", "2"])
    bill = memory_bill(net)
    assert bill.total == sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
    assert bill.bytes["k-bit weights"] == 2 * 64 * 96 // 4
