"""Adapters to merge: really trained on quantized bases, kept on the disk with them, a folder for each.

Two kinds of model behind one interface (``Language``, ``Encoder``): what it is trained on, how it is trained, and one
number that says how good it is, lower being better. A language model learns torch's sources, as in the demo, and that
of ``real_models`` English news; the number is perplexity on held-out files or articles. The sentence encoder learns
which description belongs to which function of Python's standard library (a contrastive loss within batches); the number
is that loss on functions of other files.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from minilm import MiniLM
from real_models import windows_of
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora, prepare_model_for_kbit_training, quantize_
from qlora_kit.codecs import protect_storage_
from qlora_kit.config.loftq import DEFAULT_TYPES
from qlora_kit.demo.models import Source
from qlora_kit.demo.settings import Settings
from qlora_kit.demo.training import fine_tune_, perplexity
from qlora_kit.hf_quantizer import record_quantization_

RANK = 16
# Folders that hold no functions with descriptions of their own, or none of this Python's.
_NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data", "lib2to3"}
_PAIRS, _HELD_OUT, _BATCH, _TOKENS, _TEMPERATURE = 1024, 128, 16, 48, 0.05


@dataclass(frozen=True)
class Case:
    """An adapter.

    Attributes:
        model: a folder, or "MiniLM".
        start: "zero" (QLoRA) or "loftq" on a base of ``bits``. Zero starts on others, to be merged into that storage:
            "wide" on one of 4 bits, or 8 if ``bits`` are 4, and "dense" on the 16-bit one.
        aware: train what will be merged at ``bits`` (``LoraConfig.merge_aware``).
    """

    model: str
    bits: int
    rate: float
    start: str = "zero"
    seed: int = 0
    aware: bool = False

    @property
    def key(self) -> str:
        parts = (Path(self.model).name, self.bits, self.start, self.rate, self.seed, *(["aware"] if self.aware else []))
        return " | ".join(map(str, parts))

    @property
    def storage(self) -> dict[str, Any]:
        """What a 16-bit base is merged into, as ``qlora_kit.merge`` takes it: the storage that quantized bases have."""
        own = self.start not in ("wide", "dense")
        return {} if own else {"into": DEFAULT_TYPES[self.bits], "double_quant": True}

    @property
    def stored_bits(self) -> int:
        """Of the quantized base."""
        return self.bits if self.start != "wide" else 8 if self.bits == 4 else 4


class Task:
    """What an adapter is trained and measured on.

    Attributes:
        train: batches of the training text that statistics are collected on.
        builtin: text for them that is neither trained nor measured on.
        original: folder of the 16-bit weights.
        task_type: of the adapter.
        auto, options: how transformers loads the model.
    """

    train: list[dict[str, Tensor]]
    builtin: Any
    original: str
    task_type: str | None = None
    auto: Any = AutoModel
    options: dict[str, Any] = {}  # noqa: RUF012

    def fit_(self, lora: LoraModel, case: Case, steps: int) -> None:
        raise NotImplementedError

    def measure(self, model: nn.Module) -> float:
        raise NotImplementedError

    def load(self, folder: str | Path, **options: Any) -> Any:
        """The model in a folder, as transformers loads it; not yet kept from being rewritten by a forward pass."""
        return self.auto.from_pretrained(folder, dtype=torch.float32, **self.options, **options).eval()


class Language(Task):
    task_type = "CAUSAL_LM"
    auto = AutoModelForCausalLM
    builtin = "builtin"

    def __init__(self, folder: str, steps: int) -> None:
        self.original = folder
        self.tokenizer = Source(folder, "cpu", torch.float32).tokenizer()
        self.windows = windows_of(folder, self.tokenizer, train_rows=4 * steps)
        self.train = [{"input_ids": rows} for rows in self.windows.train[:128].split(8)]

    def fit_(self, lora: LoraModel, case: Case, steps: int) -> None:
        settings = Settings(
            model=self.original,
            out=Path(),
            device="cpu",
            steps=steps,
            rank=RANK,
            seed=case.seed,
            learning_rate=case.rate,
        )
        fine_tune_(lora, self.windows.train, settings, title=case.key)

    def measure(self, model: nn.Module) -> float:
        return perplexity(model, self.windows.held_out)


class Encoder(Task):
    task_type = "FEATURE_EXTRACTION"
    # The pooler is of another use of BERT: sentence embeddings are means.
    options = {"add_pooling_layer": False}  # noqa: RUF012

    def __init__(self) -> None:
        encoder = MiniLM()
        self.original = str(encoder.folder)
        self.builtin = [{k: v for k, v in encoder.batch.items() if k != "token_type_ids"}]
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(encoder.folder)
        pairs = descriptions()
        self.held_out, self.pairs = pairs[:_HELD_OUT], pairs[_HELD_OUT:]
        texts = [text for pair in self.pairs[:256] for text in pair]
        self.train = [self._tokens(texts[i : i + 32]) for i in range(0, len(texts), 32)]

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        found = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=_TOKENS)
        return {"input_ids": found.input_ids, "attention_mask": found.attention_mask}

    def _embedded(self, model: nn.Module, texts: tuple[str, ...]) -> Tensor:
        batch = self._tokens(list(texts))
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def _loss(self, model: nn.Module, pairs: list[tuple[str, str]]) -> Tensor:
        words, code = (self._embedded(model, texts) for texts in zip(*pairs, strict=True))
        likeness = words @ code.T / _TEMPERATURE
        target = torch.arange(len(pairs))
        one, other = (nn.functional.cross_entropy(m, target) for m in (likeness, likeness.T))
        return (one + other) / 2

    def fit_(self, lora: LoraModel, case: Case, steps: int) -> None:
        torch.manual_seed(case.seed)
        lora.train()
        trained = [p for p in lora.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=case.rate, weight_decay=0)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
        order = torch.randperm(len(self.pairs), generator=torch.Generator().manual_seed(case.seed)).tolist()
        for step in range(steps):
            chosen = [self.pairs[order[(step * _BATCH + i) % len(order)]] for i in range(_BATCH)]
            self._loss(lora, chosen).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        lora.eval()

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        model.eval()
        return float(self._loss(model, self.held_out))

    @torch.no_grad()
    def embeddings(self, model: nn.Module) -> Tensor:
        model.eval()
        return torch.cat([self._embedded(model, texts) for texts in zip(*self.held_out, strict=True)])


def task_of(model: str, steps: int) -> Task:
    return _encoder() if model == "MiniLM" else _language(model, steps)


@cache
def _encoder() -> Encoder:
    return Encoder()


@cache
def _language(folder: str, steps: int) -> Language:
    return Language(folder, steps)


def descriptions() -> list[tuple[str, str]]:
    """(first paragraph of the docstring, code without it) of functions in Python's standard library; what is
    held out comes first, from files of its own."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(p for p in root.rglob("*.py") if not _NOT_READ & set(p.relative_to(root).parts))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    held_out, train = [], []
    for number in order:
        target = train if len(held_out) >= _HELD_OUT else held_out
        target.extend(list(_described(names[number]))[:8])
        if len(train) >= _PAIRS:
            break
    return held_out[:_HELD_OUT] + train[:_PAIRS]


def _described(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (words := ast.get_docstring(node)):
            words = " ".join(words.split("\n\n")[0].split())
            if len(words) > 20:
                node.body, node.decorator_list = node.body[1:], []
                node.name = "f"  # the name alone would tell
                yield words, ast.unparse(node)


class Store:
    """Bases and adapters in folders under one; made where they are missing."""

    def __init__(self, folder: Path, steps: dict[str, int]) -> None:
        self.folder, self.steps = folder, steps

    def task(self, case: Case) -> Task:
        return task_of(case.model, self.steps["encoder" if case.model == "MiniLM" else "language"])

    def base_folder(self, case: Case) -> Path:
        return self.folder / f"{Path(case.model).name}-{case.stored_bits}-{case.start.replace('wide', 'zero')}"

    def adapter_folder(self, case: Case) -> Path:
        return self.folder / case.key.replace(" | ", "-")

    def base(self, case: Case) -> Any:
        """The quantized base, from disk."""
        if case.start == "dense":
            return self.task(case).load(self.task(case).original)
        if not (self.base_folder(case) / "config.json").exists():
            self._make(case)
        return self.task(case).load(self.base_folder(case))

    def adapted(self, case: Case) -> LoraModel:
        """The fine-tuned model, from disk."""
        base = self.base(case)
        if not (self.adapter_folder(case) / "adapter_config.json").exists():
            self._train(case)
        lora = LoraModel.from_pretrained(base, self.adapter_folder(case))
        protect_storage_(lora)
        return lora

    def _config(self, case: Case, **start: Any) -> LoraConfig:
        task_type = self.task(case).task_type
        return LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type=task_type, **start)

    def _make(self, case: Case) -> None:
        task = self.task(case)
        if case.start == "loftq":
            options = LoftQConfig(loftq_bits=case.bits, loftq_iter=5, double_quant=True, method="loftq")
            lora = apply_lora(
                prepare_model_for_kbit_training(task.load(task.original), use_gradient_checkpointing=False),
                self._config(case, init_lora_weights="loftq", loftq_config=options),
            )
            lora.save_pretrained(self.base_folder(case) / "start")
            model: Any = lora.unload()
            record_quantization_(model)
        elif case.stored_bits == 4:
            model = task.load(
                task.original,
                quantization_config=BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=torch.float32,
                ),
            )
        else:
            model = quantize_(task.load(task.original), case.stored_bits, double_quant=True)
            record_quantization_(model)
        model.save_pretrained(self.base_folder(case))
        task.tokenizer.save_pretrained(self.base_folder(case))  # type: ignore[attr-defined]

    def _train(self, case: Case) -> None:
        task, base = self.task(case), self.base(case)
        if case.start != "dense":
            base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        aware: Any = (case.storage or "same") if case.aware else None
        if case.start == "loftq":
            folder = self.base_folder(case) / "start"
            config = replace(LoraConfig.from_pretrained(folder), merge_aware=aware)
            lora = LoraModel.from_pretrained(base, folder, is_trainable=True, config=config)
        else:
            torch.manual_seed(case.seed)
            lora = apply_lora(base, self._config(case, merge_aware=aware))
        task.fit_(lora, case, self.steps["encoder" if case.model == "MiniLM" else "language"])
        lora.save_pretrained(self.adapter_folder(case))
