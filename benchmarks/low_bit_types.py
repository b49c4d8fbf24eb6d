"""Which 2- and 3-bit type should be the default?

On the reference language model, every type at blocks of 64 with scales in 8 bits: bits a weight as stored, the error
of the weights, and the perplexity of held-out text, quantized plainly (a zero start) and from LoftQ (T = 5, rank 16),
both before any training. On MiniLM (if its package is installed) the cosine between its sentence embeddings and the
quantized model's, over lines of the held-out text.

Run: python benchmarks/low_bit_types.py
"""

from __future__ import annotations

import platform

import torch
import transformers
from minilm import TEXT, MiniLM
from torch import nn

from qlora_kit import LoftQConfig, LoraConfig, apply_lora, codec_for, quantize_
from qlora_kit.demo.models import Source, quiet, reference_model_path
from qlora_kit.demo.text import make_windows
from qlora_kit.demo.training import perplexity

TYPES = {
    2: ("nf2", "uniform2", "affine2", "lloyd2", "signed2", "rotated2", "trellis2"),
    3: ("nf3", "uniform3", "affine3", "lloyd3", "signed3", "rotated3", "trellis3"),
}
RANK, STEPS, BLOCKSIZE = 16, 5, 64


def started(model: nn.Module, bits: int, kind: str) -> nn.Module:
    """``model`` from a LoftQ start."""
    storage = {"loftq_bits": bits, "quant_type": kind, "blocksize": BLOCKSIZE, "double_quant": True}
    loftq = LoftQConfig(**storage, loftq_iter=STEPS, method="loftq")
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


def sentence_encoder() -> None:
    encoder = MiniLM()
    print(f"\nMiniLM, mean cosine of {len(TEXT)} sentence embeddings to the unquantized model's\n")
    print("| type | plain | LoftQ |\n| --- | ---: | ---: |")
    for bits, kinds in TYPES.items():
        for kind in kinds:
            cosines = [encoder.compare(make(encoder.load(), bits, kind))[1] for make in (plain, started)]
            print(f"| {kind} | {cosines[0]:.4f} | {cosines[1]:.4f} |", flush=True)


def main() -> None:
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    with quiet():
        language_model()
        sentence_encoder()


if __name__ == "__main__":
    main()
