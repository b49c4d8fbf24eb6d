"""Does a quantized model and an adapter in one folder belong together, and is what the report says true?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.adapter_files.backbone import METADATA_KEY, codes_digest, combine
from qlora_kit.adapter_files.folder import PREFIX, WEIGHTS_NAME, read_metadata
from qlora_kit.checkpoints.model_folder import locate, skeleton
from qlora_kit.checkpoints.quantized_tensors import read_weight
from qlora_kit.checkpoints.shards import ShardReader
from qlora_kit.checkpoints.stored_names import StoredNames
from qlora_kit.config.lora import CONFIG_NAME, LoftQConfig, LoraConfig
from qlora_kit.errors import StorageError
from qlora_kit.lowrank import norm

from ..starts.report import LayerReport, Report
from .checkpoint import Checkpoint
from .checks import ADAPTER_FOLDER, check_loads, check_written

# The report's errors were measured before saving; on another machine sums are added in another order.
_SLACK = 1e-4


@torch.no_grad()
def verify(
    out: Path, against: str | os.PathLike[str] | None = None, *, layers: int = 8, load: bool = True
) -> Iterator[str]:
    """Lines on what was found to hold.

    Args:
        out: what ``loftq init`` wrote.
        against: the 16-bit model; then the errors of ``layers`` layers, evenly chosen, are measured again.
        load: load model and adapter with transformers too, and run a few tokens through them.

    Raises:
        StorageError: something doesn't hold; says what.
    """
    report = Report.load(out)
    base, folder = ShardReader(out), out / ADAPTER_FOLDER
    adapter = ShardReader(folder)
    known = (field.name for field in fields(LoftQConfig) if field.name in report.options)  # an older one has fewer
    loftq = LoftQConfig(**{name: report.options[name] for name in known})
    config = replace(LoraConfig.from_pretrained(folder), init_lora_weights="loftq", loftq_config=loftq)
    built = skeleton(out, quantized=True)
    names = StoredNames(built, base, quantized=True)
    stems = {row.path: _stem(names, out, row.path) for row in report.layers}
    kept = {path: _stem(names, out, path) for path in report.kept}
    digests = {path: codes_digest(base.tensor(f"{stem}weight")) for path, stem in (stems | kept).items()}
    found, expected = combine(digests), read_metadata(folder).get(METADATA_KEY)
    if found != expected:
        raise StorageError(
            f"{folder / WEIGHTS_NAME}: expected the adapter of the quantized model beside it (fingerprint "
            f"{found[:12]}), found that of another ({(expected or 'none')[:12]}); a file was exchanged or changed: "
            "run loftq init again"
        )
    yield f"{len(stems)} layers: backbone and adapter belong together (fingerprint {found[:12]})"
    for row in report.layers:
        A, B = _factors(adapter, row)
        if not (A.isfinite().all() and B.isfinite().all()) or A.shape[0] != row.rank:
            raise StorageError(f"{folder}: {row.path}: expected finite factors of rank {row.rank}, found others")
    yield f"{2 * len(stems)} adapter tensors: present, finite, of the ranks reported ({folder / CONFIG_NAME})"
    count = check_written(out, report)
    yield f"{count} tensors and their configurations: as they were written" if count else f"{out}: no checksums noted"
    if load:
        yield check_loads(out)
    if against is None:
        return
    checkpoint = Checkpoint(locate(against, "against"), config)
    units = {unit.entry.path: unit for unit in checkpoint.units if unit.entry is not None}
    for row in report.layers[:: max(1, len(report.layers) // layers)][:layers]:
        if row.path not in units:
            raise StorageError(
                f"{against}: expected the model that {out} was made from ({report.source}), found none of {row.path}"
            )
        unit = units[row.path]
        assert unit.entry is not None
        module, codec = checkpoint.filled_module(unit.entry, checkpoint.reader.tensor(unit.name))
        stored, shape = codec.shape(built.get_submodule(row.path)), codec.shape(module)
        if shape != stored:
            raise StorageError(
                f"{against}: {row.path}: expected a weight of {stored} (out, in), as in the model that {out} was made "
                f"from ({report.source}), found one of {shape}; pass that model"
            )
        full = codec.read(module)
        A, B = _factors(adapter, row)
        scaling = config.scaling_of(unit.entry.rank, unit.entry.alpha)
        left = full - read_weight(out, base, stems[row.path], codec.shape(module), row.quant_type, report.options)
        size = norm(full) or 1.0
        measured = norm(left) / size, norm(left.addmm_(B, A, alpha=-scaling)) / size
        reported = row.quantization_error, row.error
        if any(abs(a - b) > _SLACK * max(b, 1e-3) for a, b in zip(measured, reported, strict=True)):
            raise StorageError(
                f"{out}: {row.path}: expected the reported errors {row.quantization_error:.6f} (W - Q) and "
                f"{row.error:.6f} (W - Q - sBA), found {measured[0]:.6f} and {measured[1]:.6f}; this isn't the model "
                "that it was made from, or the files were changed"
            )
        yield f"{row.path}: W - Q {measured[0]:.4f}, W - Q - sBA {measured[1]:.4f}, as reported"


def _stem(names: StoredNames, out: Path, path: str) -> str:
    """What the names of a module's tensors begin with in the shards."""
    weight = names.weight_of(path)
    if weight is None:
        raise StorageError(f"{out}: expected a weight of {path}, found none; the shards aren't those of the report")
    return weight.removesuffix("weight")


def _factors(adapter: ShardReader, row: LayerReport) -> tuple[Tensor, Tensor]:
    kind = "lora_embedding_{}" if f"{PREFIX}{row.path}.lora_embedding_A" in adapter else "lora_{}.weight"
    A, B = (adapter.tensor(f"{PREFIX}{row.path}.{kind.format(side)}") for side in "AB")
    return A, B
