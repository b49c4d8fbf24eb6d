"""The demo's fine-tunes in the plain form of the branch and in the default one: processor time, and the last loss.

Run: python benchmarks/demo_forms.py [--steps 12] [--repeats 3]
One thread; the forms take turns, medians. Zero starts at 16, 4 and 2 bits, through the Trainer as the demo does it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import qlora_kit
from qlora_kit.demo.models import Source, pick_device, quiet
from qlora_kit.demo.run import BLOCKSIZE, DOUBLE_QUANT, prepared
from qlora_kit.demo.settings import Settings
from qlora_kit.demo.text import Windows, make_windows
from qlora_kit.demo.training import fine_tune_

FORMS = ("plain", "auto")


def timed(form: str, bits: int, source: Source, settings: Settings, windows: Windows) -> tuple[float, float]:
    """Seconds of a fine-tune, and its last loss."""
    model = source.four_bit() if bits == 4 else source.dense()
    if bits == 2:
        qlora_kit.quantize_(model, 2, blocksize=BLOCKSIZE, double_quant=DOUBLE_QUANT[2])
    lora = qlora_kit.apply_lora(prepared(model, settings), settings.lora())
    with qlora_kit.set_branch(form):
        began = time.process_time()
        losses = fine_tune_(lora, windows.train, settings, title=f"{bits}-bit, {form}")
    return time.process_time() - began, losses[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out, quiet():
        settings = Settings.make(model=None, device="cpu", out=Path(out), steps=options.steps)
        source = Source(settings.model, "cpu", pick_device("cpu")[1])
        windows = make_windows(
            source.tokenizer(),
            window=settings.window,
            train_rows=settings.steps * settings.batch,
            held_out_rows=1,
            seed=settings.seed,
        )
        print(f"| bits | plain, s | auto, s | ratio | last loss, plain | auto |\n{'| ---: ' * 6}|")
        for bits in (16, 4, 2):
            runs = [[timed(form, bits, source, settings, windows) for form in FORMS] for _ in range(options.repeats)]
            plain, auto = (statistics.median(seconds for seconds, _ in found) for found in zip(*runs, strict=True))
            losses = " | ".join(f"{loss:.4f}" for _, loss in runs[-1])
            print(f"| {bits} | {plain:.2f} | {auto:.2f} | {auto / plain:.2f} | {losses} |", flush=True)


if __name__ == "__main__":
    main()
