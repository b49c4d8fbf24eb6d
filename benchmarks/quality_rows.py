"""The rows of ``quality``'s tables: starts, what they are calibrated on, and where each stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qlora_kit import LoftQConfig, LoraConfig

# Means of real weights under a budget: with the scales of rows, 2.19 bits a weight and so on.
_MEANS = (2.16, 2.25, 2.5, 2.97, 3.09, 3.97)
# Of the models trained here: the built-in text.
BUILTIN_ROWS = {"calibration_rows": 128, "calibration_tokens": 256}


@dataclass(frozen=True)
class Start:
    """A row of the table.

    Attributes:
        name: of the row.
        options: of LoftQConfig.
        zero: quantize plainly and begin with B = 0.
        rule: how bits are allocated where the mean is between two.
        bits: where the row stands; empty is everywhere.
        text, rows: what the real model is calibrated on: "own", the test's domain, "other", "mixed" of both in turns,
            or "builtin"; how many rows of 256 tokens.
        distilled: then the adapters learn from the original on that text (``loftq.distill``).
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    zero: bool = False
    rule: str = "milp"
    bits: tuple[float, ...] = ()
    text: str = "own"
    rows: int = 32
    distilled: bool = False


def _all_starts() -> list[Start]:
    nf: dict[str, Any] = {"quant_type": "nf"}
    return [
        Start("zero, nf (QLoRA)", nf, zero=True, bits=(2, 3)),
        Start("loftq T=1, nf", {**nf, "loftq_iter": 1}, bits=(2, 3)),
        Start("loftq T=5, nf", nf, bits=(2, 3)),
        Start("qera T=5, nf", {**nf, "method": "qera"}, bits=(2, 3)),
        Start("zero", zero=True),
        Start("loftq T=1", {"loftq_iter": 1}),
        Start("loftq T=5"),
        Start("loftq T=5, rule", rule="first-layers", bits=(2.25, 2.5)),
        *(Start(name, {"method": name}) for name in ("qera-diag", "qera", "pissa", "srr", "cloq", "aligned")),
        Start("aligned, rule", {"method": "aligned"}, rule="first-layers", bits=(2.25, 2.5)),
        Start("loftq T=5, searched scales", {"scale_search": True}),
        Start("srr, searched scales", {"method": "srr", "scale_search": True}, bits=(2,)),
        Start("cloq, lloyd", {"method": "cloq", "quant_type": "lloyd"}, bits=(2,)),
        Start("aligned, lloyd", {"method": "aligned", "quant_type": "lloyd"}, bits=(2,)),
    ]


def _real_starts() -> list[Start]:
    aligned: dict[str, Any] = {"method": "aligned"}
    trellis: dict[str, Any] = {**aligned, "quant_type": "trellis", "loftq_iter": 1}
    kvo: dict[str, Any] = {**trellis, "bits_pattern": {"[kvo]_proj": 3}}
    nothing: dict[str, Any] = {"loftq_iter": 1, "double_quant": False, "method": "auto", "calibration_tokens": 512}
    return [
        Start("no options", nothing, text="builtin", rows=128, bits=(2, 3)),
        Start("zero, nf (QLoRA)", {"quant_type": "nf"}, zero=True, bits=(2, 3)),
        Start("loftq T=5, nf", {"quant_type": "nf"}, bits=(2, 3)),
        Start("zero", zero=True),
        Start("loftq T=5"),
        Start("loftq T=5, rule", rule="first-layers", bits=(2.25, 2.5)),
        *(Start(name, {"method": name}) for name in ("qera", "srr", "cloq", "aligned")),
        Start("aligned, rule", aligned, rule="first-layers", bits=(2.25, 2.5)),
        *(Start(f"aligned, {rows} rows", aligned, rows=rows, bits=(2, 3, 4)) for rows in (8, 128)),
        Start("aligned, on code", aligned, text="other", bits=(2, 3, 4)),
        Start("aligned, on code, 128 rows", aligned, text="other", rows=128, bits=(2, 3, 4)),
        Start("aligned, built-in text", aligned, text="builtin", bits=(2, 3, 4)),
        Start("aligned, built-in text, 128 rows", aligned, text="builtin", rows=128, bits=(2, 3, 4)),
        Start("cloq, on code", {"method": "cloq"}, text="other", bits=(2,)),
        Start("loftq T=1, trellis", {"quant_type": "trellis", "loftq_iter": 1}, bits=(2, 3, 4)),
        *(Start(f"aligned, trellis, {rows} rows", trellis, rows=rows, bits=(2, 3, 4)) for rows in (8, 32, 128)),
        *(
            Start(f"aligned, trellis, {words}, {rows} rows", trellis, text=text, rows=rows, bits=(2, 3, 4))
            for text, words in (("other", "on code"), ("mixed", "on news and code"), ("builtin", "built-in text"))
            for rows in (32, 128)
        ),
        Start("aligned, trellis, rule", trellis, rule="first-layers", bits=(2.25, 2.5)),
        *(
            Start(f"aligned, trellis, under a budget, {rows} rows", trellis, rows=rows, bits=_MEANS)
            for rows in (32, 128)
        ),
        *(
            Start(
                f"aligned, trellis, under a budget, {n} rows, distilled", trellis, rows=n, bits=_MEANS, distilled=True
            )
            for n in (32, 128)
        ),
        Start("zero, nf (QLoRA), distilled", {"quant_type": "nf"}, zero=True, bits=(3, 4), rows=128, distilled=True),
        Start("loftq T=5, distilled", bits=(2, 3, 4), rows=128, distilled=True),
        *(Start(f"aligned, trellis, k, v and o at 3 bits, {n} rows", kvo, rows=n, bits=(2,)) for n in (32, 128)),
    ]


STARTS, REAL_STARTS = _all_starts(), _real_starts()


def lora_config(start: Start, bits: float, rank: int, texts: Mapping[str, Tensor] | None = None) -> LoraConfig:
    """The configuration of a row; ``texts`` are the real model's, rows of tokens by what ``Start.text`` calls
    them."""
    options: dict[str, Any] = {"loftq_iter": 1 if start.zero else 5, "double_quant": True, "method": "loftq"}
    if texts is None:
        options |= BUILTIN_ROWS
    elif start.text in texts:
        options["calibration"] = texts[start.text][: start.rows]
    else:
        options |= {"calibration": start.text, "calibration_rows": start.rows, "calibration_tokens": 256}
    options |= start.options
    whole = int(bits) if bits == int(bits) or "quant_type" in options else 4
    if "quant_type" in options:
        options["quant_type"] += str(whole)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=whole, **options),
    )
