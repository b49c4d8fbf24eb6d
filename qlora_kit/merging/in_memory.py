"""Dequantize -> merge -> requantize, with an account of what was lost (``fidelity``).

One path for every storage: the codec reads a float32 weight, the deltas of all adapters are added to it at once, and
one write puts the result where it goes, be it back into the same storage, into a dense module or into another k-bit
one (``layer``). Beside the model that is one layer's float32 weight: what a layer was goes to a temporary file
on the disk, from where an error brings every layer back bit for bit (``spill``). A merge happens as a whole or not
at all.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checkpoints.spill import Spill
from ..errors import MergeError
from ..injection.adapted import Adapted, adapted_of
from ..injection.engine import Injection
from ..injection.read_past import ReadPast
from ..injection.uncollected import uncollected
from ..layers import AdapterLayer, ModulesToSave
from ..layers.rescaled import at_full_size_
from ..naming import unwrapped
from ..training.preparation.float32 import release_from_float32_
from ..training.preparation.trainers import leave_training_
from .advice import refusal
from .agreement import record
from .aware import departures_in, storage_for, trained_for, warning_of
from .base_choice import base_losses, quantized_modules
from .fidelity import share_of
from .in_place import switch_on_
from .layer import Merger
from .parts import folded_parts
from .report import MergeReport
from .requantize import batches_of, moments_of
from .residual import attach_residual_
from .rest_of_model import (
    cast_rest_,
    declare_storage_,
    forget_loading_,
    keep_state_,
    narrow_held_,
    put_trained_copies_,
)
from .task import MergeTask, check_consumed, check_layers, chosen_parts, original_folder
from .ties import check_can_be_parted, declare_untied_, tie_again_, tied_by_adapters

# Below this share of the delta, by norm along its own direction, requantizing is refused: half of what was learned.
LEAST_RETAINED = 0.5

logger = logging.getLogger(__name__)


def merge(
    model: Any,
    *,
    adapters: str | Sequence[str] | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    into: str | torch.dtype | None = None,
    base: str = "dequantized",
    original: str | os.PathLike[str] | None = None,
    rounding: str = "nearest",
    residual_rank: int = 0,
    residual_dtype: torch.dtype | None = None,
    statistics: Any = None,
    force: bool = False,
    text: Any = None,
    blocksize: int | str | None = None,
    double_quant: bool | None = None,
    least_retained: float = LEAST_RETAINED,
    scratch: str | os.PathLike[str] | None = None,
    progressbar: bool = False,
    account: bool = True,
) -> MergeReport:
    """Merge adapters into the base weights of ``model``, in place, and take its adapter layers out.

    What the adapters trained beside their factors (``modules_to_save``, biases) becomes the merged model's; an adapter
    that was switched off is merged like any other.

    Args:
        model: a ``LoraModel``.
        adapters: names to merge, summed; by default the active ones and those that ``merge_adapter`` merged.
        weights: what each adapter's delta is multiplied by, in their order or by name; 1 by default.
        into: None is the merge that the adapters are trained for (``LoraConfig.merge_aware``), "same" if they are for
            none; another is warned of. "same" keeps each module's storage (a 4-bit layer is requantized); "float32",
            "bfloat16" and "float16" give a dense model, every k-bit module of it dequantized, adapted or not; "nf4",
            "fp4", "int8", "nf3", "nf2" and the other types of ``codecs.codebooks`` store adapted linear layers, and
            those of few bits already, in that type.
        base: what the deltas are added to: the "dequantized" weights that the adapter was trained on, the "original"
            16-bit ones, or "auto": those with the lower next-token loss on ``text``, as the report says.
        original: the folder of the 16-bit safetensors; by default the one that the model was loaded from.
        rounding: of k-bit layers: to the "nearest" codes, "scale-search", or "error-feedback", see
            ``qlora_kit.merging.requantize``. All but "nearest" need a few float32 copies of one layer's weight.
        residual_rank: of an adapter "residual" that is fitted to what rounding lost and stays on the merged weights;
            ``report.model`` is then a ``LoraModel``. 0 is none. Where the delta alone, cut to that rank, is closer than
            what rounding anew leaves, the weight stays as it is stored.
        residual_dtype: of that adapter's factors; None is as for other adapters.
        statistics: second moments of the layers' inputs by path, for "error-feedback" (needed there) and the others;
            or a text to collect them on, as ``text``. None: "error-feedback" takes the built-in text.
        force: requantize even if less than ``least_retained`` of the delta is kept, or into the original base though
            the adapter makes up for the errors of another.
        text: measure how far the merged model's output is from the adapted one's on it: "builtin", a text file, token
            ids (rows, tokens), or batches. None measures nothing; for ``base="auto"`` it is the built-in text.
        blocksize, double_quant: of a k-bit ``into``; None is as the module has it if it is of that type, else 64 and no
            double quantization. "row" is one scale a row.
        least_retained: the threshold of ``force``, as a share of the delta.
        scratch: folder for the temporary file of the way back; None is the system's.
        account: measure each layer. Without it the report has the layers alone that are rounded to few bits, whose
            numbers decide whether the merge is refused, and a dense model is merged in a third of the time.

    Returns:
        The report; ``report.model`` is the merged base model.

    Raises:
        MergeError: nothing to merge, an option that can't work, a value that is NaN or infinite (in a factor, in a sum,
            or after the cast to the storage's dtype; the module is named), or requantizing would lose the delta.
            On any error the model is as it was.
        StorageError: the original weights or a text can't be read, or the disk is full.
    """
    adapted = adapted_of(model)
    at_full_size_(adapted.root)
    with folded_parts(adapted):
        with uncollected(), adapted.mapped():
            parts = chosen_parts(adapted, adapters, weights)
            configs = [adapted.configs[name] for name in parts]
            storage, blocksize, double_quant = storage_for(configs, into, blocksize, double_quant, otherwise="same")
            task = MergeTask(
                parts,
                storage,
                rounding,
                residual_rank,
                base,
                original_folder(adapted.root, base, original),
                blocksize,
                double_quant,
                least_retained,
                not force,
                residual_dtype or adapted.adapter_dtype,
                account,
            )
            check_layers(adapted, task, force)
            check_can_be_parted(adapted, parts)
            if trained := trained_for(configs):
                others = departures_in(adapted, task)
                task = replace(task, trained=not others, refuses=task.refuses and bool(others))
                if others:
                    warnings.warn(warning_of(trained, others), stacklevel=2)
        with uncollected(), Spill(scratch) as spill:
            undo = Injection()
            try:
                report, kept, moments = _carried_out(model, adapted, task, statistics, text, spill, undo, progressbar)
                if kept >= task.least_retained or not task.refuses:
                    if kept < task.least_retained and not task.trained:
                        logger.warning("merge: %.1f %% of the delta survived rounding", 100 * kept)
                    return report
                undo.undo()
            except BaseException:
                undo.undo()
                raise
        raise MergeError(refusal(adapted, task, report, kept, moments))


def _carried_out(
    face: nn.Module,
    adapted: Adapted,
    task: MergeTask,
    statistics: Any,
    text: Any,
    spill: Spill,
    undo: Injection,
    progressbar: bool,
) -> tuple[MergeReport, float, Mapping[str, Tensor]]:
    """The report; the share of the deltas that is left where weights were rounded, the model being still to be undone
    if that is too little; and the moments of the inputs that were looked at, by path."""
    root = adapted.root
    keep_state_(face, adapted, undo)
    _show_buffers_(adapted, task.parts, undo)
    with adapted.mapped() as tree:
        layers, saved = adapted.layers(), adapted.saved_modules()
        if adapted.disabled:
            for path in adapted.set_aside:
                undo.on_undo(layers[path].way_back())
            switch_on_(adapted)
            adapted.buffers.show_(root, list(task.parts))
        check_consumed(adapted, task.parts, layers, saved)
        tied, paths, changed = tied_by_adapters(adapted, task.parts), tree.paths, bool(saved)
    for layer in layers.values():
        _set_aside_(layer, spill, undo)
    _leave_biases_(adapted, task)
    with _as_merged([*layers.values()], [*saved.values()], task.parts):
        kbit = quantized_modules(tree)
        dense = set(ReadPast(root).dense()) if task.quantizes else set()
        wanted = [path for path, layer in layers.items() if task.rounds(layer, stays_dense=path in dense)]
        if not wanted and (task.rounding != "nearest" or task.residual_rank):
            raise MergeError(
                f"rounding={task.rounding!r}, residual_rank={task.residual_rank}: expected adapted modules of few "
                "bits, found none; leave the two out, or merge into a k-bit type such as 'nf4'"
            )
        moments = moments_of(statistics, root, wanted, task.rounding) if wanted else {}
        losses: dict[str, float] = {}
        if task.original is not None and not kbit:
            raise MergeError(f"base={task.base!r}: expected a quantized base, found none; leave base out")
        auto = task.base == "auto"
        batches = batches_of(text, root) if auto or text is not None else ()
        if auto:
            assert task.original is not None
            losses = base_losses(root, task.original, batches)
        compare = None if text is None else record(root, batches, spill)
    chosen = min(losses, key=losses.__getitem__) if losses else task.base
    report = MergeReport(
        root,
        task.into,
        list(task.parts),
        weights=dict(task.parts),
        base=chosen,
        base_losses=losses,
        rounding=task.rounding,
        residual_rank=task.residual_rank,
        trained=task.trained,
    )
    del saved, tree
    merger = Merger(root, paths, task, task.original if chosen == "original" else None, moments, spill, undo, dense)
    for path in tqdm(list(layers), desc="merging", disable=not progressbar):
        report.layers += merger.adapted(path, layers.pop(path))
    if changed:
        put_trained_copies_(adapted, task, undo)
    merger.others()
    if task.dtype is not None:
        cast_rest_(root, task.dtype, spill, undo)
    rounded = [layer for layer in report.layers if layer.path in merger.rounded]
    kept = share_of(rounded)
    if kept < task.least_retained and task.refuses:
        return report, kept, moments
    forget_loading_(unwrapped(root), undo)
    if task.into != "same":
        declare_storage_(unwrapped(root), task, undo)
    tie_again_(root, tied, undo)
    declare_untied_(unwrapped(root), undo)
    residual = attach_residual_(adapted, merger.residuals, task.residual_dtype, undo)
    if task.dtype is None:
        narrow_held_(root, spill, undo)
    release_from_float32_(root)
    if compare is not None:
        report.agreement = compare(root)
    adapted.trained_before |= leave_training_(adapted)
    adapted.forget_()
    if residual is not None:
        residual.adopt_(adapted)
        report.model = face
    return report, kept, moments


def _show_buffers_(adapted: Adapted, parts: Mapping[str, float], undo: Injection) -> None:
    """Put the buffers that the merged adapters moved (running statistics, say) into the model.

    Raises:
        MergeError: two of them moved the same one, each its own way.
    """
    root, buffers, shown = adapted.root, adapted.buffers, list(adapted.buffers.shown)

    def back() -> None:
        adapted.buffers = buffers
        buffers.show_(root, shown)

    undo.on_undo(back)
    buffers.show_(root, [])
    holders: dict[str, str] = {}
    for name in parts if len(parts) > 1 else ():
        for key, tensor in buffers.of(root, name).items():
            other = holders.setdefault(key, name)
            if other != name and not torch.equal(tensor, buffers.of(root, other)[key]):
                raise MergeError(
                    f"{key}: expected at most one of the adapters to have moved this buffer in training, found "
                    f"{other!r} and {name!r}; merge one of them, or train both from the same statistics in eval mode"
                )
    buffers.show_(root, list(parts))


def _set_aside_(layer: AdapterLayer, spill: Spill, undo: Injection) -> None:
    """Take an earlier ``merge_adapter`` out of ``layer``'s weight."""
    if not layer.merged_adapters:
        return
    merged, before, names = spill.keep(layer.codec.contents(layer.base_layer)), layer._unmerged, layer.merged_adapters

    def restore() -> None:
        layer.codec.restore_(layer.base_layer, merged())
        layer._unmerged, layer.merged_adapters = before, names

    undo.on_undo(restore)
    layer.unmerge_()


def _leave_biases_(adapted: Adapted, task: MergeTask) -> None:
    """Put the base's biases back if the adapter that trained them isn't merged."""
    trained = [name for name, config in adapted.configs.items() if config.bias != "none"]
    if trained and not set(trained) & set(task.parts):
        adapted.kept_biases.swap_(adapted.root)


@contextmanager
def _as_merged(
    layers: Sequence[AdapterLayer], saved: Sequence[ModulesToSave], parts: Mapping[str, float]
) -> Iterator[None]:
    """In the block the model computes what the merge is to give, by its branches."""
    modules: list[Any] = [*layers, *saved]
    before = [(module, module.active_adapters) for module in modules]
    scalings = [(layer, dict(layer.scaling)) for layer in layers]
    try:
        for module, _ in before:
            module.active_adapters = list(parts)
        for layer in layers:
            layer.scaling.update(
                {name: layer.scaling[name] * weight for name, weight in parts.items() if name in layer.r}
            )
        yield
    finally:
        for module, active in before:
            module.active_adapters = active
        for layer, scaling in scalings:
            layer.scaling.update(scaling)
