"""The shared engine: plan -> swap -> report.

``make_plan`` looks and changes nothing: its result can be printed. ``inject_`` builds every adapter layer off
the tree first, starts included, and only then swaps them in; whatever fails on the way leaves the model as it
was. ``Injection.undo`` puts the original module objects back, with all that hangs on them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..codecs import Codec, codec_for
from ..config.lora import LoraConfig
from ..errors import AdapterError, CodecError
from ..layers import AdapterLayer, ModulesToSave, layer_family_for, saved_module
from ..layers.fused.blocks import refit_
from ..layers.sharded.megatron.parts import FusedLinear
from ..layers.sharded.moving import moving_as_
from ..layers.sharded.sharding import Sharding, sharding_of, whole_shape
from ..layers.sharded.whole import part_of_module, whole_module
from ..naming import Tree, base_of, module_at, slot
from .free import check_free
from .heads import saved_names
from .left_out import LeftOut, find_left_out
from .megatron.opening import opened_parts
from .plan import Plan, PlanEntry
from .targets import named, resolve, resolve_saved
from .ties import refuse_tied, sharing, ties_among
from .uncollected import uncollected

#: Values of ``init_lora_weights`` that only draw random numbers.
QUICK_STARTS = (True, False, "gaussian")


@dataclass(frozen=True)
class Request:
    """All that a start may look at: one base module and the adapter that goes on it.

    Attributes:
        path: the module's path in the model, for messages and for finding its weight in files.
        base: the module to adapt; not to be changed, a start that needs another returns one.
        codec: reads ``base``'s weight as float32 (out, in).
        rank, scaling: of the adapter; scaling is alpha / rank, or alpha / sqrt(rank) with rslora.
        config: the whole configuration; ``config.loftq_config`` is where "loftq" looks.
        dtype, device: of the adapter's parameters.
        family: "linear", "embedding" or "conv": how the branch is applied.
        sharding: how the module is shared out to several processes; ``base`` is then what all of them hold together,
            or for starts that draw random numbers a module of that shape on the meta device.
    """

    path: str
    base: nn.Module
    codec: Codec
    rank: int
    scaling: float
    config: LoraConfig
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    family: str = "linear"
    sharding: Sharding | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The base weight's logical (out, in)."""
        return self.codec.shape(self.base)


@dataclass
class Start:
    """A (rank, in), B (out, rank), the module that replaces the base, if the start made one, and what it measured."""

    A: Tensor
    B: Tensor
    base: nn.Module | None = None
    report: Any = None


class Injection:
    """What ``inject_`` did, and the way back."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def on_undo(self, step: Callable[[], object]) -> None:
        """Have ``undo`` call ``step``, before the steps noted earlier."""
        self._steps.append(step)

    def undo(self) -> None:
        """Put the model back as it was, the original module objects included."""
        while self._steps:
            self._steps.pop()()


def make_plan(model: nn.Module | Tree, config: LoraConfig) -> Plan:
    """What ``config`` would do to ``model``; changes nothing. Works on the meta device.

    Raises:
        TargetError: see ``qlora_kit.injection.targets``; or a tied weight would be quantized.
        UnsupportedModuleError: see ``qlora_kit.injection.targets``.
    """
    if isinstance(model, nn.Module):
        with opened_parts(model, config, keep=False):
            return make_plan(Tree(model), config)
    entries, tree = [], model
    targets = resolve(tree, config)
    paths = [target.path for target in targets]
    shared = sharing(tree, paths)
    saved = resolve_saved(tree, saved_names(tree, config), tied=config.ensure_weight_tying)
    refuse_tied(tree, saved, but_tables=True)
    refuse_tied(tree, paths, but_tables=not config.loftq_config)
    for target in targets:
        module = base_of(tree.modules[target.path])
        codec, family = codec_for(module, target.path), layer_family_for(module, target.path)
        if target.path in shared and codec.quantizer(module) is not None:
            refuse_tied(tree, [target.path])
        trainable = 0 if target.tied_to else target.rank * sum(whole_shape(module, codec.shape(module)))
        entries.append(
            PlanEntry(
                path=target.path,
                aliases=target.aliases,
                module_type=type(module).__name__,
                codec=codec.name,
                family=family.family,
                rank=target.rank,
                alpha=target.alpha,
                trainable_parameters=trainable,
                adapter_bytes=trainable * adapter_dtype(codec.compute_dtype(module)).itemsize,
                base_bytes=codec.nbytes(module),
                tied_to=target.tied_to,
                shared=target.path in shared,
            )
        )
    left_out: tuple[LeftOut, ...] = ()
    if config.target_modules is None or config.target_modules == "all-linear":
        excluded = named(tree, config.exclude_modules)
        left_out = find_left_out(tree, [entry.path for entry in entries], [*saved, *excluded])
    ties = ties_among(tree, saved) if config.ensure_weight_tying else {}
    return Plan(tuple(entries), tuple(saved), left_out, tuple(ties.items()))


def adapter_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Adapters of half-precision and k-bit bases train in float32; others in the base's own dtype."""
    return torch.float32 if compute_dtype in (torch.float16, torch.bfloat16) else compute_dtype


def inject_(
    model: nn.Module,
    plan: Plan,
    config: LoraConfig,
    adapter_name: str,
    start: Callable[[Request], Start],
    *,
    dtype: torch.dtype | None = None,
) -> Injection:
    """Carry out ``plan`` for adapter ``adapter_name``; all of it, or on any error nothing.

    ``start`` gives each adapter its first factors (``qlora_kit.initializers.start_for`` for those that
    ``config`` names). ``dtype`` is the dtype of the factors and saved copies (default: see ``adapter_dtype``).
    """
    check_free(model, [entry.path for entry in plan.entries], plan.modules_to_save, adapter_name)
    injection = Injection()
    try:
        built: list[tuple[PlanEntry, AdapterLayer]] = []
        made: dict[str, AdapterLayer] = {}
        slow = config.init_lora_weights not in QUICK_STARTS
        with nullcontext() if slow else uncollected():
            in_order = sorted(plan.entries, key=lambda entry: bool(entry.tied_to))  # what others share comes first
            for entry in tqdm(in_order, desc=f"{config.init_lora_weights} start", disable=not slow, leave=False):
                source = made.get(entry.tied_to)
                layer = _build(model, entry, config, adapter_name, start, dtype, injection, source)
                built.append((entry, layer))
                made[entry.path] = layer
        for entry, layer in built:
            for path in (entry.path, *entry.aliases):
                swap_(model, path, layer, injection)
        ties = dict(plan.ties)
        for path in plan.modules_to_save:
            module = module_at(model, path)
            wrapper = module if isinstance(module, ModulesToSave) else saved_module(module)
            tied_to = module_at(model, ties[path]).modules_to_save[adapter_name] if path in ties else None
            wrapper.add_adapter(adapter_name, dtype or torch.float32, path, tied_to=tied_to)
            if path in ties:
                wrapper.tied_to[adapter_name] = ties[path]
            injection.on_undo(partial(wrapper.delete_adapter, adapter_name))
            swap_(model, path, wrapper, injection)
    except BaseException:
        injection.undo()
        raise
    return injection


def swap_(
    model: nn.Module,
    path: str,
    module: nn.Module,
    injection: Injection | None = None,
    *,
    of: nn.Module | None = None,
) -> None:
    """Make ``module`` the submodule of ``model`` at ``path``, inside wrappers that stand there; where stand-ins stand
    for one another, in the place of the one ``of``."""
    holder, name = slot(model, path, of)
    before: Any = holder._modules[name]
    if before is not module:
        if injection is not None:
            injection.on_undo(partial(_put_, holder, name, before))
        _put_(holder, name, module)


def _put_(holder: nn.Module, name: str, module: nn.Module) -> None:
    setattr(holder, name, module)
    refit_(holder)
    if name == "_orig_mod":  # torch.compile's wrapper calls what it was made for, until it is told
        holder._initialize()  # type: ignore[operator]


def request_for(
    model: nn.Module,
    entry: PlanEntry,
    config: LoraConfig,
    dtype: torch.dtype | None = None,
    *,
    gathers: bool = False,
) -> Request:
    """What a start is told of ``entry``; ``dtype`` as in ``inject_``. With ``gathers`` a sharded weight is gathered, on
    every rank, for a start that looks at it."""
    base = base_of(module_at(model, entry.path))
    codec = codec_for(base, entry.path)
    device = _device(codec.device(base), base)
    dtype = dtype or adapter_dtype(codec.compute_dtype(base))
    if (sharding := sharding_of(base)) is not None:
        base = whole_module(base, sharding, values=gathers)
        codec = codec_for(base, entry.path)
    return Request(
        path=entry.path,
        base=base,
        codec=codec,
        family=entry.family,
        rank=entry.rank,
        scaling=config.scaling_of(entry.rank, entry.alpha),
        config=config,
        dtype=dtype,
        device=device,
        sharding=sharding,
    )


def _build(
    model: nn.Module,
    entry: PlanEntry,
    config: LoraConfig,
    name: str,
    start: Callable[[Request], Start],
    dtype: torch.dtype | None,
    injection: Injection,
    source: AdapterLayer | None = None,
) -> AdapterLayer:
    existing = module_at(model, entry.path)
    if isinstance(existing, FusedLinear):
        raise AdapterError(
            f"{entry.path}: expected a fused linear without adapters on its parts, found {', '.join(existing.parts)}; "
            "name these, or delete their adapters first"
        )
    slow = config.init_lora_weights not in QUICK_STARTS
    request = request_for(model, entry, config, dtype, gathers=slow)
    begun = start(request) if source is None else _start_of(source, name, entry)
    if begun.base is not None and entry.shared:
        refuse_tied(Tree(model), [entry.path])
    if begun.base is not None and isinstance(existing, AdapterLayer) and existing.adapter_names():
        raise AdapterError(
            f"{entry.path}: init_lora_weights={config.init_lora_weights!r} would requantize the weight under the "
            f"adapter(s) {existing.adapter_names()}; start this adapter first, on a model without others"
        )
    if isinstance(existing, AdapterLayer):
        layer = existing
        injection.on_undo(lambda: layer.delete_adapter(name))
    else:
        module = base_of(existing) if begun.base is None else _in_place_of(base_of(existing), begun.base, entry.path)
        layer = layer_family_for(module, entry.path)(module)
    layer.add_adapter(
        name,
        begun.A.to(request.dtype),
        begun.B.to(request.dtype),
        alpha=entry.alpha,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        tied_to=source,
    )
    layer.shares_weight = entry.shared or bool(layer._shared)  # while it is merged it has one of its own
    if source is not None:
        layer.tied_to[name] = entry.tied_to
    if begun.report is not None:
        layer.start_reports[name] = begun.report
    return layer


def _in_place_of(old: nn.Module, made: nn.Module, path: str) -> nn.Module:
    """What a start made for ``old``, cut to this rank's part where that is sharded."""
    if (sharding := sharding_of(old)) is not None:
        try:
            made = codec_for(old).housed(old, part_of_module(made, sharding))
        except CodecError as error:
            raise CodecError(f"{path}: {error}") from error
    for parameter in made.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(False)
    return with_hooks_of(old, made)


def _start_of(source: AdapterLayer, name: str, entry: PlanEntry) -> Start:
    """The factors of a module that shares those of ``source``: a linear layer's are an embedding's, transposed."""
    A, B = source.whole_factors(name)
    return Start(A, B) if source.family == entry.family else Start(B.T, A.T)


def _device(storage: torch.device, base: nn.Module) -> torch.device:
    """Where the base computes: an offloaded weight lies on the meta device until accelerate's hook brings it."""
    execution = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
    if storage.type == "meta" and execution is not None:
        return torch.device(execution)
    return storage


def with_hooks_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` with ``old``'s forward and backward hooks: it stands in for ``old`` in another storage.

    Hooks on the state dict stay behind; they are about how the old storage is saved. Where ``old`` is sharded, ``new``
    holds the same part and, unless it is a sharded layer by itself, moves activations as the plan says.
    """
    if (sharding := sharding_of(old)) is not None and sharding_of(new) is None:
        return moving_as_(new, sharding)
    for attribute, value in vars(old).items():
        if "_hook" in attribute and ("forward" in attribute or "backward" in attribute):
            setattr(new, attribute, value)
    return new
