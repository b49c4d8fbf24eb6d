"""Dequantize -> merge -> requantize, with an account of what was lost.

One path for every storage: the codec reads a float32 weight, the deltas of all adapters are summed onto it,
and one write puts the result where it goes, be it back into the same storage or into a dense module. Rounding
to few bits can swallow a small delta whole; the report says how much of each one survived.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .codecs import Codec, codec_for, find_codec
from .errors import MergeError
from .inject import Injection, swap_
from .layers import AdapterLayer

if TYPE_CHECKING:
    from .model import LoraModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LayerFidelity:
    """One layer's merge, all norms Frobenius; ideal = base + delta in float32, stored = what was written.

    Attributes:
        delta_ratio: ||delta|| / ||base||.
        retained: <stored - base, delta> / ||delta||^2, the share of the delta that is still there; 1 is all.
        error: ||stored - ideal|| / ||ideal||.
    """

    path: str
    codec: str
    delta_ratio: float
    retained: float
    error: float


@dataclass
class MergeReport:
    """The merged model and, layer by layer, what the merge kept. ``str(report)`` is a table."""

    model: nn.Module
    into: str
    adapters: list[str]
    layers: list[LayerFidelity] = field(default_factory=list)

    def mean(self, attribute: str) -> float:
        """The mean of a ``LayerFidelity`` attribute over the layers."""
        return sum(getattr(layer, attribute) for layer in self.layers) / max(len(self.layers), 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "into": self.into,
            "adapters": self.adapters,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        width = max([len(layer.path) for layer in self.layers] + [6])
        lines = [f"{'layer':{width}}  {'stored as':9} {'|delta|/|W|':>11} {'retained':>9} {'error':>9}"]
        for layer in self.layers:
            lines.append(
                f"{layer.path:{width}}  {layer.codec:9} {layer.delta_ratio:11.4f} {layer.retained:9.1%} "
                f"{layer.error:9.2e}"
            )
        lines.append(
            f"{len(self.layers)} layers merged into {self.into}: {self.mean('retained'):.1%} of the delta retained, "
            f"mean error {self.mean('error'):.2e}"
        )
        return "\n".join(lines)


def fidelity(path: str, codec: str, base: Tensor, ideal: Tensor, stored: Tensor) -> LayerFidelity:
    """Compare float32 (out, in) weights before the merge, as they should be after it, and as stored."""
    delta = ideal - base
    energy = delta.square().sum()
    retained = ((stored - base) * delta).sum() / energy if energy > 0 else torch.ones(())
    return LayerFidelity(
        path=path,
        codec=codec,
        delta_ratio=_ratio(delta, base),
        retained=retained.item(),
        error=_ratio(stored - ideal, ideal),
    )


def merge(
    model: LoraModel,
    *,
    adapters: Sequence[str] | None = None,
    into: str = "same",
    safe: bool = False,
    progressbar: bool = False,
) -> MergeReport:
    """Merge adapters into the base weights of ``model`` and take its adapter layers out.

    Args:
        adapters: names to merge, summed; the active ones by default.
        into: "same" keeps each module's storage (a 4-bit layer is requantized); "float32", "bfloat16" and
            "float16" give a dense model, every k-bit module of it dequantized.
        safe: refuse a merged weight with NaN or infinite values.

    Returns:
        The report; ``report.model`` is the merged base model.

    Raises:
        MergeError: nothing to merge, an unknown name, ``into`` not known, factors that aren't finite.
            On any error the model is as it was.
    """
    if into != "same" and into not in DTYPES:
        raise MergeError(f"into={into!r}: expected 'same' or one of {sorted(DTYPES)}")
    names = _checked_names(model, adapters)
    dtype = DTYPES.get(into)
    layers = model.adapter_layers()
    _check_finite(layers, names)
    report = MergeReport(model.model, into, names)
    merged_before = {path: list(layer.merged_adapters) for path, layer in layers.items()}
    injection = Injection()
    replaced: list[tuple[str, nn.Module]] = []
    try:
        for path, layer in tqdm(layers.items(), desc="merging", disable=not progressbar):
            ours = [name for name in names if name in layer.r]
            if ours:
                report.layers.append(_merge_layer(path, layer, ours, dtype, safe, replaced))
            else:
                layer.unmerge_()
                replaced.append((path, _destination(layer.codec, layer.base_layer, dtype)))
        if dtype is not None:
            replaced += _unadapted(model.model, set(layers), dtype)
        for path, module in replaced:
            for alias in model.paths_of(path):
                swap_(model.model, alias, module, injection)
        model.release_(keep=names)
    except BaseException:
        injection.undo()
        for path, layer in layers.items():
            layer.unmerge_()
            layer.merge_(merged_before[path])
        raise
    if dtype is not None:
        _declare_dense_(model.model, dtype)
    return report


def _merge_layer(
    path: str,
    layer: AdapterLayer,
    names: list[str],
    dtype: torch.dtype | None,
    safe: bool,
    replaced: list[tuple[str, nn.Module]],
) -> LayerFidelity:
    base, ideal = layer.merged_weight([]), layer.merged_weight(names)
    if safe and not torch.isfinite(ideal).all():
        raise MergeError(f"{path}: the merged weight has NaN or infinite values; no layer was changed")
    destination = _destination(layer.codec, layer.base_layer, dtype)
    if destination is layer.base_layer:
        layer.unmerge_()
        layer.merge_(names)
    else:
        codec_for(destination, path).write_(destination, ideal)
    replaced.append((path, destination))
    codec = codec_for(destination, path)
    return fidelity(path, codec.name, base, ideal, codec.read(destination))


def _destination(codec: Codec, base: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The module to write to: ``base`` itself, or a dense one in ``dtype`` where that differs."""
    if dtype is None:
        return base
    dense = codec.dense_like(base, dtype)
    return copy.deepcopy(base).to(dtype) if dense is base and codec.compute_dtype(base) != dtype else dense


def _unadapted(model: nn.Module, adapted: set[str], dtype: torch.dtype) -> list[tuple[str, nn.Module]]:
    """Dense replacements of the k-bit modules that no adapter touches."""
    inside = tuple(f"{path}." for path in adapted) or ("\0",)
    replaced = []
    for path, module in model.named_modules():
        codec = find_codec(module)
        if codec is None or path in adapted or path.startswith(inside):
            continue
        dense = codec.dense_like(module, dtype)
        if dense is not module:
            replaced.append((path, dense))
    return replaced


def _declare_dense_(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is still in another float type, and take the marks of a quantized model off."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    config = getattr(model, "config", None)
    if config is not None:
        config.dtype = dtype
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for mark, value in {
        "is_quantized": False,
        "is_loaded_in_4bit": False,
        "is_loaded_in_8bit": False,
    }.items():
        if getattr(model, mark, value) != value:
            setattr(model, mark, value)
    for attribute in ("hf_quantizer", "quantization_method"):
        if attribute in vars(model):
            delattr(model, attribute)


def _checked_names(model: LoraModel, adapters: Sequence[str] | None) -> list[str]:
    names = list(model.active_adapters if adapters is None else adapters)
    unknown = [name for name in names if name not in model.peft_config]
    if unknown:
        raise MergeError(f"unknown adapter(s) {unknown}; the model has {sorted(model.peft_config)}")
    if not names:
        raise MergeError("nothing to merge: no adapter is active; name some, or set_adapter() first")
    if len(set(names)) != len(names):
        raise MergeError(f"adapters={names}: a name stands twice, so its delta would be added twice")
    return names


def _check_finite(layers: dict[str, AdapterLayer], names: list[str]) -> None:
    for path, layer in layers.items():
        for name in names:
            if name in layer.r and not all(torch.isfinite(factor).all() for factor in layer.factors(name)):
                raise MergeError(
                    f"{path}: adapter {name!r} holds NaN or infinite values; reload it or train it again "
                    "(no layer was changed)"
                )


def _ratio(part: Tensor, whole: Tensor) -> float:
    norm = torch.linalg.vector_norm(whole)
    return (torch.linalg.vector_norm(part) / norm).item() if norm > 0 else 0.0
