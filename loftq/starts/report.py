"""What a LoftQ start did, layer by layer and in all: a table, JSON, and a plot. Says where it didn't help."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.checkpoints.files import json_object, write_text_atomically
from qlora_kit.checkpoints.records import read_record
from qlora_kit.config.lora import LoftQConfig
from qlora_kit.errors import AdapterError, ConfigError, StorageError
from qlora_kit.injection.ranks import lowered
from qlora_kit.model.lora_model import LoraModel

from ..methods.registry import needs_of
from .alarm import alarm
from .kept_dense import KeptDense

JSON_NAME = "loftq_report.json"
PLOT_NAME = "loftq_report.png"
# What an error is called, and the fields of the plain quantization's and the start's.
_WEIGHT_ERRORS = ("error", "zero_error", "error")
_OUTPUT_ERRORS = ("output error", "zero_output_error", "output_error")
# What the table's columns are, for who sees one for the first time.
_LEGEND = (
    "  of the weight W, relative to it: plain, its error when rounded alone; W-Q, as it is stored; W-Q-sBA, with the "
    "adapter; captured, the share of W-Q (squared) that the adapter makes up for; s, seconds"
)
_LEGEND_OF_OUTPUTS = (
    "  of the layer's output, relative to it: output, its error with the adapter; plain, when rounded alone"
)


@dataclass(frozen=True)
class LayerReport:
    """One layer; errors are Frobenius norms relative to ||W||, measured on the stored weight.

    Attributes:
        path: the module.
        quant_type, bits: of the stored weight; bits a weight, scales included.
        rank: of its adapter.
        zero_error: ||W - Q|| of the weight quantized plainly, which is where a zero start begins.
        quantization_error: ||W - Q|| of the weight that is stored.
        error: ||W - Q - s B A||.
        steps: alternations that ran.
        output_error, zero_output_error: the same of the output, by second moments of the inputs, the first of what is
            left of what the method aims at ("aligned": not W itself), to that; None without.
        seconds: all that was done for the layer.
        tokens: inputs that the second moments are of; None without.
        in_features: the layer's width, where a matrix of that many rows was collected.
    """

    path: str
    quant_type: str
    bits: float
    rank: int
    zero_error: float
    quantization_error: float
    error: float
    steps: int
    output_error: float | None = None
    zero_output_error: float | None = None
    seconds: float = 0.0
    tokens: int | None = None
    in_features: int | None = None

    @property
    def captured(self) -> float:
        """The share of the stored weight's squared rounding error that the adapter makes up for."""
        return 1 - (self.error / self.quantization_error) ** 2 if self.quantization_error else 1.0

    @property
    def note(self) -> str:
        """Why the start is no better than none; empty where it is."""
        if self.zero_error == 0:
            return "the weight is exact without a start"
        if self.output_error is not None and self.output_error >= (self.zero_output_error or 0.0):
            return (
                f"worse than no start on its own inputs: output error {self.output_error:.4f} against "
                f"{self.zero_output_error:.4f}; 'loftq' follows the weight's error instead, 'aligned' also what "
                "earlier layers got wrong"
            )
        if self.error >= self.zero_error and self.output_error is None:
            return (
                f"worse than no start: {self.error:.4f} against {self.zero_error:.4f}; storing rounded the result "
                "again by more than the adapter makes up for"
            )
        if self.captured < 0.01 and self.output_error is None:
            return f"hardly better than no start: rank {self.rank} holds {self.captured:.1%} of the rounding error"
        return ""


@dataclass(frozen=True)
class Report:
    """All layers of a model.

    Attributes:
        source: the 16-bit model.
        options: what was asked for.
        layers: one row a quantized module.
        left_out: matrices that stay in their original type, alike ones together: name -> (how many, bytes).
        kept: targeted modules that stay dense, with a plain start of their adapters: path -> why.
        lowered: the ranks that were asked for, by path, of layers that haven't as many and got all that they have.
        checksums: of each stored file's parts, by tensor or file name, see ``qlora_kit.checkpoints.checksums``.
        source_bytes: of all of the model's tensors; 0 where it isn't known.
    """

    source: str
    options: Mapping[str, Any]
    layers: list[LayerReport]
    left_out: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    lowered: Mapping[str, int] = field(default_factory=dict)
    checksums: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    source_bytes: int = 0

    def total(self, name: str) -> float:
        """Root of the layers' mean square of an error, each layer that it is known of counting alike."""
        values = [value for layer in self.layers if (value := getattr(layer, name)) is not None]
        return (sum(value**2 for value in values) / max(1, len(values))) ** 0.5

    @property
    def calibrated(self) -> bool:
        """Whether errors of outputs are known, of any layer."""
        return any(layer.output_error is not None for layer in self.layers)

    @property
    def alarm(self) -> str:
        """That the model may be ruined, if that is so; see ``loftq.starts.alarm``."""
        try:
            sequential = needs_of(self.options.get("method", "loftq")).sequential
        except ConfigError:  # of one's own, and not registered where the report is read
            sequential = False
        known = [row.tokens / row.in_features for row in self.layers if row.tokens is not None and row.in_features]
        return alarm(
            self.total("error"),
            self.total("output_error") if self.calibrated else None,
            sequential=sequential,
            tokens_per_input=min(known, default=None),
        )

    @property
    def seconds(self) -> float:
        """Computing time of all layers, in whatever number of runs."""
        return sum(layer.seconds for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(layer), "captured": layer.captured, "note": layer.note} for layer in self.layers]
        totals = {name: self.total(name) for name in ("zero_error", "quantization_error", "error")}
        return {
            "source": self.source,
            "options": dict(self.options),
            "totals": {**totals, "layers": len(rows), "seconds": self.seconds},
            "layers": rows,
            "left_out": {name: list(found) for name, found in self.left_out.items()},
            "kept": dict(self.kept),
            "lowered": dict(self.lowered),
            "checksums": {name: dict(found) for name, found in self.checksums.items()},
            "source_bytes": self.source_bytes,
        }

    def __str__(self) -> str:
        width = max([len(layer.path) for layer in self.layers] + [20])
        outputs = self.calibrated
        head = f"{'module':{width}}  {'type':9} {'bits':>5} {'rank':>4} {'plain':>7} {'W-Q':>7} {'W-Q-sBA':>7}"
        lines = [f"{head} {'captured':>8}" + (f" {'output':>7} {'plain':>7}" if outputs else "") + f" {'s':>6}"]
        for layer in self.layers:
            line = (
                f"{layer.path:{width}}  {layer.quant_type:9} {layer.bits:>5.2f} {layer.rank:>4} "
                f"{layer.zero_error:>7.4f} {layer.quantization_error:>7.4f} {layer.error:>7.4f} {layer.captured:>8.1%}"
            )
            if outputs:
                known = (layer.output_error, layer.zero_output_error)
                line += "".join(f" {'-':>7}" if error is None else f" {error:>7.4f}" for error in known)
            lines.append(line + f" {layer.seconds:>6.2f}")
        what, zero, error = _OUTPUT_ERRORS if outputs else _WEIGHT_ERRORS
        lines.append(
            f"{len(self.layers)} layers: {what} {self.total(zero):.4f} quantized plainly, {self.total(error):.4f} with "
            f"{self.options.get('method', 'loftq')} (root mean square), {self.seconds:.1f} s of work on layers"
        )
        lines += [_LEGEND, *([_LEGEND_OF_OUTPUTS] if outputs else [])]
        if short := short_calibration(self.layers):
            lines.append(f"note: {short}")
        if outputs and (unseen := [layer.path for layer in self.layers if layer.tokens is None]):
            lines.append(f"note: {not_reached(unseen, len(self.layers))}")
        lines += [f"note: {layer.path}: {layer.note}" for layer in self.layers if layer.note]
        reasons = Counter(self.kept.values())
        lines += [
            f"kept dense: {next(path for path, why in self.kept.items() if why == reason)}"
            f"{f' and {count - 1} more' if count > 1 else ''}: {reason}; the adapter starts at zero"
            for reason, count in reasons.items()
        ]
        lines += _lowered(self.lowered, {layer.path: layer.rank for layer in self.layers})
        lines += [
            f"left as it was: {name}: {count} tensor{'s' if count > 1 else ''}, {size / 1e6:,.1f} MB{self._share(size)}"
            for name, (count, size) in self.left_out.items()
        ]
        if (several := self._several_scales()) is not None:
            lines.append(f"servers: {several}")
        if self.alarm:
            lines.append(self.alarm)
        return "\n".join(lines)

    def _several_scales(self) -> str | None:
        """What to do before servers take the adapter; None if all of them scale it as it is meant."""
        ranks = sorted({layer.rank for layer in self.layers})
        why = [f"ranks from {ranks[0]} to {ranks[-1]}"] if len(ranks) > 1 else []
        if not why and self.lowered.keys() & self.kept.keys():
            why = ["several ranks"]
        if self.options.get("use_rslora"):
            why.append("rslora's scale")
        if not why:
            return None
        return (
            f"they know one rank and the scale alpha / rank, and this adapter has {' and '.join(why)}; once it is "
            f"trained, `qlora-kit compress ADAPTER --rank {max([*ranks, *self.lowered.values()])} --out SERVED` writes "
            "the same with one rank and scale 1"
        )

    def _share(self, size: int) -> str:
        return f", {size / self.source_bytes:.1%} of the model" if self.source_bytes else ""

    def save(self, folder: Path) -> None:
        """Write ``loftq_report.json`` and ``loftq_report.png`` into ``folder``."""
        write_text_atomically(folder / JSON_NAME, json.dumps(self.to_dict(), indent=2) + "\n")
        self.plot(folder / PLOT_NAME)

    @classmethod
    def load(cls, folder: Path) -> Report:
        """The report of a finished run.

        Raises:
            StorageError: there is none, or a damaged one.
        """
        path = folder / JSON_NAME
        if not path.is_file():
            raise StorageError(f"{path}: expected the report of a finished run, found none; run loftq init to its end")
        try:
            data = json_object(path.read_bytes())
            derived = ("captured", "note")
            kept = [{k: v for k, v in row.items() if k not in derived} for row in data["layers"]]
            rows = [read_record(LayerReport, row, path) for row in kept]
            left_out = {name: (int(count), int(size)) for name, (count, size) in data["left_out"].items()}
            return cls(
                data["source"],
                data["options"],
                rows,
                left_out,
                dict(data.get("kept", {})),
                data.get("lowered", {}),
                data.get("checksums", {}),
                int(data.get("source_bytes", 0)),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{path}: expected a report, found something else ({error!r}); run loftq init again"
            ) from error

    def plot(self, path: Path) -> None:
        """Each layer's error, plainly quantized and from the start, in the order of the model: the output's where it
        is known."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        layers = range(len(self.layers))
        figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
        outputs = self.calibrated
        _, zero, error = _OUTPUT_ERRORS if outputs else _WEIGHT_ERRORS
        # matplotlib leaves out what is NaN: layers that no text reached.
        plain, errors = ([_known(getattr(layer, name)) for layer in self.layers] for name in (zero, error))
        axes.vlines(layers, errors, plain, color="0.85", zorder=0)
        axes.plot(layers, plain, "o", ms=3, color="0.6", label="quantized plainly")
        axes.plot(layers, errors, "o", ms=3, color="C0", label=f"with {self.options.get('method', 'loftq')}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer, in the order of names")
        axes.set_ylabel("error of the output, relative to it" if outputs else "W - Q - sBA relative to ||W||")
        bits = sum(layer.bits for layer in self.layers) / max(1, len(self.layers))
        axes.set_title(f"{len(self.layers)} layers at {bits:.2f} bits a weight")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150, metadata={"Software": None})
        plt.close(figure)


def _lowered(asked: Mapping[str, int], ranks: Mapping[str, int]) -> list[str]:
    """Lines on layers that got a smaller rank than was asked for, alike ones together."""
    groups = Counter((re.sub(r"\.\d+(?=\.)", ".*", path), ranks[path], rank) for path, rank in asked.items())
    return [
        f"rank lowered: {name}: {rank} instead of {wanted}, all that the weight has "
        f"({count} layer{'s' if count > 1 else ''})"
        for (name, rank, wanted), count in groups.items()
    ]


def _known(error: float | None) -> float:
    return float("nan") if error is None else error


def not_reached(paths: Sequence[str], of: int) -> str:
    """What to say of modules that no calibration text came to."""
    return (
        f"calibration: expected text that reaches every targeted module, found none of it at {paths[0]} "
        f"({len(paths)} of {of}); they start as with method 'loftq'; calibrate on more text, or leave out what the "
        "model doesn't call"
    )


def short_calibration(layers: Sequence[LayerReport]) -> str:
    """What to say of inputs too few for the layers' widths; empty where they suffice."""
    short = [row for row in layers if row.tokens is not None and row.tokens < (row.in_features or 0)]
    if not short:
        return ""
    worst = max(short, key=lambda row: row.in_features or 0)
    return (
        f"calibration: expected at least as many tokens as a layer has inputs, found {worst.tokens:,} for the "
        f"{worst.in_features:,} of {worst.path} ({len(short)} of {len(layers)} layers): their second moments are "
        "rank-deficient, and damping stands in for what the text doesn't show; calibrate on more text"
    )


def start_report(lora: LoraModel, adapter_name: str = "default") -> Report:
    """What the LoftQ start of ``lora``'s adapter did in memory.

    Raises:
        AdapterError: no such adapter, or it didn't start from LoftQ in this process.
    """
    layers = lora.adapter_layers().values()
    found = [layer.start_reports[adapter_name] for layer in layers if adapter_name in layer.start_reports]
    kept = {row.path: row.reason for row in found if isinstance(row, KeptDense)}
    rows = [row for row in found if not isinstance(row, KeptDense)]
    if not rows:
        raise AdapterError(
            f"adapter {adapter_name!r}: expected one that LoftQ started in this process, found none among "
            f"{sorted(lora.peft_config)}; a loaded adapter's report is beside the model that loftq init wrote"
        )
    config = lora.peft_config[adapter_name]
    options = {**config.to_dict(), "method": (config.loftq_config or LoftQConfig()).chosen_method}
    entries = lora.plan.entries if lora.plan is not None and adapter_name == list(lora.peft_config)[-1] else ()
    return Report(str(config.base_model_name_or_path), options, rows, kept=kept, lowered=lowered(entries))
