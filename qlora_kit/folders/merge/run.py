"""Merging from disk to disk: a model's folder and adapters in, a merged model's folder out, one tensor at a time.

Memory. A tensor is read, merged and written before the next but one is touched: the peak is a small multiple of the
largest tensor, whatever the model's size.

Bits. Each tensor goes through the functions of the merge in memory (``merging``), so the output's tensors are
those that ``merge`` and ``save_pretrained`` give.

Interruptions. Results are appended in a fixed order, and noted in a journal once they are on the disk. The same command
goes on from there and ends with the same bytes. The output is read back and compared with the sources before the index
and config.json appear, last: a folder that was cut off is no model to any reader.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...adapter_files.folder import WEIGHTS_NAME
from ...checkpoints.checksums import checksums_in
from ...checkpoints.files import write_text_atomically
from ...checkpoints.growing_model import GrowingModel, check_disk, check_placed, clear
from ...checkpoints.journal import Journal
from ...checkpoints.model_folder import identity, identity_of, locate, other_files, tokenizer_files
from ...checkpoints.pipeline import in_order
from ...checkpoints.records import read_record
from ...checkpoints.stored_model import StoredModel
from ...config.checks import check_device, check_int
from ...config.lora import CONFIG_NAME, LoraConfig
from ...config.merge_aware import MergeAware
from ...errors import MergeError, QLoRAKitError, StorageError
from ...merging.aware import departures, storage_for, trained_for, warning_of
from ...merging.fidelity import LayerFidelity, share_of
from ...merging.in_memory import LEAST_RETAINED
from ...merging.report import MergeReport
from ...merging.task import MergeTask
from ..stored_adapter import StoredAdapter, check_once, read_stored_adapter
from .base_check import check_stored_backbone
from .changes import changes_of, parts_of
from .parameter import MergedParameter, merged_parameter
from .plan import MergePlan, OutputParameter
from .trained_config import trained_config
from .verify import verify_output

WORK_FOLDER = ".qlora_kit_merge"
REPORT_NAME = "merge_report.json"
# Where transformers keeps chat templates beside the first.
_TEMPLATES = "additional_chat_templates"


@dataclass
class FolderMergeReport:
    """What a merge on disk did. ``str(report)`` is a table.

    Attributes:
        base, out: the folders. adapters: the weight of each, by folder.
        layers: of each merged weight, in the order of their names.
        replaced: tensors that an adapter had whole. untied: groups of parameters that were one and no longer are.
        trained: as in ``MergeReport``.
        verified: tensors that were made again and compared; 0 if an earlier run did.
        checksums: of every tensor of the output, CRC-32 in hexadecimal digits.
    """

    base: str
    out: str
    into: str
    adapters: dict[str, float]
    rounding: str = "nearest"
    layers: list[LayerFidelity] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    untied: list[list[str]] = field(default_factory=list)
    trained: bool = False
    verified: int = 0
    checksums: dict[str, str] = field(default_factory=dict)

    @property
    def retained(self) -> float:
        """The share of all deltas that is still there; see ``MergeReport.retained``."""
        return share_of(self.layers, "retained")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "retained": self.retained}

    def __str__(self) -> str:
        table = MergeReport(nn.Module(), self.into, list(self.adapters), self.layers, rounding=self.rounding)
        table.trained = self.trained
        lines = [str(table)]
        if self.replaced:
            lines.append(f"taken whole from the adapters: {', '.join(self.replaced)}")
        lines += [f"no longer tied: {' and '.join(group)}" for group in self.untied]
        if self.verified:
            lines.append(f"{self.verified} tensors read back and made again from the sources: equal")
        return "\n".join(lines)


@torch.no_grad()
def merge_folders(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    into: str | torch.dtype | None = None,
    rounding: str = "nearest",
    blocksize: int | str | None = None,
    double_quant: bool | None = None,
    shard_bytes: int = 5 * 10**9,
    check_backbone: bool = True,
    force: bool = False,
    least_retained: float = LEAST_RETAINED,
    device: str = "cpu",
    tokenizer: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    progressbar: bool = False,
) -> FolderMergeReport:
    """Merge stored adapters into a stored model and write the result into ``out``, from where an earlier run stopped.

    Args:
        base: folder, or name on the Hub, of a model in 16 or 32 bits, bitsandbytes' 4 or 8 bits, or packed.
        adapters: folders of stored adapters, or names on the Hub; their deltas are summed.
        out: new, empty, or of the same command begun earlier.
        weights: what each adapter's delta is multiplied by; 1 by default.
        into, rounding, blocksize, double_quant: as for ``qlora_kit.merge``; rounding is "nearest" or "scale-search".
        shard_bytes: a shard is closed once it holds this much.
        check_backbone: refuse a base other than the one that a LoftQ adapter was started on.
        force, least_retained: as for ``qlora_kit.merge``.
        device: where to compute.
        tokenizer: folder whose tokenizer and chat template the output gets; by default the base's, or, where an adapter
            has embeddings of more words, those that are stored with it.
        allow_pickle: see ``qlora_kit.adapter_files.folder.read_adapter``.

    Raises:
        MergeError: nothing to merge, an option that can't work, or a value that is NaN or infinite (in a factor, in a
            sum, or after the cast; the module is named).
        StorageError: a folder isn't what it should be, a tensor of an adapter has no place, the disk is too small,
            ``out`` holds something else, or what was written isn't what should be there.
        On any error ``out`` is no model, and empty unless what is done can be gone on with.
    """
    parts, out = parts_of(adapters, weights), Path(out)
    if rounding not in ("nearest", "scale-search"):
        raise MergeError(
            f"rounding={rounding!r}: expected 'nearest' or 'scale-search', since a merge on disk looks at no inputs; "
            "pass one of these, or merge in memory"
        )
    check_device("device", device)
    if tokenizer is not None and not (Path(tokenizer).is_dir() and tokenizer_files(Path(tokenizer))):
        raise StorageError(f"tokenizer={str(tokenizer)!r}: expected a folder with a tokenizer, found none; correct it")
    check_int("shard_bytes", shard_bytes, 1, "pass shard_bytes=5 * 10**9, say")
    source = locate(base, "base")
    stored = {name: read_stored_adapter(locate(name, "adapters"), allow_pickle=allow_pickle) for name in parts}
    check_once([one.folder for one in stored.values()])
    task = _task(parts, [one.config for one in stored.values()], into, rounding, blocksize, double_quant)
    if os.path.realpath(out) in {os.path.realpath(folder) for folder in (source, *(s.folder for s in stored.values()))}:
        raise StorageError(
            f"{out}: expected a folder of its own for the merged model, found a source's; choose another"
        )
    overrides = trained_config(source, stored)
    model = StoredModel(source, overrides)
    if check_backbone:
        for name, one in stored.items():
            check_stored_backbone(model, name, one)
    plan = MergePlan(model, changes_of(model, stored, parts), task)
    if task.trained and not plan.quantized:
        warnings.warn(
            warning_of(trained_for([s.config for s in stored.values()]), [f"{source} isn't quantized"]), stacklevel=2
        )
        plan.task = task = replace(task, trained=False)
    _check_rounding(plan)
    words = Path(tokenizer) if tokenizer is not None else _resized_by(overrides, stored)
    check_disk(out, plan.nbytes)
    with closing(Journal(out, _head(task, source, stored, shard_bytes, device, words), WORK_FOLDER)) as journal:
        finished = journal.finished(unit.name for unit in plan.units)
        if len(finished) == len(plan.units) and (out / "config.json").exists():
            check_placed(out, journal.done, fix=f"remove {out} and give the same command again")
            clear(out / WORK_FOLDER)
            return _report(plan, journal, source, out)
        names = [name for unit in plan.units for name in unit.names()]
        with closing(GrowingModel(out / WORK_FOLDER, names, shard_bytes, journal.done)) as output:
            with _withdrawn_on_error(out):
                _carry_out(plan, output, journal, finished, device, progressbar)
            report = _report(plan, journal, source, out)
            if not force and not task.trained:
                _check_retained(plan, report, least_retained)
            with _withdrawn_on_error(out):
                _finish(plan, output, journal, report, words, device)
            return report


def _task(
    parts: dict[str, float],
    configs: list[LoraConfig],
    into: Any,
    rounding: str,
    blocksize: int | str | None,
    double_quant: bool | None,
) -> MergeTask:
    into, blocksize, double_quant = storage_for(configs, into, blocksize, double_quant, otherwise="bfloat16")
    task = MergeTask(parts, into, rounding, blocksize=blocksize, double_quant=double_quant)
    trained = trained_for(configs)
    found = departures(task, trained)
    if set(trained) - {MergeAware(into, blocksize, double_quant)}:
        found.append(f"into={into!r}")
    if found:
        warnings.warn(warning_of(trained, found), stacklevel=3)
    return replace(task, trained=bool(trained) and not found)


def _carry_out(
    plan: MergePlan, output: GrowingModel, journal: Journal, finished: set[str], device: str, progressbar: bool
) -> None:
    def read(unit: OutputParameter) -> dict[str, Tensor]:
        return {part: plan.base.reader.tensor(name) for part, name in unit.reads.items()}

    def work(unit: OutputParameter, tensors: dict[str, Tensor]) -> MergedParameter:
        return merged_parameter(plan, unit, tensors, device)

    left = [unit for unit in plan.units if unit.name not in finished]
    done = sum(unit.nbytes for unit in plan.units) - sum(unit.nbytes for unit in left)
    bar = tqdm(total=plan.nbytes, initial=done, unit="B", unit_scale=True, desc="merging", disable=not progressbar)
    with bar, closing(in_order(left, read, work)) as results:
        for unit, made in results:
            placed = output.append(made.tensors)
            journal.add({"unit": unit.name, **placed, "row": None if made.row is None else asdict(made.row)})
            bar.update(unit.nbytes)


def _finish(
    plan: MergePlan,
    output: GrowingModel,
    journal: Journal,
    report: FolderMergeReport,
    words: Path | None,
    device: str,
) -> None:
    """Put everything in its place, config.json last; run again after a kill, it ends the same."""
    source, out = plan.base.folder, Path(report.out)
    config = json.dumps(plan.settings, indent=2) + "\n"
    write_text_atomically(out / WORK_FOLDER / "config.json", config)
    output.place(out)
    report.verified = verify_output(plan, out, out / WORK_FOLDER, journal.done, device)
    copied = {file.name: file for file in other_files(source) if file.name != REPORT_NAME}
    if words is not None:
        copied = {name: file for name, file in copied.items() if file not in tokenizer_files(source)}
        copied |= {file.name: file for file in tokenizer_files(words)}
    for name, file in copied.items():
        shutil.copyfile(file, out / name)
    templates = (words or source) / _TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, out / _TEMPLATES, dirs_exist_ok=True)
    write_text_atomically(out / REPORT_NAME, json.dumps(report.to_dict(), indent=1) + "\n")
    output.write_index(out)
    write_text_atomically(out / "config.json", config)
    clear(out / WORK_FOLDER)


def _report(plan: MergePlan, journal: Journal, source: Path, out: Path) -> FolderMergeReport:
    lines = sorted(journal.done, key=lambda line: line["unit"])
    rows = [read_record(LayerFidelity, line["row"], journal.path) for line in lines if line["row"]]
    replaced = [unit.name for unit in plan.units if unit.change.value is not None]
    task = plan.task
    report = FolderMergeReport(
        str(source), str(out), task.into, dict(task.parts), task.rounding, rows, replaced, plan.untied
    )
    report.trained = task.trained
    report.checksums = checksums_in({name: entry for line in lines for name, entry in line["base"].items()})
    return report


def _check_rounding(plan: MergePlan) -> None:
    if plan.task.rounding != "nearest" and not plan.quantized:
        raise MergeError(
            f"rounding={plan.task.rounding!r}: expected modules of few bits, found none; leave it out, or merge into a "
            "k-bit type such as 'nf4'"
        )


def _check_retained(plan: MergePlan, report: FolderMergeReport, least: float) -> None:
    """Refuse what rounding to few bits has lost most of; the work stays, for the same command with ``force``."""
    rounded = [layer for layer in report.layers if layer.path in plan.quantized]
    if rounded and (kept := share_of(rounded)) < least:
        raise MergeError(
            f"into={plan.task.into!r}: expected rounding to keep at least {least:.0%} of the adapters' delta, found "
            f"{kept:.1%}; merge into 'bfloat16', try rounding='scale-search', or ask for the same again with "
            "force=True"
        )


def _head(
    task: MergeTask, source: Path, stored: dict[str, StoredAdapter], shard_bytes: int, device: str, words: Path | None
) -> dict[str, dict[str, Any]]:
    """What the output's bytes depend on."""
    options = {
        "into": task.into,
        "rounding": task.rounding,
        "blocksize": task.blocksize,
        "double_quant": task.double_quant,
        "shard_bytes": shard_bytes,
        "device": device.partition(":")[0],
    }
    head: dict[str, dict[str, Any]] = {"options": options, "base": identity(source)}
    for number, (name, one) in enumerate(stored.items()):
        files = [file for file in (one.folder / CONFIG_NAME, one.folder / WEIGHTS_NAME) if file.exists()]
        head[f"adapter {number + 1}"] = {"weight": task.parts[name], **identity_of(files)}
    if words is not None:
        head["tokenizer"] = identity_of(tokenizer_files(words))
    return head


def _resized_by(overrides: dict[str, Any], stored: dict[str, StoredAdapter]) -> Path | None:
    """The adapter's folder that has a tokenizer for its own number of words."""
    with_words = [one.folder for one in stored.values() if one.rest and tokenizer_files(one.folder)]
    return with_words[0] if "vocab_size" in overrides and with_words else None


@contextmanager
def _withdrawn_on_error(out: Path) -> Iterator[None]:
    """Take away all that was written on an error that giving the same command again would meet again."""
    try:
        yield
    except QLoRAKitError:
        shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
        for shard in out.glob("model*.safetensors"):
            shard.unlink()
        if not any(out.iterdir()):
            out.rmdir()
        raise
