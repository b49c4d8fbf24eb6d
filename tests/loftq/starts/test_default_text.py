"""2 and 3 bits without a calibration: a text of ours where the model can read it, and what is said in every case."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_models import assert_same, logits, tensors
from tiny_llama import llama
from tiny_lm import write_tiny_lm
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loftq import allocate, start_report
from loftq.bits.budget import Budget
from loftq.disk.stream import stream
from loftq.disk.task import Task
from loftq.starts import default_text
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora
from qlora_kit.codecs import codec_for

SMALL = {"calibration_rows": 4, "calibration_tokens": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with its tokenizer beside it."""
    return write_tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    default_text._say_once.cache_clear()


def config(**loftq: Any) -> LoraConfig:
    return LoraConfig(
        r=2,
        target_modules="all-linear",
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(**SMALL, **loftq),
    )


def started(folder: Path, lora: LoraConfig) -> LoraModel:
    return apply_lora(AutoModelForCausalLM.from_pretrained(folder), lora)


def same(first: LoraModel, second: LoraModel) -> bool:
    pairs = zip(first.adapter_layers().values(), second.adapter_layers().values(), strict=True)
    return all(
        torch.equal(codec_for(a.base_layer).read(a.base_layer), codec_for(b.base_layer).read(b.base_layer))
        and all(map(torch.equal, a.factors("default"), b.factors("default")))
        for a, b in pairs
    )


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("loftq")]


# -- which text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3])
def test_a_language_model_is_started_on_the_built_in_text_which_is_said_once(
    bits: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = config(loftq_bits=bits)
    with caplog.at_level(logging.WARNING):
        found = started(folder, asked)
        started(folder, asked)
    assert len([text for text in said(caplog) if "so the built-in text is taken" in text]) == 1
    settled = found.peft_config["default"].loftq_config
    assert settled is not None
    assert (settled.calibration, settled.chosen_method) == ("builtin", "aligned")
    assert asked.loftq_config is not None
    assert asked.loftq_config.calibration == "auto", "a config is never changed by who reads it"
    report = start_report(found)
    assert report.calibrated
    assert report.options["method"] == "aligned"
    assert same(found, started(folder, config(loftq_bits=bits, method="aligned", calibration="builtin")))


@pytest.mark.parametrize("options", [{}, {"loftq_bits": 8}, {"loftq_bits": 2, "method": "loftq"}])
def test_more_bits_and_a_named_method_are_as_they_were(
    options: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = started(folder, config(**options))
    assert same(found, started(folder, config(**{"method": "loftq", "calibration": None, **options})))
    assert not start_report(found).calibrated
    assert not said(caplog)


def test_a_text_of_ones_own_is_taken(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.arange(128).reshape(4, 32) % 250
    found = started(folder, config(loftq_bits=2, calibration=ids))
    assert same(found, started(folder, config(loftq_bits=2, method="aligned", calibration=ids)))
    assert not said(caplog)


def test_bits_by_pattern_count(folder: Path) -> None:
    found = started(folder, config(loftq_bits=4, bits_pattern={"q_proj": 3}))
    assert start_report(found).calibrated


def test_none_is_the_published_way_with_a_warning_that_says_what_it_costs(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"calibration none: .* ruins most models .*SmolLM2-135M"):
        found = started(folder, config(loftq_bits=2, calibration=None))
    assert same(found, started(folder, config(loftq_bits=2, method="loftq")))


# -- models that can't read it ---------------------------------------------------------------------------------


def bare_llama() -> nn.Module:
    return llama()


def of_another_vocabulary(folder: Path) -> nn.Module:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=8
        )
    )
    model.config._name_or_path = str(folder)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: nn.Sequential(nn.Linear(32, 32)), "Sequential isn't a model that takes token ids"),
        (lambda folder: bare_llama(), "doesn't say where it is from"),
        (of_another_vocabulary, "is of another vocabulary"),
    ],
)
def test_other_models_start_as_they_did_with_a_warning_that_says_what_to_give(
    make: Any, reason: str, folder: Path
) -> None:
    model = make(folder)
    plain = apply_lora(copy.deepcopy(model), config(loftq_bits=2, method="loftq"))
    with pytest.warns(UserWarning, match=rf"{reason}.*pass token ids or batches as LoftQConfig\(calibration="):
        found = apply_lora(model, config(loftq_bits=2))
    assert same(found, plain)
    settled = found.peft_config["default"].loftq_config
    assert settled is not None
    assert (settled.method, settled.calibration) == ("loftq", None)


def test_a_folder_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    """transformers makes tokenizers without words for some architectures, from the model's config alone."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"there is no tokenizer beside {re.escape(str(tmp_path))}"):
        found = started(tmp_path, config(loftq_bits=2))
    assert same(found, started(tmp_path, config(loftq_bits=2, method="loftq")))


def test_nothing_is_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    asked: list[Any] = []

    def refuse(place: str, **options: Any) -> None:
        asked.append((place, options["local_files_only"]))
        raise OSError("not here")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    model: Any = bare_llama()
    model.config._name_or_path = "somebody/something"
    with pytest.warns(UserWarning, match="there is no tokenizer beside somebody/something"):
        apply_lora(model, config(loftq_bits=2))
    assert asked == [("somebody/something", True)]


def test_what_is_quantized_already_is_asked_nothing(folder: Path, tmp_path: Path) -> None:
    base = started(folder, config(loftq_bits=2, method="loftq")).unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = apply_lora(base, config(loftq_bits=2, weights=str(folder)))
    assert not start_report(found).calibrated


# -- under a budget, and on disk -------------------------------------------------------------------------------


def test_a_budget_is_of_few_bits(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    found, named = (
        allocate(model, config(**options), bits=2.5)
        for options in ({}, {"method": "aligned", "calibration": "builtin"})
    )
    assert found.choices == named.choices
    settled = found.config.loftq_config
    assert settled is not None
    assert settled.calibration == "builtin"


@pytest.mark.parametrize("budget", [None, Budget(2.5)])
def test_on_disk_it_is_the_same_and_goes_on(budget: Budget | None, folder: Path, tmp_path: Path) -> None:
    asked = config(loftq_bits=4 if budget else 2)
    named = config(loftq_bits=4 if budget else 2, method="aligned", calibration="builtin")
    report = stream(Task(folder, tmp_path / "out", asked, budget=budget))
    assert report.options["method"] == "aligned"
    assert report.options["calibration"].startswith("builtin, Python")
    stream(Task(folder, tmp_path / "named", named, budget=budget))
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "named"))
    # What was asked for by its name is the same task, so that it goes on with what is there.
    assert stream(Task(folder, tmp_path / "out", named, budget=budget)).to_dict() == report.to_dict()
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))).all()


# -- the field itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ["auto", None, "builtin"])
def test_it_survives_every_form(calibration: str | None, tmp_path: Path) -> None:
    lora = config(loftq_bits=2, calibration=calibration)
    lora.save_pretrained(tmp_path)
    copies = [
        copy.deepcopy(lora),
        copy.copy(lora),
        pickle.loads(pickle.dumps(lora)),
        LoraConfig.from_dict(lora.to_dict()),
        LoraConfig.from_pretrained(tmp_path),
    ]
    for again in copies:
        assert again.loftq_config is not None
        assert again.loftq_config.calibration == calibration
    stored = json.loads((tmp_path / "adapter_config.json").read_text())["loftq_config"]
    assert ("calibration" in stored) == (calibration != "auto")


def test_tensors_are_left_out_of_files_and_read_as_the_default(tmp_path: Path) -> None:
    config(loftq_bits=2, calibration=torch.ones(2, 8, dtype=torch.int64)).save_pretrained(tmp_path)
    again = LoraConfig.from_pretrained(tmp_path).loftq_config
    assert again is not None
    assert again.calibration == "auto"


def test_files_of_earlier_releases_and_of_peft_read_as_the_default() -> None:
    """They have no such field, or only the bits."""
    data = {"peft_type": "LORA", "r": 2, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}}
    options = LoraConfig.from_dict(data).loftq_config
    assert options is not None
    assert options.calibration == "auto"
    assert options.chosen_method == "loftq"  # until a model says that it can read a text
