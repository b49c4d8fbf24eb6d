"""What ``calibration`` is where nobody said: the built-in text, for 2 and 3 bits of a language model.

Without a look at the inputs a start of few bits minimizes the weight's error, and a well-trained model doesn't survive
what is left of it (``FIGURES``). A text of ours is of another domain than most, and still better than none. Whether a
model can read it is for the model to say: it takes token ids, and its tokenizer is on this machine, since nothing is
downloaded that nobody asked for. Any other model starts as method "loftq" does, with a warning, since scripts that ran
go on running.

``calibration=None`` with method "auto" asks for that start on purpose, and is warned of; method "loftq" by its name
isn't.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn

from qlora_kit.config.loftq import LoftQConfig
from qlora_kit.config.lora import LoraConfig
from qlora_kit.errors import StorageError
from qlora_kit.injection.engine import Plan
from qlora_kit.naming import unwrapped

from ..inputs.text import BUILTIN, builtin_text, load_tokenizer, token_ids
from .startable import DENSE

logger = logging.getLogger(__name__)

#: Of English news, rank 16, before any fine-tune, "loftq" T=5 and "aligned" on 32 rows of the same domain, as
#: benchmarks/quality.py measures them.
FIGURES = "SmolLM2-135M at 2 bits: perplexity 5,441 so, 83 with a text, 34.5 at 16 bits"
# Characters of the text that a tokenizer is tried on, how many of them a token has at most, and how many different
# tokens they are at least.
_SAMPLE, _LONGEST, _FEWEST = 20_000, 64, 12


def with_text(model: nn.Module, config: LoraConfig, plan: Plan) -> LoraConfig:
    """``config`` with a text, or with the method that needs none, where it left both to the model."""
    options = config.loftq_config or LoftQConfig()
    quantizes = any(entry.codec in DENSE for entry in plan.entries)
    if options.method != "auto" or options.gives_text or not (options.few_bits and quantizes):
        return config
    if options.calibration is None:
        warnings.warn(
            f"calibration none: a start of 2 or 3 bits looks at no inputs then, which ruins most models ({FIGURES}); "
            "leave it out for the built-in text, pass a text, or name method='loftq' to be asked no more",
            stacklevel=2,
        )
        return config
    if (reason := _why_unreadable(unwrapped(model))) is None:
        _say_once(
            "calibration: none was given, and 2 or 3 bits need a look at the layers' inputs, so the built-in text is "
            "taken, Python's own documentation and sources; a text of what the model is for is better: pass "
            "calibration=FILE"
        )
        return replace(config, loftq_config=replace(options, calibration=BUILTIN))
    warnings.warn(
        f"calibration: expected a text for a start of 2 or 3 bits, found none, and the built-in one can't be read: "
        f"{reason}; it is method 'loftq' now, which ruins most language models ({FIGURES}): pass token ids or "
        "batches as LoftQConfig(calibration=...), or name method='loftq' if that is meant",
        stacklevel=2,
    )
    return replace(config, loftq_config=replace(options, method="loftq", calibration=None))


def _why_unreadable(model: nn.Module) -> str | None:
    """Why our text can't be run through ``model``; None if it can."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return f"{type(model).__name__} isn't a model that takes token ids"
    config: Any = getattr(model, "config", None)
    place = getattr(config, "_name_or_path", None)
    if not place:
        return f"this {type(model).__name__} doesn't say where it is from, so its tokenizer can't be found"
    try:
        tokenizer = load_tokenizer(place, local=True)
    except StorageError:
        return f"there is no tokenizer beside {place}"
    sample = next(builtin_text(_SAMPLE))[:_SAMPLE]
    ids = token_ids([sample], tokenizer)
    # Where there are no files transformers makes tokenizers of some architectures that know no words.
    if len(ids) * _LONGEST < len(sample) or len(ids.unique()) < _FEWEST:
        return f"there is no tokenizer beside {place} that knows words"
    known = getattr(config.get_text_config(), "vocab_size", None)
    if known is not None and int(ids.max()) >= known:
        return f"the tokenizer beside {place} is of another vocabulary"
    return None


@cache
def _say_once(text: str) -> None:
    logger.warning(text)
