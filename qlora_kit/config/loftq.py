"""LoftQConfig: how a start quantizes, looks at the inputs, and finds its factors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..codecs.codebooks import STORED_TYPES
from ..errors import closest
from .checks import check_bool, check_choice, check_int, check_positive, check_regex, failure

# What a number of bits means where no type is named. benchmarks/RESULTS.md has the comparison behind it.
DEFAULT_TYPES = {2: "signed2", 3: "lloyd3", 4: "nf4", 8: "int8"}
# The same where modules of several bits stand in one model, all packed by us.
MIXED_TYPES = {2: "signed2", 3: "lloyd3", 4: "nf4", 8: "uniform8"}
# What ``calibration`` is by default: a text of ours where few bits need one and the model can read it.
AUTO = "auto"
# Up to so many bits an uncalibrated start ruins a well-trained model: loftq/starts/alarm.py has figures.
FEW_BITS = 3


@dataclass
class LoftQConfig:
    """How ``init_lora_weights="loftq"`` quantizes the targeted weights and starts the adapters.

    Attributes:
        loftq_bits: bits per weight: 2, 3, 4 or 8.
        loftq_iter: alternating steps (Li et al. 2023, Algorithm 1); the best iterate is kept.
        quant_type: a type of ``qlora_kit.codecs.codebooks`` ("nf4", "nf2", "signed2", "affine3", ...) or "int8";
            None takes ``DEFAULT_TYPES`` of the bits. "trellis2", "trellis3" and "trellis4" leave least of a weight's
            error, after a search that takes tens of times as long.
        blocksize: weights that share a scale, or "row", which rotated and trellis types always have.
        double_quant: quantize the scales too.
        weights: a folder with the 16-bit safetensors of a model that is already quantized; the adapters then
            start from the difference.
        method: how the start is found: "loftq", "qera-diag", "qera", "pissa", "srr", "cloq", "aligned", or a name
            registered with ``loftq.register_method``. All but "loftq" and "pissa" look at the layers' inputs.
            "auto" is the best that can be done with what is given: "aligned" with a ``calibration``, "loftq" without.
        seed: of the decomposition's random start, for large weights.
        calibration: the text that gives the inputs: "builtin" (Python's own documentation and sources), a UTF-8
            file, token ids (rows, tokens), or a list of batches, each a dictionary that the model is called with.
            None is none, but for a named method that looks at the inputs "builtin". "auto" is as None, but for 2 and
            3 bits of a language model with its tokenizer beside it "builtin" (``loftq.starts.default_text``).
        calibration_rows, calibration_tokens: for text: how many rows of how many tokens to cut from it.
        damping: share of the inputs' mean square that is added to each one's own; None finds it layer by layer on
            other rows for "aligned", and is 0.01 for the other methods.
        scale_search: search the scales of blocks (True), or take them from the largest magnitudes (False); None
            leaves it to the method.
        adapter_aware: round so that the adapter takes most of the error back (True; for "cloq" and "aligned"), or not
            (False); None leaves it to the method, and "aligned" does. The quantized weights are then of no use without
            their adapter.
        bits_pattern: other bits by path, end of a path, or regular expression, as ``rank_pattern``. Where it is
            given, all modules are packed ones, of the types ``MIXED_TYPES``, or of the family of ``quant_type``:
            "trellis2" is then "trellis3" where a module gets 3 bits.

    Raises:
        ConfigError: a field has a value that can't work.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1
    quant_type: str | None = None
    blocksize: int | str = 64
    double_quant: bool = False
    weights: str | None = None
    method: str = "auto"
    seed: int = 0
    calibration: Any = field(default=AUTO, compare=False)
    calibration_rows: int = 128
    calibration_tokens: int = 512
    damping: float | None = None
    scale_search: bool | None = None
    adapter_aware: bool | None = None
    bits_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.loftq_bits, bool) or self.loftq_bits not in (2, 3, 4, 8):
            raise failure("loftq_bits", "2, 3, 4 or 8", self.loftq_bits, "pass loftq_bits=4")
        check_int("loftq_iter", self.loftq_iter, 1, "pass loftq_iter=1 or more; 5 is a good choice")
        if self.quant_type is not None:
            check_choice("quant_type", self.quant_type, STORED_TYPES, "leave quant_type out")
            if int(self.quant_type[-1]) != self.loftq_bits:
                fix = f"pass loftq_bits={self.quant_type[-1]} or leave quant_type out"
                raise failure("quant_type", f"a type of {self.loftq_bits} bits", self.quant_type, fix)
        if self.blocksize != "row":
            check_int("blocksize", self.blocksize, 1, "pass blocksize=64, or 'row'")
        check_bool("double_quant", self.double_quant)
        if not isinstance(self.method, str):
            raise failure("method", "the name of a method", self.method, "pass method='auto'")
        check_int("seed", self.seed, 0, "pass seed=0")
        for name in ("calibration_rows", "calibration_tokens"):
            check_int(name, getattr(self, name), 1, f"pass {name}=128")
        if self.damping is not None:
            check_positive("damping", self.damping, "pass damping=0.01")
        for name in ("scale_search", "adapter_aware"):
            if getattr(self, name) is not None:
                check_bool(name, getattr(self, name))
        for pattern, bits in self.bits_pattern.items():
            if isinstance(bits, bool) or bits not in MIXED_TYPES:
                raise failure("bits_pattern", "2, 3, 4 or 8", {pattern: bits}, "pass one of these")
            check_regex("bits_pattern", pattern)
        if self.weights is not None:
            if not isinstance(self.weights, (str, os.PathLike)):
                raise failure("weights", "a folder", self.weights, "pass the path of the 16-bit model")
            self.weights = os.fspath(self.weights)

    def mixed_type(self, bits: int) -> str:
        """The type of modules of ``bits`` bits where modules of several stand in one model."""
        own = (self.quant_type or "").rstrip("0123456789") + str(bits)
        return own if own in STORED_TYPES and own != "int8" else MIXED_TYPES[bits]

    @property
    def chosen_method(self) -> str:
        """``method``, or what "auto" means here."""
        if self.method != "auto":
            return self.method
        return "aligned" if self.gives_text else "loftq"

    @property
    def gives_text(self) -> bool:
        """Whether ``calibration`` is a text; at its default that is for the model to say."""
        return self.calibration is not None and not (isinstance(self.calibration, str) and self.calibration == AUTO)

    @property
    def few_bits(self) -> bool:
        """Whether any module gets 2 or 3."""
        return min(self.loftq_bits, *self.bits_pattern.values(), 8) <= FEW_BITS

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoftQConfig:
        """From PEFT's dictionary form. Raises ConfigError for a key that isn't a field."""
        own = [f.name for f in fields(cls)]
        for key in data:
            if key not in own:
                near = closest(key, own, count=1)
                fix = f"did you mean {near[0]!r}?" if near else "remove it"
                raise failure("loftq_config", f"the keys {own}", key, fix)
        return cls(**data)
