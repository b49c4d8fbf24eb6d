"""The stages of the demo, each a small function; ``run_demo`` is their order."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..config.loftq import DEFAULT_TYPES
from ..injection.engine import make_plan
from ..merging.in_memory import merge
from ..model.lora_model import LoraModel, apply_lora
from ..training.preparation.kbit import memory_bill, prepare_model_for_kbit_training
from ..training.preparation.quantize import quantize_
from .models import Source, pick_device, quiet
from .results import FineTune, Generation, Merged, Reload, Result
from .settings import BLOCKSIZE, DOUBLE_QUANT, Settings
from .text import Windows, make_windows
from .training import fine_tune_, perplexity

# Ways to merge the 4-bit adapter, by what the tables call them: options of ``qlora_kit.merge``.
MERGES: dict[str, dict[str, Any]] = {
    "float32": {"into": "float32"},
    "bfloat16": {"into": "bfloat16"},
    "NF4, nearest codes": {"force": True},
    "NF4, error feedback": {"rounding": "error-feedback", "force": True},
    "the same, rank 8 beside": {
        "rounding": "error-feedback",
        "residual_rank": 8,
        "residual_dtype": torch.bfloat16,
        "force": True,
    },
}
STATISTICS_ROWS = 64
PROMPTS = (
    "class Dropout(Module):\n    def __init__(self, p: float = 0.5) -> None:",
    "    def forward(self, input: Tensor) -> Tensor:",
)
Say = Callable[[str], None]


def run_demo(settings: Settings, say: Say | None = None) -> Result:
    """Run every stage; adapters and the quantized base go under ``settings.out``, the rest is returned."""
    began = time.monotonic()
    say = say or Console(stderr=True).print
    source = Source(settings.model, settings.device, pick_device(settings.device)[1])
    settings.out.mkdir(parents=True, exist_ok=True)
    with quiet():
        tokenizer = source.tokenizer()
        windows = make_windows(
            tokenizer,
            window=settings.window,
            train_rows=settings.steps * settings.batch,
            held_out_rows=settings.held_out_rows,
            seed=settings.seed,
        )
        model = source.dense()
        plan = make_plan(model, settings.lora())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        say(f"{settings.model}: {parameters:,} parameters, {len(plan.entries)} linear layers to adapt")
        unquantized = perplexity(model, windows.held_out)
        say(f"16 bits, as it is: perplexity {unquantized:.2f} on held-out {windows.source}")
        texts = {"16-bit, as it is": continuations(model, tokenizer)}

        runs = [zero_start(source, settings, windows, 16, say)[0]]
        del model
        reloads = []
        for bits in (2, 4):
            runs.append(zero_start(source, settings, windows, bits, say)[0])
            run, lora, before = loftq_start(source, settings, windows, bits, tokenizer, say)
            runs.append(run)
            texts |= {f"{bits}-bit, LoftQ start": before, f"{bits}-bit, fine-tuned": continuations(lora, tokenizer)}
            reloads.append(save_and_reload(lora, bits, source, settings, windows, tokenizer))
            difference = reloads[-1].largest_difference
            say(f"saved and reloaded at {bits} bits: largest difference of a logit {difference:.1e}")
        runs.append(calibrated_start(source, settings, windows, 2, say))
        merges = [merged_by(way, source, settings, windows) for way in MERGES]
    return Result(
        settings={**asdict(settings), "out": str(settings.out)},
        environment=environment(settings.device),
        parameters=parameters,
        adapted_modules=len(plan.entries),
        trainable_parameters=plan.trainable_parameters,
        text={
            "source": windows.source,
            "training_tokens": windows.train.numel(),
            "held_out_tokens": windows.held_out.numel(),
        },
        perplexity=unquantized,
        fine_tunes=sorted(runs, key=lambda run: -run.bits),
        reloads=reloads,
        merges=merges,
        generations=[Generation(p, {name: t[i] for name, t in texts.items()}) for i, p in enumerate(PROMPTS)],
        seconds=time.monotonic() - began,
    )


def zero_start(source: Source, settings: Settings, windows: Windows, bits: int, say: Say) -> tuple[FineTune, LoraModel]:
    """Adapters with B = 0 on a base that is quantized first, as QLoRA does it (or, at 16 bits, not at all)."""
    model = source.four_bit() if bits == 4 else source.dense()
    if bits == 2:
        quantize_(model, 2, blocksize=BLOCKSIZE, double_quant=DOUBLE_QUANT[2])
    lora = apply_lora(prepared(model, settings), settings.lora())
    return measured(lora, "zero start", settings, windows, bits, say), lora


def loftq_start(
    source: Source, settings: Settings, windows: Windows, bits: int, tokenizer: Any, say: Say
) -> tuple[FineTune, LoraModel, list[str]]:
    """Base and adapters from LoftQ's alternation on the 16-bit weights; also what it writes before training."""
    config = settings.loftq(bits, base_model_name_or_path=str(folders(settings, bits)[0].resolve()))
    lora = apply_lora(prepared(source.dense(), settings), config)
    before = continuations(lora, tokenizer)
    return measured(lora, "LoftQ start", settings, windows, bits, say), lora, before


def calibrated_start(source: Source, settings: Settings, windows: Windows, bits: int, say: Say) -> FineTune:
    """As ``loftq_start``, by the method that looks at the layers' inputs, on Python's own text."""
    lora = apply_lora(prepared(source.dense(), settings), settings.loftq(bits, "builtin"))
    return measured(lora, "calibrated start", settings, windows, bits, say)


def prepared(model: nn.Module, settings: Settings) -> nn.Module:
    """Frozen and safe to train on; activations are recomputed only where memory is dear."""
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.device != "cpu")


def measured(lora: LoraModel, start: str, settings: Settings, windows: Windows, bits: int, say: Say) -> FineTune:
    """Perplexity, the fine-tune, perplexity."""
    storage = {16: "unquantized", 4: "NF4, bitsandbytes", 2: f"{DEFAULT_TYPES[2]}, packed"}[bits]
    before = perplexity(lora, windows.held_out)
    began = time.monotonic()
    losses = fine_tune_(lora, windows.train, settings, title=f"{bits}-bit, {start}")
    seconds = time.monotonic() - began
    after = perplexity(lora, windows.held_out)
    say(f"{bits} bits ({storage}), {start}: perplexity {before:.2f} -> {after:.2f} in {seconds:.0f} s")
    return FineTune(bits, storage, start, before, after, seconds, losses, base_bytes(lora))


def base_bytes(lora: LoraModel) -> int:
    """Bytes of the base's parameters and buffers as they are stored, without the adapters'."""
    adapters = sum(parameter.nbytes for parameter in lora.parameters() if parameter.requires_grad)
    return memory_bill(lora.model).total - adapters


def folders(settings: Settings, bits: int = 4) -> tuple[Path, Path]:
    """Where the quantized base and the adapter are kept."""
    kind = "" if bits == 4 else f"_{bits}_bits"
    return settings.out / f"quantized_base{kind}", settings.out / f"adapter{kind}"


def save_and_reload(
    lora: LoraModel, bits: int, source: Source, settings: Settings, windows: Windows, tokenizer: Any
) -> Reload:
    """Write the adapter in PEFT's format and its quantized base in transformers', read both, compare logits.

    LoftQ changes the base it quantizes, so the adapter belongs to that base and not to the original model
    quantized afresh; the two are kept together, the base first, so that the adapter names it.
    """
    base_folder, adapter_folder = folders(settings, bits)
    rows = windows.held_out[:4].to(lora.device)
    with torch.no_grad():
        expected = lora(input_ids=rows).logits
    lora.get_base_model().save_pretrained(base_folder)  # type: ignore[operator]
    tokenizer.save_pretrained(base_folder)
    lora.save_pretrained(adapter_folder)
    with torch.no_grad():
        found = reloaded(source, settings, bits)(input_ids=rows).logits
    return Reload(
        bits=bits,
        adapter_bytes=file_bytes(adapter_folder),
        base_bytes=file_bytes(base_folder),
        largest_difference=(found - expected).abs().max().item(),
    )


def reloaded(source: Source, settings: Settings, bits: int = 4) -> LoraModel:
    """The fine-tuned model, from disk."""
    base_folder, adapter_folder = folders(settings, bits)
    return LoraModel.from_pretrained(source.quantized(base_folder), adapter_folder)


def merged_by(way: str, source: Source, settings: Settings, windows: Windows) -> Merged:
    """Merge a freshly read copy and measure what came out; layers' inputs are those of the text trained on."""
    options = dict(MERGES[way])
    if options.get("rounding") == "error-feedback":
        options["statistics"] = windows.train[:STATISTICS_ROWS]
    report = merge(reloaded(source, settings), **options)
    return Merged(
        into=way,
        perplexity=perplexity(report.model, windows.held_out),
        retained=report.mean("retained"),
        error=report.mean("error"),
        weight_bytes=memory_bill(report.model).total,
    )


@torch.no_grad()
def continuations(model: nn.Module, tokenizer: Any, new_tokens: int = 40) -> list[str]:
    """The greedy continuation of each prompt."""
    model.eval()
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        length = inputs.input_ids.shape[1]
        ids = model.generate(  # type: ignore[operator]
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts.append(tokenizer.decode(ids[0, length:], skip_special_tokens=True))
    return texts


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def environment(device: str) -> dict[str, str]:
    """The versions and the machine that the numbers belong to."""
    from importlib.metadata import version

    processor = torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    libraries = ("torch", "transformers", "bitsandbytes")
    return {
        "python": platform.python_version(),
        **{library: version(library) for library in libraries},
        "processor": processor,
    }
